"""The only place that opens a socket to the web: search.py and browse.py go through it.

`cached` is the cassette: one SQLite file, cache and recording at once. Every wait ends at the deadline of the tool
call; what goes wrong is a WebFailure, in words for the model. Left out: cookies, scripts, robots.txt, HTTP/2, proxies.
"""

import hashlib
import http.client
import ipaddress
import json
import os
import random
import re
import socket
import sqlite3
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin

import urllib3
from urllib3 import exceptions as errors
from urllib3.util import Url, parse_url

from deepresearcher_min.config import Config, ConfigError, host_list, plain_host

USER_AGENT = "Mozilla/5.0 (compatible; deepresearcher-min/1.0; research agent)"
READABLE = re.compile(r"$|text/(html|plain|markdown)|application/(xhtml\+xml|pdf)")  # content types of pages
GET_PAGE = {"method": "GET", "headers": {"Accept": "text/html,application/pdf,text/plain"}}
TIMEOUT = ("timeout", "The server did not answer in time.")
CONNECTION = ("connection", "The connection to the server failed.")
BAD_REPLY = ("bad_reply", "The service sent a reply that cannot be read.")
REFUSED = ("refused_address", "Only plain http and https addresses of the public internet can be opened.")
BLOCKED = ("blocked_host", "This host is blocked: data sets are kept there, with the answers to questions.")
PLAIN_URL = re.compile(r"(?i)https?://[^/?#@\\\x00-\x20\x7f]+([/?#][^\\\x00-\x20\x7f]*)?")  # no user, no odd characters
HOST_OF_URL = re.compile(r"(?:[^/?#]*//)?(?:[^/?#]*@)?([^/?#:]*)")
# Not public, although some Python versions call them global: multicast, protocol assignments, 6to4 relays, the metadata
# service of Azure; of IPv6 all outside 2000::/3, Teredo and its neighbours, documentation.
NETWORKS = """224.0.0.0/3 192.0.0.0/24 192.88.99.0/24 168.63.129.16/32
    ::/3 4000::/2 8000::/1 2001::/23 2001:db8::/32 3fff::/20"""
NOT_PUBLIC = [ipaddress.ip_network(network) for network in NETWORKS.split()]
RESOLVERS = ThreadPoolExecutor(16, "resolver")  # getaddrinfo knows no deadline; waiting for a thread does
COUNT_LOCK = threading.Lock()
EXCHANGE = threading.local()  # .deadline of the exchange that this thread is in


class WebFailure(Exception):
    """Something that the world did: `kind` is a short name to count, `words` a sentence for the model."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(f"{kind}: {words}")
        self.kind, self.words = kind, words


class BlockedURL(WebFailure):
    """An address that may not be opened, or whose name does not resolve."""


def count(counts: dict, name: str, amount: float = 1) -> None:
    """Add to a counter that several tool threads of one trajectory may share."""
    with COUNT_LOCK:
        counts[name] += amount


def seconds_left(deadline: float) -> float:
    """Seconds until a deadline on the monotonic clock; raises WebFailure when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise WebFailure(*TIMEOUT)
    return left


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet; IPv4 inside IPv6 is judged as IPv4."""
    ip = ipaddress.ip_address(address)
    if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if ip.version == 6:
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    return ip.is_global and not any(ip in network for network in NOT_PUBLIC)


def check_url(url: str, allow_private: bool = False, seconds: float = 5.0) -> tuple[Url, list[str]]:
    """A URL's parts, and the addresses to connect to, no others; BlockedURL unless it is plain and all are public."""
    parts = Url()
    with suppress(errors.LocationParseError):
        parts = parse_url(url if PLAIN_URL.fullmatch(url) else "")
    host = (parts.host or "").strip("[]")
    if not host or not (allow_private or parts.port in (None, 80, 443)):
        raise BlockedURL(*REFUSED)
    lookup = RESOLVERS.submit(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
    try:
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in lookup.result(seconds)))
    except (OSError, UnicodeError):  # no such name, or no answer in time
        raise BlockedURL("dns", f"No server with the name {host} can be found.") from None
    finally:
        lookup.cancel()  # one that nobody waits for any more must not hold up the others
    if not allow_private and not all(map(is_public, addresses)):
        raise BlockedURL(*REFUSED)
    return parts, addresses


def is_blocked(url: str, hosts: Sequence[str]) -> bool:
    """Whether an address, however it is spelled, is at one of these hosts, from host_list, or their subdomains."""
    found = HOST_OF_URL.match(url.strip().replace("\\", "/"))
    host = plain_host(unquote(found[1] if found else ""))
    return any(f".{host}".endswith(f".{blocked}") for blocked in hosts)


class DeadlineResponse(http.client.HTTPResponse):
    """A response whose head and body end at the deadline: a limit of silence never meets a byte every second."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        receive = self.fp.raw.readinto  # of the buffered file that http.client has just made over the socket

        def receive_in_time(buffer: Any) -> int | None:
            sock.settimeout(min(seconds_left(EXCHANGE.deadline), sock.gettimeout() or 0.0))
            return receive(buffer)

        self.fp.raw.readinto = receive_in_time  # type: ignore[method-assign]


CONNECTIONS: Any = {
    pool.scheme: type("Connection", (pool.ConnectionCls,), {"response_class": DeadlineResponse})
    for pool in (urllib3.HTTPConnectionPool, urllib3.HTTPSConnectionPool)
}


def status_failure(status: int, body: bytes) -> WebFailure:
    if status in (402, 432) or (status == 400 and b"credit" in body[:1000].lower()):  # "Not enough credits" is Serper's
        return WebFailure("quota", "The quota of the service is used up.")
    if status in (401, 403):
        return WebFailure("unauthorized", "The server refused access.")
    words = f"The server answered with the error {status} ({http.client.responses.get(status, 'unknown')})."
    return WebFailure("rate_limited" if status == 429 else f"http_{status}", words)


class Web:
    """All traffic of one rank. Any thread may call; every call ends at its deadline [s on the monotonic clock]."""

    def __init__(self, config: Config, cassette: str | Path, rank: int = 0, world_size: int = 1) -> None:
        self.config, self.cassette, self.world_size = config, Path(cassette), world_size
        if config.cassette_mode == "replay" and not self.cassette.is_file():
            raise ConfigError(f"cassette={str(self.cassette)!r}: cassette_mode: replay needs a recording")
        self.cassette.parent.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(cassette, timeout=30, isolation_level=None, check_same_thread=False)
        for _ in range(600):  # this statement, unlike all others, does not wait while another rank is at it
            try:
                self.db.execute("PRAGMA journal_mode=WAL")  # for the ranks of one node (on a local disk) and kill -9
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
            time.sleep(0.05)
        self.db.execute("PRAGMA synchronous=NORMAL")  # a power cut may cost the last replies, never the file
        self.db.execute("CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, time REAL, reply TEXT)")
        self.db_lock = threading.Lock()
        self.flights = [threading.Lock() for _ in range(65536)]  # one for each first two bytes of a key
        self.pools = urllib3.PoolManager(100, block=True, retries=False, ssl_context=ssl.create_default_context())
        self.jitter = random.Random(rank)
        self.blocked = host_list(config)
        self.run = 0  # of an evaluation's repeats

    def cached(self, kind: str, request: Any, produce: Callable[[], Any], counts: Counter, deadline: float) -> Any:
        """The recorded reply to `request` (any JSON), else that of produce(), which is recorded, be it a WebFailure."""
        asked = [kind, request]
        if self.run and kind in ("reader", "judge"):  # models answer each run anew; searches and pages are shared
            asked.append(self.run)
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()
        flight = self.flights[int.from_bytes(key[:2], "big")]
        if not flight.acquire(timeout=seconds_left(deadline)):  # all but one of identical requests wait for its reply
            raise WebFailure(*TIMEOUT)
        try:
            with self.db_lock:
                row = self.db.execute("SELECT time, reply FROM replies WHERE key = ?", (key,)).fetchone()
            reply = json.loads(row[1]) if row else {}
            ttl = 60.0 if "failure" in reply else self.config.search_ttl  # a failure is soon forgotten [s]
            kept = {"live": False, "record": "failure" not in reply, "replay": True}[self.config.cassette_mode]
            if reply and (kept or time.time() - row[0] <= ttl):
                count(counts, "cache_hits")
            elif self.config.cassette_mode == "replay":
                raise WebFailure("replay_miss", "This is not in the recording that is being replayed.")
            else:
                try:
                    reply = {"value": produce()}
                except WebFailure as failure:
                    reply = {"failure": (failure.kind, failure.words)}
                row = (key, time.time(), json.dumps(reply))
                with self.db_lock:
                    self.db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", row)
        finally:
            flight.release()
        if "failure" in reply:
            raise WebFailure(*reply["failure"])
        return reply["value"]

    def fetch(self, url: str, counts: Counter, deadline: float, sent: Any = GET_PAGE, own: bool = False) -> Any:
        """(body, decompressed; content type) of a successful reply, after up to 1 + max_retries attempts.

        `sent`: method, headers, json. `own`: a service of the operator, so any address and content type, no redirects.
        """
        for attempt in range(self.config.max_retries + 1):
            pause = 0.5 * 2**attempt * self.jitter.uniform(0.5, 1.5)
            try:
                status, headers, body = self._follow(url, sent, own, attempt, counts, deadline)
                if 200 <= status < 300:
                    return body, headers.get("Content-Type", "")
                failure = status_failure(status, body)
                with suppress(errors.InvalidHeader, ValueError):  # no Retry-After, or one that cannot be read
                    pause = urllib3.Retry().parse_retry_after(headers.get("Retry-After", ""))
            except WebFailure as raised:
                failure = raised
            again = re.match("timeout|connection|rate_limited|http_5", failure.kind)
            if not again or attempt == self.config.max_retries or time.monotonic() + pause >= deadline:
                raise failure
            time.sleep(pause)

    def fetch_json(self, url: str, headers: Any, payload: Any, counts: Counter, deadline: float) -> Any:
        """The JSON reply of a service of the operator, to a POST of `payload`, or a GET if that is None."""
        sent = {"method": "GET" if payload is None else "POST", "headers": headers, "json": payload}
        try:
            return json.loads(self.fetch(url, counts, deadline, sent, own=True)[0])
        except (ValueError, RecursionError):
            raise WebFailure(*BAD_REPLY) from None

    def chat(self, url: str, key: str, payload: Any, counts: Counter, deadline: float) -> tuple[str | None, int]:
        """(text, tokens) of a chat completion; (None, 0) without text. `key`: the environment variable of the key."""
        headers = {"Authorization": f"Bearer {os.environ.get(key, '')}"}
        reply = self.fetch_json(url, headers, payload | {"temperature": 0}, counts, deadline)
        try:
            text = reply["choices"][0]["message"]["content"] + ""
        except (LookupError, TypeError):
            return None, 0
        with suppress(LookupError, TypeError):
            return text, reply["usage"]["total_tokens"] + 0
        return text, len(f"{payload['messages']}{text}") // 4  # an estimate

    def _follow(self, url: str, sent: Any, own: bool, attempt: int, counts: Counter, deadline: float) -> Any:
        """(status, headers, body) at the end of the redirects; attempts take turns with the addresses of a name."""
        for _ in range(6):  # five redirects
            if not own and is_blocked(url, self.blocked):
                raise BlockedURL(*BLOCKED)
            parts, addresses = check_url(url, own or self.config.allow_private_hosts, seconds_left(deadline))
            address = addresses[attempt % len(addresses)]
            status, headers, body = self._exchange(parts, address, sent, own, counts, deadline)
            if own or status not in (301, 302, 303, 307, 308) or "Location" not in headers:
                return status, headers, body
            url = headers["Location"].encode("latin-1", "replace").decode("utf-8", "replace").replace(" ", "%20")
            with suppress(ValueError):  # it is no address at all, which check_url says
                url = urljoin(parts.url, url)
        raise WebFailure("redirects", "The address leads from redirect to redirect without end.")

    def _exchange(self, url: Url, address: str, sent: Any, own: bool, counts: Counter, deadline: float) -> Any:
        EXCHANGE.deadline = deadline
        third = seconds_left(deadline) / 3  # each for a place in the pool, the connection and its TLS: together in time
        wait = urllib3.Timeout(connect=min(self.config.connect_timeout, third), read=self.config.read_timeout)
        headers = {"Host": url.netloc, "User-Agent": USER_AGENT, "Accept-Encoding": "gzip, deflate", **sent["headers"]}
        request = {**sent, "url": url.request_uri, "headers": headers, "timeout": wait, "pool_timeout": third}
        most = max(1, self.config.tool_threads) if own else self.config.connections_per_host
        options = {"maxsize": most, "server_hostname": url.host}  # the certificate must be that of the name
        count(counts, "requests")
        try:
            pool = self.pools.connection_from_host(address, url.port, url.scheme, options)
            pool.ConnectionCls = CONNECTIONS[url.scheme]
            response = pool.request(**request, redirect=False, preload_content=False)
            try:
                kind = response.headers.get("Content-Type", "").strip().lower()
                if not own and response.status == 200 and not READABLE.match(kind):
                    raise WebFailure("content_type", f"This is not a page to read but a file of type {kind[:60]}.")
                body = response.read(self.config.max_page_bytes + 1)  # decompresses no more than that
                if len(body) > self.config.max_page_bytes:
                    raise WebFailure("too_large", "The page is too large to be read.")
                count(counts, "bytes", response.tell())
                return response.status, response.headers, body
            finally:  # both: a connection with unread bytes is closed, and its place in the pool given back
                response.close()
                response.release_conn()
        except (errors.SSLError, ssl.SSLError):
            raise WebFailure("tls", "No secure connection to the server is possible.") from None
        except (errors.TimeoutError, errors.EmptyPoolError) as error:
            refused = isinstance(error, errors.NewConnectionError)  # for urllib3 a kind of timeout
            raise WebFailure(*(CONNECTION if refused else TIMEOUT)) from None
        except (errors.HTTPError, OSError, http.client.HTTPException, ValueError):
            raise WebFailure(*CONNECTION) from None

    def close(self) -> None:
        self.pools.clear()
        with self.db_lock:  # not under the hands of a thread that was given up
            self.db.close()

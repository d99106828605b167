"""The only place that opens a socket to the web: search.py and browse.py go through it.

`cached` is the cassette: one SQLite file, cache and recording at once. Every wait ends at the
deadline of the tool call; what goes wrong is a WebFailure, in words for the model. Left out:
cookies, scripts, robots.txt, HTTP/2, proxies.
"""

import hashlib
import html
import http.client
import ipaddress
import json
import os
import random
import re
import socket
import sqlite3
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import unquote, urljoin

import urllib3
from urllib3 import exceptions as errors
from urllib3.util import Url, parse_url

from deepresearcher_min.config import Config, ConfigError, host_list, plain_host

USER_AGENT = "Mozilla/5.0 (compatible; deepresearcher-min/1.0; research agent)"
READABLE = re.compile(
    r"$|text/(html|plain|markdown)|application/(xhtml\+xml|pdf)"
)  # content types of pages
GET_PAGE = {"method": "GET", "headers": {"Accept": "text/html,application/pdf,text/plain"}}
TIMEOUT = ("timeout", "The server did not answer in time.")
CONNECTION = ("connection", "The connection to the server failed.")
BAD_REPLY = ("bad_reply", "The service sent a reply that cannot be read.")
REFUSED = (
    "refused_address",
    "Only plain http and https addresses of the public internet can be opened.",
)
BLOCKED = (
    "blocked_host",
    "This host is blocked: data sets are kept there, with the answers to questions.",
)
PLAIN_URL = re.compile(
    r"(?i)https?://[^/?#@\\\x00-\x20\x7f]+([/?#][^\\\x00-\x20\x7f]*)?"
)  # no user, no odd characters
HOST_OF_URL = re.compile(r"(?:[^/?#]*//)?(?:[^/?#]*@)?([^/?#:]*)")
# Not public, although some Python versions call them global: multicast, protocol assignments, 6to4
# relays, the metadata service of Azure; of IPv6 all outside 2000::/3, Teredo and its neighbours,
# documentation.
NETWORKS = """224.0.0.0/3 192.0.0.0/24 192.88.99.0/24 168.63.129.16/32
    ::/3 4000::/2 8000::/1 2001::/23 2001:db8::/32 3fff::/20""".split()  # noqa: SIM905
RESOLVERS = ThreadPoolExecutor(
    16, "resolver"
)  # getaddrinfo knows no deadline; waiting for a thread does
COUNT_LOCK = threading.Lock()
EXCHANGE = threading.local()  # .deadline of the exchange that this thread is in
ROLES = (
    "search",
    "reader",
    "judge",
)  # services of the operator, whose failures can stop a run; pages may fail
NO_FAULT = ("no_results", "no_verdict")  # kinds of failure of a service that works
LEFT_OUT: dict[
    tuple[str, str], dict[str, str]
] = {}  # by endpoint and model: parameter -> its other name, or ""
LAST_WORDS: dict[str, str] = {}  # how a call to each service failed last, for people


class WebFailure(Exception):
    """What the world did: a short name to count, a sentence for the model, and a service's own
    words for people.
    """

    def __init__(self, kind: str, words: str, said: str = "") -> None:
        super().__init__(f"{kind}: {words}" + (f" It said: {said}" if said else ""))
        self.kind, self.words, self.said, self.counted = kind, words, said, False


class BlockedURL(WebFailure):
    """An address that may not be opened, or whose name does not resolve."""


def count(counts: dict, name: str, amount: float = 1) -> None:
    """Add to a counter that several tool threads of one trajectory may share."""
    with COUNT_LOCK:
        counts[name] += amount


def count_failure(counts: dict, source: str, failure: WebFailure) -> None:
    """As fail_<source>_<kind>, once for each failure, however many see it on its way."""
    if not failure.counted:
        failure.counted = True
        count(counts, f"fail_{source}_{failure.kind}")


class RunStopped(Exception):
    """Why a run ends before its end, with everything saved: --resume goes on."""


def raise_if_down(config: Config, counts: Mapping[str, Any], least: int = 1) -> None:
    """RunStopped if most of at least `least` calls to a service failed (counts as in
    metrics.jsonl); not in replay.
    """
    for service in ROLES if config.cassette_mode != "replay" else ():
        calls, failed = (counts.get(f"cost_{service}_{what}", 0) for what in ("calls", "failed"))
        if calls >= least and failed > calls / 2:
            last = LAST_WORDS.get(service, "see the other ranks")
            raise RunStopped(
                f"{failed:.0f} of {calls:.0f} calls to the {service} service failed. The last one: {last}"
            )


def code_of(file: str, *packages: str) -> str:
    """What a cached reply was made by: a hash of a module's file, and the versions of what it works
    with.
    """
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() + "".join(map(version, packages))


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
    return ip.is_global and not any(ip in ipaddress.ip_network(network) for network in NETWORKS)


def check_url(url: str, allow_private: bool = False, seconds: float = 5.0) -> tuple[Url, list[str]]:
    """A URL's parts, and the addresses to connect to, no others; BlockedURL unless it is plain and
    all are public.
    """
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
    """Whether an address, however it is spelled, is at one of these hosts, from host_list, or their
    subdomains.
    """
    found = HOST_OF_URL.match(url.strip().replace("\\", "/"))
    host = plain_host(unquote(found[1] if found else ""))
    return any(f".{host}".endswith(f".{blocked}") for blocked in hosts)


class DeadlineResponse(http.client.HTTPResponse):
    """A response whose head and body end at the deadline: a limit of silence never meets a byte
    every second.
    """

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        receive = (
            self.fp.raw.readinto
        )  # of the buffered file that http.client has just made over the socket

        def receive_in_time(buffer: Any) -> int | None:
            sock.settimeout(min(seconds_left(EXCHANGE.deadline), sock.gettimeout() or 0.0))
            return receive(buffer)

        self.fp.raw.readinto = receive_in_time  # type: ignore[method-assign]


CONNECTIONS: Any = {
    pool.scheme: type("Connection", (pool.ConnectionCls,), {"response_class": DeadlineResponse})
    for pool in (urllib3.HTTPConnectionPool, urllib3.HTTPSConnectionPool)
}


def texts(value: Any) -> list[str]:
    """All texts inside JSON, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for part in value for text in texts(part)]
    return [value] if isinstance(value, str) else []


def server_words(body: bytes, headers: Mapping[str, str]) -> str:
    """What an error says: the texts of its JSON, or its text without tags; shortened, and without
    the key sent.
    """
    text = body[:10_000].decode("utf-8", "replace")
    try:
        said = ", ".join(texts(json.loads(text)))
    except (ValueError, RecursionError):
        said = html.unescape(re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>", " ", text))
    for secret in (value.split()[-1] for value in headers.values() if value.strip()):
        said = said.replace(secret, "...") if len(secret) > 3 else said
    return shorten(
        "".join(letter if letter.isprintable() else " " for letter in said), 400, placeholder=" ..."
    )


def status_failure(status: int, body: bytes, said: str = "") -> WebFailure:
    if status in (402, 432) or (
        status == 400 and b"credit" in body[:1000].lower()
    ):  # "Not enough credits" is Serper's
        return WebFailure("quota", "The quota of the service is used up.", said)
    if status in (401, 403):
        return WebFailure("unauthorized", "The server refused access.", said)
    words = f"The server answered with the error {status} ({http.client.responses.get(status, 'unknown')})."
    return WebFailure("rate_limited" if status == 429 else f"http_{status}", words, said)


def refused_parameter(failure: WebFailure, names: Mapping[str, str]) -> str:
    """The key of that parameter in `names` (their values are as sent) which an endpoint refuses, or
    an empty text.

    It is the first that the message names, be it as "max_tokens", "max tokens" or "maxTokens".
    """
    found = {}
    if failure.kind in ("http_400", "http_422") and "context length" not in failure.said:
        for name in names.keys() - {"model", "messages"}:
            pattern = rf"(?i)\b{names[name].replace('_', '[_ ]?')}\b"
            match = re.search(pattern, failure.said) if names[name] else None
            if match:
                found[match.start()] = name
    return found[min(found)] if found else ""


class Web:
    """All traffic of one rank. Any thread may call; every call ends at its deadline [s on the
    monotonic clock].
    """

    def __init__(
        self, config: Config, cassette: str | Path, rank: int = 0, world_size: int = 1
    ) -> None:
        self.config, self.cassette, self.world_size = config, Path(cassette), world_size
        if config.cassette_mode == "replay" and not self.cassette.is_file():
            raise ConfigError(
                f"cassette={str(self.cassette)!r}: cassette_mode: replay needs a recording"
            )
        self.cassette.parent.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(
            cassette, timeout=30, isolation_level=None, check_same_thread=False
        )
        for _ in range(
            600
        ):  # this statement, unlike all others, does not wait while another rank is at it
            try:
                self.db.execute(
                    "PRAGMA journal_mode=WAL"
                )  # for the ranks of one node (on a local disk) and kill -9
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
            time.sleep(0.05)
        self.db.execute(
            "PRAGMA synchronous=NORMAL"
        )  # a power cut may cost the last replies, never the file
        self.db.execute(
            "CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, time REAL, reply TEXT)"
        )
        self.db_lock = threading.Lock()
        self.flights = [
            threading.Lock() for _ in range(65536)
        ]  # one for each first two bytes of a key
        self.pools = urllib3.PoolManager(
            100, block=True, retries=False, ssl_context=ssl.create_default_context()
        )
        self.jitter, self.rank, self.opened = random.Random(rank), rank, time.time()
        self.blocked, self.run = host_list(config), 0  # the run is that of an evaluation's repeats
        self.totals, self.enough = (
            Counter[str](),
            0,
        )  # calls and failures; from how many on to stop, 0: never

    def cached(
        self,
        kind: str,
        request: Any,
        produce: Callable,
        counts: Counter,
        deadline: float,
        made: str = "",
    ) -> Any:
        """The recorded reply to `request` (any JSON), else that of produce(), which is recorded, be
        it a WebFailure.

        `kind`, of what is asked: page or one of ROLES. Here its calls are counted, and those that
        failed. `made` stands for the code behind produce(): in mode live, what other code has made
        is asked for again.
        """
        hurried = deadline - time.monotonic() < self.config.tool_timeout / 2  # others took its time
        if self.enough:
            raise_if_down(self.config, self.totals, self.enough)
        self._count(counts, f"{kind}_calls")
        try:
            return self._recorded(kind, request, produce, counts, deadline, made)
        except WebFailure as failure:
            count_failure(counts, kind, failure)
            if failure.kind not in NO_FAULT and not (hurried and failure.kind == "timeout"):
                self._count(counts, f"{kind}_failed")
                LAST_WORDS[kind] = str(failure)
            raise

    def _count(self, counts: Counter, name: str) -> None:
        count(counts, name)
        count(self.totals, f"cost_{name}")

    def _recorded(
        self,
        kind: str,
        request: Any,
        produce: Callable,
        counts: Counter,
        deadline: float,
        made: str,
    ) -> Any:
        asked = [kind, request]
        if self.run and kind in (
            "reader",
            "judge",
        ):  # models answer each run anew; searches and pages are shared
            asked.append(self.run)
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()
        flight = self.flights[int.from_bytes(key[:2], "big")]
        if not flight.acquire(
            timeout=seconds_left(deadline)
        ):  # all but one of identical requests wait for its reply
            raise WebFailure(*TIMEOUT)
        try:
            with self.db_lock:
                row = self.db.execute(
                    "SELECT time, reply FROM replies WHERE key = ?", (key,)
                ).fetchone()
            reply = json.loads(row[1]) if row else {}
            ttl = self.config.search_ttl
            if (
                "failure" in reply
            ):  # soon forgotten [s], and by the next process at once: a service may be mended
                ttl = min(60.0, time.time() - self.opened)
            kept = {"live": False, "record": "failure" not in reply, "replay": True}[
                self.config.cassette_mode
            ]
            fresh = reply and time.time() - row[0] <= ttl and reply.get("made", "") == made
            if reply and (kept or fresh):
                count(counts, "cache_hits")
            elif self.config.cassette_mode == "replay":
                raise WebFailure(
                    "replay_miss", "This is not in the recording that is being replayed."
                )
            else:
                try:
                    reply = {"value": produce()}
                except WebFailure as failure:
                    reply = {"failure": (failure.kind, failure.words, failure.said)}
                row = (key, time.time(), json.dumps({**reply, "made": made}))
                with self.db_lock:
                    self.db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", row)
        finally:
            flight.release()
        if "failure" in reply:
            raise WebFailure(*reply["failure"])
        return reply["value"]

    def fetch(
        self, url: str, counts: Counter, deadline: float, sent: Any = GET_PAGE, own: bool = False
    ) -> Any:
        """(body, decompressed; content type) of a successful reply, after up to 1 + max_retries
        attempts.

        `sent`: method, headers, json. `own`: a service of the operator, so any address and content
        type, no redirects.
        """
        for attempt in range(self.config.max_retries + 1):
            pause = 0.5 * 2**attempt * self.jitter.uniform(0.5, 1.5)
            try:
                status, headers, body = self._follow(url, sent, own, attempt, counts, deadline)
                if 200 <= status < 300:
                    return body, headers.get("Content-Type", "")
                failure = status_failure(
                    status, body, server_words(body, sent["headers"]) if own else ""
                )
                with suppress(
                    errors.InvalidHeader, ValueError
                ):  # no Retry-After, or one that cannot be read
                    pause = urllib3.Retry().parse_retry_after(headers.get("Retry-After", ""))
            except WebFailure as raised:
                failure = raised
            again = re.match("timeout|connection|rate_limited|http_5", failure.kind)
            if (
                not again
                or attempt == self.config.max_retries
                or time.monotonic() + pause >= deadline
            ):
                raise failure
            time.sleep(pause)

    def fetch_json(
        self, url: str, headers: Any, payload: Any, counts: Counter, deadline: float
    ) -> Any:
        """The JSON reply of a service of the operator, to a POST of `payload`, or a GET if that is
        None.
        """
        sent = {"method": "GET" if payload is None else "POST", "headers": headers, "json": payload}
        body = self.fetch(url, counts, deadline, sent, own=True)[0]
        try:
            reply = json.loads(body)
            if not (
                isinstance(reply, dict) and reply.get("error")
            ):  # which some send with the status of success
                return reply
        except (ValueError, RecursionError):
            pass
        raise WebFailure(*BAD_REPLY, server_words(body, headers))

    def chat(
        self, url: str, key: str, payload: Any, counts: Counter, deadline: float
    ) -> tuple[str | None, int]:
        """(text, tokens) of a chat completion; (None, 0) without text. `key`: the environment
        variable of the key.

        What the endpoint refuses by name of the payload's parameters is left out, or sent by the
        name that it wants.
        """
        headers = {"Authorization": f"Bearer {os.environ.get(key, '').strip()}"}
        endpoint = (url, payload["model"])
        refused, said = dict(LEFT_OUT.get(endpoint, {})), ""
        while True:
            names = {name: refused.get(name, name) for name in payload}
            sent = {new: payload[name] for name, new in names.items() if new}
            try:
                reply = self.fetch_json(url, headers, sent, counts, deadline)
                break
            except WebFailure as failure:
                name = refused_parameter(failure, names)
                if not name:
                    raise
                said = failure.said
                renamed = names[name] == "max_tokens" and "max_completion_tokens" in said
                refused[name] = "max_completion_tokens" if renamed else ""
        if said and refused != LEFT_OUT.get(endpoint) and self.rank == 0:
            print(
                f"{url} refuses {', '.join(refused)}, and is asked without: {said}",
                file=sys.stderr,
                flush=True,
            )
        LEFT_OUT[endpoint] = refused
        try:
            message = reply["choices"][0]["message"]
        except (LookupError, TypeError):
            raise WebFailure(*BAD_REPLY) from None
        text = message.get("content") if isinstance(message, dict) else None
        if not isinstance(text, str):
            return None, 0
        with suppress(LookupError, TypeError):
            return text, reply["usage"]["total_tokens"] + 0
        return text, len(f"{payload['messages']}{text}") // 4  # an estimate

    def _follow(
        self, url: str, sent: Any, own: bool, attempt: int, counts: Counter, deadline: float
    ) -> Any:
        """(status, headers, body) at the end of the redirects; attempts take turns with the
        addresses of a name.
        """
        for _ in range(6):  # five redirects
            if not own and is_blocked(url, self.blocked):
                raise BlockedURL(*BLOCKED)
            parts, addresses = check_url(
                url, own or self.config.allow_private_hosts, seconds_left(deadline)
            )
            address = addresses[attempt % len(addresses)]
            status, headers, body = self._exchange(parts, address, sent, own, counts, deadline)
            if own or status not in (301, 302, 303, 307, 308) or "Location" not in headers:
                return status, headers, body
            url = (
                headers["Location"]
                .encode("latin-1", "replace")
                .decode("utf-8", "replace")
                .replace(" ", "%20")
            )
            with suppress(ValueError):  # it is no address at all, which check_url says
                url = urljoin(parts.url, url)
        raise WebFailure("redirects", "The address leads from redirect to redirect without end.")

    def _exchange(
        self, url: Url, address: str, sent: Any, own: bool, counts: Counter, deadline: float
    ) -> Any:
        EXCHANGE.deadline = deadline
        third = (
            seconds_left(deadline) / 3
        )  # each for a place in the pool, the connection and its TLS: together in time
        # A language model is silent until the whole of its reply is there.
        silence = third * 3 if "messages" in (sent.get("json") or {}) else self.config.read_timeout
        wait = urllib3.Timeout(connect=min(self.config.connect_timeout, third), read=silence)
        headers = {
            "Host": url.netloc,
            "User-Agent": USER_AGENT,
            "Accept-Encoding": "gzip, deflate",
            **sent["headers"],
        }
        request = {
            **sent,
            "url": url.request_uri,
            "headers": headers,
            "timeout": wait,
            "pool_timeout": third,
        }
        most = max(1, self.config.tool_threads) if own else self.config.connections_per_host
        options = {
            "maxsize": most,
            "server_hostname": url.host,
        }  # the certificate must be that of the name
        count(counts, "requests")
        try:
            pool = self.pools.connection_from_host(address, url.port, url.scheme, options)
            pool.ConnectionCls = CONNECTIONS[url.scheme]
            response = pool.request(**request, redirect=False, preload_content=False)
            try:
                kind = response.headers.get("Content-Type", "").strip().lower()
                if not own and response.status == 200 and not READABLE.match(kind):
                    raise WebFailure(
                        "content_type",
                        f"This is not a page to read but a file of type {kind[:60]}.",
                    )
                body = response.read(
                    self.config.max_page_bytes + 1
                )  # decompresses no more than that
                if len(body) > self.config.max_page_bytes:
                    raise WebFailure("too_large", "The page is too large to be read.")
                count(counts, "bytes", response.tell())
                return response.status, response.headers, body
            # both: a connection with unread bytes is closed, and its place in the pool given back
            finally:
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

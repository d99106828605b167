"""The only place that opens a socket to the web: search.py and browse.py go through it.

Addresses (which may be opened) · the exchange (the only adapter of our one requests.Session:
whatever that sends, redirects too, is checked, pinned and limited there) · Web, for pages and
services, with its cassette (cache and recording at once). Every wait ends at the deadline of the
tool call; the words for failures are in failures.yaml.

Left out: cookies, scripts, robots.txt, HTTP/2, proxies, ~/.netrc. Retries are a loop of ours:
urllib3's Retry sleeps past a deadline, drains refused replies without a limit, and does not ask
again where a body broke off.
"""

import hashlib
import http.client
import io
import ipaddress
import json
import random
import re
import socket
import sqlite3
import ssl
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from textwrap import shorten

import requests
import urllib3
from urllib3 import exceptions as errors
from urllib3.util import parse_url

from deepresearcher_min.config import (
    LAST_WORDS,
    NO_FAULT,
    WORDS,
    ConfigError,
    WebFailure,
    count,
    count_failure,
    host_list,
    is_blocked,
    named,
    raise_if_down,
    seconds_left,
)

# --- addresses: which may be opened

# no user, no odd characters
PLAIN_URL = r"(?i)https?://[^/?#@\\\x00-\x20\x7f]+([/?#][^\\\x00-\x20\x7f]*)?"
# Not public, although some Python versions call them global: multicast, protocol assignments, 6to4
# relays, the metadata service of Azure; of IPv6 all outside 2000::/3, Teredo and its neighbours,
# documentation.
NETWORKS = """224.0.0.0/3 192.0.0.0/24 192.88.99.0/24 168.63.129.16/32
    ::/3 4000::/2 8000::/1 2001::/23 2001:db8::/32 3fff::/20""".split()  # noqa: SIM905
RESOLVERS = ThreadPoolExecutor(16, "resolver")  # getaddrinfo knows no deadline; waiting for it does


def is_public(address):
    """Whether an IP address belongs to the public internet; IPv4 inside IPv6 is judged as IPv4."""
    ip = ipaddress.ip_address(address)
    if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if ip.version == 6:
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    return ip.is_global and not any(ip in ipaddress.ip_network(network) for network in NETWORKS)


def check_url(url: str, allow_private=False, seconds=5.0):
    """A plain URL's parts, and the only addresses to dial; WebFailure if one is not public."""
    parts = parse_url("")
    with suppress(ValueError):
        parts = parse_url(url if re.fullmatch(PLAIN_URL, url) else "")
    host = (parts.host or "").strip("[]")
    if not host or not (allow_private or parts.port in (None, 80, 443)):
        raise WebFailure("refused_address")
    lookup = RESOLVERS.submit(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
    try:
        addresses = [entry[4][0] for entry in lookup.result(seconds)]
    except (OSError, UnicodeError):  # no such name, or no answer in time
        raise WebFailure("dns", f"No server with the name {host} can be found.") from None
    finally:
        lookup.cancel()  # one that nobody waits for any more must not hold up the others
    if not allow_private and not all(map(is_public, addresses)):
        raise WebFailure("refused_address")
    return parts, addresses


# --- the exchange: one request and its reply

# content types of pages
READABLE = r"(?i)\s*($|text/(html|plain|markdown)|application/(xhtml\+xml|pdf))"
STATUS = {401: "unauthorized", 402: "quota", 403: "unauthorized", 429: "rate_limited", 432: "quota"}
# what requests and urllib3 raise; all else is a connection that failed
RAISED = {
    requests.TooManyRedirects: "redirects",
    errors.SSLError: "tls",
    errors.ConnectTimeoutError: "timeout",
    errors.ReadTimeoutError: "timeout",
    errors.EmptyPoolError: "timeout",
}
# what this thread is fetching: .own (from a service of the operator), .attempt, .counts, .deadline
ERRAND = threading.local()


def response_in_time(_, sock, method):
    """A reply whose head and body end at the deadline: a read timeout alone never ends one that
    sends a byte every second.
    """
    response = http.client.HTTPResponse(sock, method=method)
    raw = response.fp.raw  # of the buffered file just made over the socket
    receive = raw.readinto

    def receive_in_time(buffer):
        sock.settimeout(min(seconds_left(ERRAND.deadline), sock.gettimeout()))
        return receive(buffer)

    raw.readinto = receive_in_time  # type: ignore[method-assign]
    return response


class PlainConnection(urllib3.connection.HTTPConnection):
    response_class = response_in_time  # type: ignore[assignment]


class SecureConnection(urllib3.connection.HTTPSConnection):
    response_class = response_in_time  # type: ignore[assignment]


class Door(requests.adapters.HTTPAdapter):
    """The only way out of our requests.Session: what was checked is dialled, and all is limited."""

    def __init__(self, config):
        super().__init__()
        self.limits = config
        self.poolmanager = urllib3.PoolManager(
            100, block=True, retries=False, ssl_context=ssl.create_default_context()
        )

    def send(self, request, *_, **__):
        """The reply, read, whatever its status is."""
        limits = self.limits
        own = ERRAND.own
        if not own and is_blocked(request.url, host_list(limits)):
            raise WebFailure("blocked_host")
        parts, addresses = check_url(
            request.url, own or limits.allow_private_hosts, seconds_left(ERRAND.deadline)
        )
        address = addresses[ERRAND.attempt % len(addresses)]  # they take turns
        request.headers["Host"] = parts.netloc
        # a place in the pool, the connection, its TLS: a third each, so together in time
        left = seconds_left(ERRAND.deadline)
        # a language model says nothing until it has said all
        silence = left if request.url.endswith("/chat/completions") else limits.read_timeout
        # all tool threads and the main one may ask a service; the certificate must be the name's
        pinned = {
            "maxsize": limits.tool_threads + 1 if own else limits.connections_per_host,
            "server_hostname": parts.host,
        }
        count(ERRAND.counts, "requests")
        pool = self.poolmanager.connection_from_host(address, parts.port, parts.scheme, pinned)
        pool.ConnectionCls = PlainConnection if parts.scheme == "http" else SecureConnection
        reply = pool.urlopen(
            request.method,
            parts.request_uri,
            request.body,
            request.headers,
            timeout=urllib3.Timeout(connect=min(limits.connect_timeout, left / 3), read=silence),
            pool_timeout=left / 3,  # type: ignore[arg-type]
            redirect=False,
            preload_content=False,
        )
        try:
            kind = reply.headers.get("Content-Type", "")
            if reply.status == 200 and not own and not re.match(READABLE, kind):
                raise WebFailure(
                    "content_type", f"This is not a page to read but a file of type {kind[:60]}."
                )
            body = reply.read(limits.max_page_bytes + 1)  # decompressed
            if len(body) > limits.max_page_bytes:
                raise WebFailure("too_large")
            count(ERRAND.counts, "bytes", reply.tell())
            response = self.build_response(request, reply)
            # read already, and without cookies that the session could keep
            response.raw = io.BytesIO(body)
            return response
        finally:  # a connection with unread bytes is closed, and its place in the pool given back
            reply.close()
            reply.release_conn()


def status_failure(response, headers):
    """What a reply that is no success, to a request with these headers, means."""
    status = response.status_code
    said = server_words(response.content, headers)
    if status == 400 and "credit" in said.lower():
        status = 402  # "Not enough credits" is Serper's
    kind = STATUS.get(status, f"http_{status}")
    words = (
        f"The server answered with the error {status} "
        f"({http.client.responses.get(status, 'unknown')})."
    )
    return WebFailure(kind, WORDS.get(kind, words), said)


def server_words(body, headers):
    """The words of an error's JSON or HTML, shortened, and without our key."""
    # no scripts and tags, no keys and brackets
    rest = r'(?s)<(style|script).*?</\1>|<[^>]*>|,? ?"\w+" ?:|[][{}]|\\?"'
    said = re.sub(rest, " ", body[:10_000].decode(errors="replace"))
    for value in (headers or {}).values():
        key = value.removeprefix("Bearer ")
        if len(key) > 3:
            said = said.replace(key, "...")
    return "".join(filter(str.isprintable, shorten(said, 400, placeholder=" ...")))


# --- pages and services, through the cassette (cache and recording at once) and the exchange


class Web:
    """All traffic of one rank, by any thread; each call ends at its deadline [monotonic s].

    `cassette`: one SQLite file for all ranks of a node (on a local disk), safe for threads and
    kill -9.
    """

    run = 0  # of an evaluation's repeats
    enough = 10**9  # so many calls to a service, and the failure of most of them stops the run

    def __init__(self, config, cassette: str | Path, rank=0, world_size=1):
        self.config = config
        self.cassette = Path(cassette)
        if config.cassette_mode == "replay" and not self.cassette.is_file():
            raise ConfigError(f"cassette='{cassette}': cassette_mode: replay needs a recording")
        self.cassette.parent.mkdir(parents=True, exist_ok=True)
        self.db = db = sqlite3.connect(
            cassette, timeout=30, isolation_level=None, check_same_thread=False
        )
        db.execute(
            "CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, time REAL, reply TEXT)"
        )
        # all other statements wait; this one fails while another rank is at it, for all of us
        with suppress(sqlite3.OperationalError):
            db.execute("PRAGMA journal_mode=WAL")
        # a power cut may cost the last replies, never the file
        db.execute("PRAGMA synchronous=NORMAL")
        self.db_lock = threading.Lock()
        self.opened = time.time()
        self.flights = {}  # a lock for each first two bytes of a key
        self.totals = Counter()  # calls and failures
        self.rank = rank
        self.world_size = world_size
        self.session = session = requests.Session()
        session.trust_env = False  # ~/.netrc would replace our Authorization header
        session.max_redirects = 5
        session.headers["User-Agent"] = (
            "Mozilla/5.0 (compatible; deepresearcher-min/1.0; research agent)"
        )
        # What urllib3 unpacks everywhere, whatever else is installed.
        session.headers["Accept-Encoding"] = "gzip, deflate"
        session.adapters = {"": Door(config)}  # type: ignore[assignment]

    def cached(self, kind, request, produce, counts, deadline, made=""):
        """The recorded reply to `request` (any JSON), else that of produce(), which is recorded, be
        it a WebFailure. Calls and failures are counted.

        `kind`, of what is asked: page or one of config.ROLES. `made`: the code behind produce();
        in mode live, what other code has made is asked for again.
        """
        raise_if_down(self.config, self.totals, self.enough)
        count(counts, f"{kind}_calls")
        count(self.totals, f"cost_{kind}_calls")
        asked = [kind, request]
        # models answer each run anew; searches and pages are shared
        if self.run and kind in ("reader", "judge"):
            asked.append(self.run)
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()
        # all but one of identical requests wait for its reply
        flight = self.flights.setdefault(key[:2], threading.Lock())
        left = deadline - time.monotonic()
        try:
            if not flight.acquire(timeout=seconds_left(deadline)):
                raise WebFailure("timeout")
            try:
                return self.reply_to(key, produce, counts, made)
            finally:
                flight.release()
        except WebFailure as failure:
            count_failure(counts, kind, failure)
            # then others took this call's time, and its timeout is no fault of the service
            hurried = failure.kind == "timeout" and left < self.config.tool_timeout / 2
            if not hurried and failure.kind not in NO_FAULT:
                count(counts, f"{kind}_failed")
                count(self.totals, f"cost_{kind}_failed")
                LAST_WORDS[kind] = str(failure)
            raise

    def reply_to(self, key, produce, counts, made):
        """What is recorded, or else is produced and recorded; raises the WebFailure that it is."""
        with self.db_lock:
            found = self.db.execute("SELECT time, reply FROM replies WHERE key = ?", (key,))
            written, text = found.fetchone() or (0, "{}")
        reply = json.loads(text)
        now = time.time()
        mode = self.config.cassette_mode
        oldest = now - self.config.search_ttl if mode == "live" else 0.0
        # soon forgotten, and by the next process at once: a service may be mended
        if mode != "replay" and "failure" in reply:
            oldest = max(now - 60, self.opened)
        same = mode != "live" or reply.get("made") == made
        if reply and written >= oldest and same:
            count(counts, "cache_hits")
        elif mode == "replay":
            raise WebFailure("replay_miss")
        else:
            try:
                reply = {"value": produce()}
            except WebFailure as failure:
                reply = {"failure": (failure.kind, failure.words, failure.said)}
            row = (key, time.time(), json.dumps(reply | {"made": made}))
            with self.db_lock:
                self.db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", row)
        if "failure" in reply:
            raise WebFailure(*reply["failure"])
        return reply["value"]

    def fetch(self, url, counts, deadline, own=False, headers=None, payload=None):
        """(body, decompressed; content type) of a successful reply to a GET, or to a POST of
        `payload`, after up to 1 + max_retries attempts.

        `own`: a service of the operator, so any address and content type, no redirects.
        """
        ERRAND.own = own
        ERRAND.counts = counts
        ERRAND.deadline = deadline
        ERRAND.attempt = 0
        while True:
            pause = 2**ERRAND.attempt * random.SystemRandom().uniform(0.25, 0.75)
            try:
                response = self.session.request(
                    "POST" if payload else "GET",
                    url,
                    headers=headers,
                    json=payload,
                    allow_redirects=not own,
                )
                if 200 <= response.status_code < 300:
                    return response.content, response.headers.get("Content-Type", "")
                failure = status_failure(response, headers)
                # no Retry-After, or one that cannot be read
                with suppress(KeyError, errors.InvalidHeader, ValueError):
                    pause = urllib3.Retry().parse_retry_after(response.headers["Retry-After"])
            except WebFailure as raised:
                failure = raised
            except ValueError:  # what requests does not even take for an address
                failure = WebFailure("refused_address")
            except (errors.HTTPError, OSError) as error:
                failure = WebFailure(RAISED.get(type(error), "connection"))
            again = re.match("timeout|connection|rate_limited|http_5", failure.kind)
            late = time.monotonic() + pause >= deadline
            if late or not again or ERRAND.attempt == self.config.max_retries:
                raise failure
            time.sleep(pause)
            ERRAND.attempt += 1

    def fetch_json(self, url, headers, payload, counts, deadline):
        """The JSON reply of a service of the operator."""
        body, _ = self.fetch(url, counts, deadline, True, headers, payload)
        with suppress(ValueError, RecursionError):
            reply = json.loads(body)
            # some send errors with the status of success
            if not (isinstance(reply, dict) and reply.get("error")):
                return reply
        raise WebFailure("bad_reply", said=server_words(body, headers))

    def close(self):
        self.session.close()
        with self.db_lock:  # not under the hands of a thread that was given up
            self.db.close()


def open_web(config, ranks):
    """The web through the cassette that the config names, or that of the run folder."""
    cassette = config.cassette or f"{config.run_dir}/cassette.sqlite"
    with named("cassette", cassette, "it must be an SQLite file that can be written"):
        web = Web(config, cassette, ranks.rank, ranks.world_size)
        web.db.execute("SELECT key, time, reply FROM replies LIMIT 1")  # or it is another program's
    return web

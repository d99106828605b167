"""A real HTTP server on loopback for the tests of web, search and browse: it can answer, and it can
misbehave.
"""

import gzip
import json
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deepresearcher_min.config import load_config
from deepresearcher_min.web import WebFailure

CONFIG = replace(
    load_config(["--preset=paper"]),
    allow_private_hosts=True,
    max_retries=0,
    read_timeout=5.0,
    connect_timeout=0.4,
)


def failure_of(web, url, seconds=1.0, counts=None):
    """(kind, words, seconds taken) of a fetch that must fail."""
    start = time.monotonic()
    with pytest.raises(WebFailure) as failure:
        web.fetch(url, Counter() if counts is None else counts, start + seconds)
    return failure.value.kind, failure.value.words, time.monotonic() - start


def lead_to(monkeypatch, *addresses):
    """Names with "example" in them resolve to these addresses."""
    real = socket.getaddrinfo
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *args, **options: found if "example" in host else real(host, *args, **options),
    )


class Server:
    """Serves `pages` (path -> (status, headers, body)); the FAULTS below are at /fault/<name>.

    `requests` counts paths, `sent` keeps (path, headers, body) of each request, `connections`
    counts connections,
    `most_at_once` is the highest number of requests under way at the same time.
    """

    def __init__(self, pages=None, delay=0.0, ssl_context=None, address="127.0.0.1"):
        self.pages = dict(pages or {})
        self.delay = delay
        self.requests, self.sent, self.connections = Counter(), [], 0
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.http = ThreadingHTTPServer((address, 0), type("Handler", (Handler,), {"site": self}))
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # broken pipes are the point of many tests
        if ssl_context is not None:
            self.http.socket = ssl_context.wrap_socket(self.http.socket, server_side=True)
        self.url = f"{'https' if ssl_context else 'http'}://{address}:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 65536  # head and body in one packet: two would wait 40 ms for each other

    def setup(self):
        super().setup()
        self.site.connections += 1

    def log_message(self, *_):
        pass

    def do_GET(self):
        site = self.site
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with site.lock:
            site.requests[self.path] += 1
            site.sent.append((self.path, dict(self.headers), body))
            site.at_once += 1
            site.most_at_once = max(site.most_at_once, site.at_once)
        try:
            time.sleep(site.delay)
            if self.path.startswith("/fault/"):
                FAULTS[self.path.removeprefix("/fault/")](self)
            else:
                page = site.pages.get(self.path.partition("?")[0], (404, {}, b"no such page"))
                self.reply(*(page(site.requests[self.path]) if callable(page) else page))
        finally:
            with site.lock:
                site.at_once -= 1

    do_POST = do_GET

    def reply(self, status, headers, body):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "text/html",
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self, data, pause=0.1):
        for byte in data:
            if self.site.over.wait(pause):
                return
            self.wfile.write(bytes([byte]))
            self.wfile.flush()

    def raw(self, data, reset=False):
        self.wfile.write(data)
        self.wfile.flush()
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
FAULTS = {
    "silence": lambda h: h.site.over.wait(20),
    "drip_head": lambda h: h.drip(HEAD + b"X-Padding: " + b"a" * 200 + b"\r\n\r\n"),
    "drip_body": lambda h: (h.raw(HEAD + b"Content-Length: 500\r\n\r\n"), h.drip(b"a" * 500)),
    "drip_chunks": lambda h: (
        h.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n"),
        h.drip(b"1\r\na\r\n" * 200),
    ),
    "endless_head": lambda h: h.raw(HEAD + b"X-Padding: a\r\n" * 100_000),
    "reset_in_body": lambda h: h.raw(HEAD + b"Content-Length: 500\r\n\r\nhalf a page", reset=True),
    "short_body": lambda h: h.raw(HEAD + b"Content-Length: 500\r\n\r\nhalf a page"),
    "bad_chunk": lambda h: h.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n"),
    "no_http": lambda h: h.raw(b"220 mail.example ESMTP\r\n"),
    "nothing": lambda h: h.raw(b""),
    "bad_gzip": lambda h: h.reply(200, {"Content-Encoding": "gzip"}, b"this is not gzip"),
    "bomb": lambda h: h.reply(200, {"Content-Encoding": "gzip"}, BOMB),
    "bomb_of_bombs": lambda h: h.reply(
        200, {"Content-Encoding": "gzip, gzip"}, gzip.compress(BOMB)
    ),
    "ten_megabytes": lambda h: h.reply(200, {}, b"<p>word word word</p>" * 500_000),
    "no_end": lambda h: h.raw(HEAD + b"\r\n" + b"word " * 4_000_000),
    "circle": lambda h: h.reply(302, {"Location": "/fault/circle"}, b""),
    "to_file": lambda h: h.reply(302, {"Location": "file:///etc/passwd"}, b""),
    "to_user": lambda h: h.reply(302, {"Location": "http://user:pass@example.com/"}, b""),
    "to_nonsense": lambda h: h.reply(302, {"Location": "http://[::1"}, b""),
    "to_nowhere": lambda h: h.reply(302, {"Location": "http://"}, b""),
    "picture": lambda h: h.reply(200, {"Content-Type": "image/png"}, b"\x89PNG"),
    "video": lambda h: h.raw(
        b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\nContent-Length: 9999999999\r\n\r\n"
    ),
    "bad_length": lambda h: h.raw(HEAD + b"Content-Length: -5\r\n\r\nabc"),
    "missing": lambda h: h.reply(404, {}, b"gone"),
    "forbidden": lambda h: h.reply(403, {}, b"no"),
    "broken": lambda h: h.reply(500, {}, b"oops"),
    "busy": lambda h: h.reply(429, {"Retry-After": "3600"}, b"slow down"),
}
BOMB = gzip.compress(b"\0" * 50_000_000)  # 50 kB that become 50 MB

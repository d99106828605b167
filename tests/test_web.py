"""web.py against real servers on loopback that misbehave: faults, retries, connections, services of
the operator.
"""

import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from loopback import CONFIG, Server, failure_of, lead_to

from deepresearcher_min.config import ROOT, WORDS
from deepresearcher_min.web import Web, WebFailure, check_url

pytestmark = pytest.mark.quick

FAULTS = [
    ("silence", "timeout"),
    ("drip_head", "timeout"),
    ("drip_body", "timeout"),
    ("drip_chunks", "timeout"),
    ("endless_head", "connection"),
    ("reset_in_body", "connection"),
    ("short_body", "connection"),
    ("bad_chunk", "connection"),
    ("no_http", "connection"),
    ("nothing", "connection"),
    ("bad_gzip", "connection"),
    ("bomb", "too_large"),
    ("bomb_of_bombs", "too_large"),
    ("ten_megabytes", "too_large"),
    ("no_end", "too_large"),
    ("circle", "redirects"),
    ("to_file", "refused_address"),
    ("to_user", "refused_address"),
    ("to_nowhere", "redirects"),
    ("to_nonsense", "refused_address"),
    ("picture", "content_type"),
    ("video", "content_type"),
    ("missing", "http_404"),
    ("forbidden", "unauthorized"),
    ("broken", "http_500"),
    ("busy", "rate_limited"),
]


@pytest.fixture(scope="module")
def server():
    with Server({"/page": (200, {}, b"<p>hello")}) as running:
        yield running


@pytest.fixture(scope="module")
def one_web(tmp_path_factory):
    web = Web(CONFIG, tmp_path_factory.mktemp("faults") / "cassette.sqlite")
    yield web
    web.close()


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
def test_faults_become_words_before_the_deadline(one_web, server, fault, kind):
    limit = 0.4 if kind == "timeout" else 10.0  # a busy machine needs its time for ten megabytes
    got, words, seconds = failure_of(one_web, f"{server.url}/fault/{fault}", seconds=limit)
    assert got == kind and words.endswith(".") and words[0].isupper()
    assert seconds < limit + 0.5


def test_a_silence_ends_before_the_deadline(open_web, server):
    kind, _, seconds = failure_of(
        open_web(read_timeout=0.2), server.url + "/fault/silence", seconds=9
    )
    assert kind == "timeout" and seconds < 5


def test_server_down_and_tls_errors(open_web, server):
    web = open_web()
    assert failure_of(web, "http://127.0.0.1:9/")[0] == "connection"
    assert failure_of(web, server.url.replace("http:", "https:") + "/page")[0] == "tls"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_url = f"https://127.0.0.1:{silent.getsockname()[1]}/"
        kind, _, seconds = failure_of(open_web("b", connect_timeout=9.0), silent_url, seconds=0.3)
        assert kind == "timeout" and seconds < 0.8


def test_a_redirect_is_read_as_browsers_read_it(open_web):
    for sent, asked in (("/ü".encode().decode("latin-1"), "/%C3%BC"), ("/a b", "/a%20b")):
        with Server({"/here": (302, {"Location": sent}, b"")}) as server:
            server.pages[asked] = (200, {}, b"there")
            open_web().fetch(server.url + "/here", Counter(), time.monotonic() + 5)
            assert [path for path, *_ in server.sent] == ["/here", asked]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_certificates_are_checked_for_the_name_and_not_for_the_dialled_address(
    open_web, tmp_path, monkeypatch
):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = f"""openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2
        -subj /CN=name.example -addext subjectAltName=DNS:name.example
        -keyout {key} -out {certificate}"""
    subprocess.run(command.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    lead_to(monkeypatch, "127.0.0.1")
    with Server({"/": (200, {}, b"secret")}, ssl_context=context) as server:
        port = server.http.server_port
        # Nobody vouches for it.
        assert failure_of(open_web("a"), f"https://name.example:{port}/")[0] == "tls"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        web = open_web("b")
        assert (
            web.fetch(f"https://name.example:{port}/", Counter(), time.monotonic() + 2)[0]
            == b"secret"
        )
        assert failure_of(web, f"https://other.example:{port}/")[0] == "tls"


def test_a_failed_exchange_gives_its_place_in_the_pool_back(open_web, server):
    web = open_web(connections_per_host=1)
    for fault in (
        "ten_megabytes",
        "picture",
        "drip_body",
        "reset_in_body",
        "silence",
        "missing",
        "circle",
    ):
        failure_of(web, f"{server.url}/fault/{fault}", seconds=0.3)
        assert web.fetch(server.url + "/page", Counter(), time.monotonic() + 9)[0] == b"<p>hello"


def test_names_that_nobody_waits_for_any_more_do_not_hold_up_the_others(monkeypatch):
    asked, found, over = (
        [],
        [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("1.1.1.1", 0))],
        threading.Event(),
    )

    def slow(host, *_, **__):
        asked.append(host)
        if host.startswith("slow"):
            over.wait(60)
        return found

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with ThreadPoolExecutor(64) as threads:
        for future in [
            threads.submit(check_url, f"http://slow{i}.example/", seconds=0.1) for i in range(64)
        ]:
            with pytest.raises(WebFailure, match="dns"):
                future.result()
    over.set()
    assert check_url("http://fast.example/", seconds=30)[1] == ["1.1.1.1"]
    assert len(asked) <= 17  # 16 at a time; the other 48 were given up before their turn


# --- politeness


def test_connections_are_reused_and_bytes_counted(open_web):
    with Server({"/": (200, {}, b"x" * 1000)}) as server:
        web, counts = open_web(), Counter()
        for _ in range(20):
            web.fetch(server.url, counts, time.monotonic() + 2)
        assert server.connections == 1
        assert counts == {"requests": 20, "bytes": 20_000}


def test_at_most_connections_per_host_at_the_same_time(open_web):
    with Server({"/": (200, {}, b"x")}, delay=0.03) as server, ThreadPoolExecutor(16) as threads:
        web = open_web(connections_per_host=3)
        list(
            threads.map(lambda _: web.fetch(server.url, Counter(), time.monotonic() + 5), range(12))
        )
        assert server.most_at_once == 3


def test_retries_after_errors_until_it_works_and_no_more_than_max_retries(open_web):
    def flaky(number):
        return (200, {}, b"at last") if number == 3 else (503, {"Retry-After": "0"}, b"")

    broken, odd = (502, {"Retry-After": "0"}, b""), (503, {"Retry-After": "9" * 5000}, b"")
    with Server({"/flaky": flaky, "/broken": broken, "/odd": odd}) as server:
        web, counts = open_web(max_retries=4), Counter()
        assert web.fetch(server.url + "/flaky", counts, time.monotonic() + 5)[0] == b"at last"
        assert counts["requests"] == 3
        assert failure_of(web, server.url + "/broken", counts=counts)[0] == "http_502"
        assert server.requests["/broken"] == 5
        assert failure_of(web, server.url + "/odd", seconds=0.3)[0] == "http_503"
        assert failure_of(web, server.url + "/missing")[0] == "http_404"
        assert server.requests["/missing"] == 1  # asking again does not help


def test_retry_after_is_honoured_within_the_deadline_and_else_not_waited_for(open_web):
    times = []

    def limited(number):
        times.append(time.monotonic())
        return (200, {}, b"ok") if number > 1 else (429, {"Retry-After": "1"}, b"")

    with Server({"/": limited}) as server:
        open_web(max_retries=4).fetch(server.url + "/", Counter(), time.monotonic() + 30)
        # A pause of our own is 0.75 s at most.
        assert len(times) == 2 and times[1] - times[0] >= 0.95
        kind, _, seconds = failure_of(
            open_web("b", max_retries=4), server.url + "/fault/busy", seconds=30
        )
        assert kind == "rate_limited" and seconds < 15 and server.requests["/fault/busy"] == 1


# --- services of the operator


def test_json_services_may_be_private_and_their_errors_have_names(open_web):
    pages = {
        "/ok": (200, {"Content-Type": "application/json"}, {"a": 1}),
        "/html": (200, {}, b"<html>502</html>"),
        "/cut": (200, {}, b'{"a": [1, 2'),
        "/deep": (200, {}, b"[" * 100_000),
        "/key": (401, {}, {"message": "bad key"}),
        "/poor": (400, {}, {"message": "Not enough credits", "statusCode": 400}),
        "/pay": (402, {}, b""),
        "/moved": (302, {"Location": "/ok"}, b""),
    }
    kinds = {
        "/html": "bad_reply",
        "/cut": "bad_reply",
        "/deep": "bad_reply",
        "/key": "unauthorized",
        "/poor": "quota",
        "/pay": "quota",
        "/moved": "http_302",
    }
    with Server(pages) as server:
        web = open_web(allow_private_hosts=False)
        reply = web.fetch_json(
            server.url + "/ok", {"X-Key": "k"}, {"q": "ü"}, Counter(), time.monotonic() + 2
        )
        assert reply == {"a": 1}
        _, headers, body = server.sent[0]
        assert headers["X-Key"] == "k" and json.loads(body) == {"q": "ü"}
        for path, kind in kinds.items():
            with pytest.raises(WebFailure) as failure:
                web.fetch_json(server.url + path, {}, None, Counter(), time.monotonic() + 2)
            assert failure.value.kind == kind, path


def test_each_kind_of_failure_that_is_raised_without_words_has_them():
    raised = set()
    for path in (ROOT / "deepresearcher_min").glob("*.py"):
        raised |= set(re.findall(r'WebFailure\("(\w+)"\)', path.read_text("utf-8")))
    assert {"timeout", "blocked_host", "no_results"} <= raised <= WORDS.keys()
    with pytest.raises(WebFailure, match="timeout: The server did not answer"):
        raise WebFailure("timeout")

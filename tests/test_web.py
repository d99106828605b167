"""web.py against real servers on loopback that misbehave, hostile addresses, and a cassette under load and kill -9."""

import ipaddress
import json
import os
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import Server

from deepresearcher_min import web as web_module
from deepresearcher_min.config import ROOT, ConfigError, load_config
from deepresearcher_min.web import BlockedURL, Web, WebFailure, check_url, is_public

pytestmark = pytest.mark.quick
CONFIG = replace(
    load_config(["--preset=paper"]), allow_private_hosts=True, max_retries=0, read_timeout=5.0, connect_timeout=0.4
)


@pytest.fixture
def open_web(tmp_path):
    opened = []

    def open_one(file="cassette.sqlite", rank=0, world_size=1, **changes):
        opened.append(Web(replace(CONFIG, **changes), tmp_path / file, rank, world_size))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


@pytest.fixture(scope="module")
def server():
    pages = {"/page": (200, {}, b"<p>hello"), "/plain": (200, {"Content-Type": "text/plain"}, b"hello")}
    with Server(pages) as running:
        yield running


def failure_of(web, url, seconds=1.0, counts=None):
    """(kind, words, seconds taken) of a fetch that must fail."""
    start = time.monotonic()
    with pytest.raises(WebFailure) as failure:
        web.fetch(url, Counter() if counts is None else counts, start + seconds)
    return failure.value.kind, failure.value.words, time.monotonic() - start


# --- addresses

REFUSED = """
http://127.0.0.1/ http://127.0.0.1:80/ http://127.1/ http://127.255.255.254/ http://0/ http://0.0.0.0/ http://2130706433/
http://0x7f000001/ http://0x7f.0.0.1/ http://0177.0.0.1/ http://017700000001/ http://127.0.0.1./ http://localhost/
http://LOCALHOST/ http://localhost./ http://10.0.0.1/ http://10.255.255.255/ http://172.16.0.1/ http://172.31.9.9/
http://192.168.0.1/ http://192.168.1.254/ http://169.254.169.254/latest/meta-data/ http://169.254.0.1/
http://2852039166/latest/ http://0xa9fea9fe/ http://100.64.0.1/ http://100.100.100.200/ http://100.127.255.255/
http://168.63.129.16/ http://192.0.0.192/ http://192.0.0.8/ http://192.0.2.5/ http://198.51.100.7/ http://203.0.113.9/
http://198.18.0.1/ http://192.88.99.1/ http://224.0.0.1/ http://239.255.255.250/ http://240.0.0.1/ http://255.255.255.255/
http://[::]/ http://[::1]/ http://[0:0:0:0:0:0:0:1]/ http://[::ffff:127.0.0.1]/ http://[::ffff:7f00:1]/
http://[::ffff:169.254.169.254]/ http://[::127.0.0.1]/ http://[64:ff9b::7f00:1]/ http://[64:ff9b::10.0.0.1]/
http://[64:ff9b:1::7f00:1]/ http://[2002:7f00:1::]/ http://[2002:c0a8:101::1]/ http://[2001:0:4136:e378::1]/
http://[2001:db8::1]/ http://[3fff::1]/ http://[fe80::1]/ http://[fe80::1%25eth0]/ http://[fc00::1]/
http://[fd00:ec2::254]/ http://[fec0::1]/ http://[ff02::1]/ http://[ff0e::1]/ http://[100::1]/ http://[5f00::1]/
http://\uff11\uff12\uff17.0.0.1/ http://\u2460\u2461\u2466.0.0.1/ http://127\u30020\u30020\u30021/ http://127%2e0%2e0%2e1/
http://user@1.1.1.1/ http://user:pass@1.1.1.1/ http://@1.1.1.1/ http://1.1.1.1@127.0.0.1/ http://127.0.0.1#@1.1.1.1/
http://127.0.0.1\\@1.1.1.1/ http://1.1.1.1\\@127.0.0.1/ http://1.1.1.1:22/ http://1.1.1.1:6379/
http://1.1.1.1:0/ http://1.1.1.1:99999/ http://1.1.1.1:-1/ https://1.1.1.1:8443/ file:///etc/passwd file://localhost/x
ftp://1.1.1.1/ gopher://1.1.1.1:80/_ data:text/html,hi javascript:alert(1) dict://1.1.1.1/ jar:http://1.1.1.1!/
http: http:// http:/1.1.1.1/ http:1.1.1.1 //1.1.1.1/ 1.1.1.1 example /etc/passwd https:///x http://[::1 http://[]/
http://.../ http://a..b/ http://nosuch.invalid/ https://nosuch.invalid/ http://xn--/ http://[1.1.1.1]/ http://1.1.1.1:80:80/
"""
ALLOWED = """
http://1.1.1.1/ https://1.1.1.1/ http://8.8.8.8:80/a?b=c#d https://93.184.216.34:443/ http://172.32.0.1/ http://11.0.0.1/
http://100.128.0.1/ http://[2606:4700:4700::1111]/ https://[2a00:1450:4001:82a::200e]/x http://[::ffff:8.8.8.8]/
http://[64:ff9b::8.8.8.8]/ http://134744072/ http://192.0.1.1/ http://223.255.255.255/
"""


WITH_SPACES = [
    "",
    " http://1.1.1.1/",
    "http://1.1.1.1/ ",
    "http://1.1.1.1/\n",
    "http://1.1.1.1\t.example/",
    "http://1.1.1.1/\r\nHost: x",
    "h\0ttp://a/",
]


@pytest.mark.parametrize("url", REFUSED.split() + WITH_SPACES)
def test_addresses_that_are_refused(url):
    with pytest.raises(BlockedURL) as failure:
        check_url(url)
    assert failure.value.kind in ("refused_address", "dns") and failure.value.words.endswith(".")


@pytest.mark.parametrize("url", ALLOWED.split())
def test_public_addresses_pass(url):
    addresses = check_url(url)[1]
    assert len(addresses) == 1 and is_public(addresses[0])


@settings(deadline=None)
@given(st.ip_addresses(v=4))
def test_ipv4_inside_ipv6_is_judged_as_ipv4(ip):
    public = is_public(str(ip))
    assert public <= ip.is_global and not (public and (ip.is_multicast or ip.is_private))
    number = int(ip)
    for inside in (f"::ffff:{ip}", str(ipaddress.IPv6Address((0x64FF9B << 96) + number))):
        assert is_public(inside) == public
    assert is_public(str(ipaddress.IPv6Address((0x2002 << 112) + (number << 80)))) == public


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch):
    def answer(*addresses):
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    answer("93.184.216.34", "1.1.1.1")
    assert check_url("http://name.example/")[1] == ["93.184.216.34", "1.1.1.1"]
    answer("93.184.216.34", "127.0.0.1")
    with pytest.raises(BlockedURL):
        check_url("http://name.example/")


def test_a_name_that_answers_differently_the_second_time_is_still_dialled_where_it_was_checked(open_web, monkeypatch):
    asked = []

    def rebinding(host, *_, **__):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1" if len(asked) == 1 else "127.0.0.9", 0))]

    with Server({"/": (200, {}, b"the checked one")}) as server:
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda host, *a, **k: rebinding(host) if "example" in host else real(host, *a, **k)
        )
        body, _ = open_web().fetch(f"http://name.example:{server.http.server_port}/", Counter(), time.monotonic() + 2)
        assert body == b"the checked one" and asked == ["name.example"]
        assert server.sent[0][1]["Host"] == f"name.example:{server.http.server_port}"


def test_the_next_address_of_a_name_is_tried_when_the_first_refuses(open_web, monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.0.9", "127.0.0.1")]
    with Server({"/": (200, {}, b"here")}) as server:
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda host, *a, **k: found if "example" in host else real(host, *a, **k)
        )
        url = f"http://name.example:{server.http.server_port}/"
        assert open_web(max_retries=1).fetch(url, Counter(), time.monotonic() + 3)[0] == b"here"


real = socket.getaddrinfo


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.2/",
        "http://localhost/",
        "http://169.254.169.254/",
        "http://[::1]/",
        "http://10.0.0.1/",
        "//127.0.0.3/",
    ],
)
def test_every_redirect_is_checked_again(open_web, monkeypatch, target):
    """The rule is lifted for 127.0.0.1 alone, which plays the public site that redirects."""
    with Server({"/": (302, {"Location": target}, b"")}) as server:
        monkeypatch.setattr(
            web_module, "check_url", lambda url, private, seconds: check_url(url, url.startswith(server.url), seconds)
        )
        assert failure_of(open_web(allow_private_hosts=False), server.url + "/")[0] == "refused_address"


def test_private_addresses_are_refused_without_allow_private_hosts_and_proxies_do_not_help(
    open_web, server, monkeypatch
):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, server.url)
    before = sum(server.requests.values())
    web = open_web(allow_private_hosts=False)
    assert failure_of(web, server.url + "/page")[0] == "refused_address"
    assert failure_of(web, "http://nosuch.invalid/")[0] == "dns"
    assert sum(server.requests.values()) == before


# --- faults

FAULTS = [
    ("silence", "timeout"), ("drip_head", "timeout"), ("drip_body", "timeout"), ("drip_chunks", "timeout"),
    ("endless_head", "connection"), ("reset_in_body", "connection"), ("short_body", "connection"),
    ("bad_chunk", "connection"), ("no_http", "connection"), ("nothing", "connection"), ("bad_gzip", "connection"),
    ("bomb", "too_large"), ("bomb_of_bombs", "too_large"), ("ten_megabytes", "too_large"), ("no_end", "too_large"),
    ("circle", "redirects"), ("to_file", "refused_address"), ("to_user", "refused_address"),
    ("to_nowhere", "redirects"), ("to_nonsense", "refused_address"), ("picture", "content_type"),
    ("video", "content_type"), ("missing", "http_404"), ("forbidden", "unauthorized"), ("broken", "http_500"),
    ("busy", "rate_limited"),
]  # fmt: skip


@pytest.fixture(scope="module")
def one_web(tmp_path_factory):
    web = Web(CONFIG, tmp_path_factory.mktemp("faults") / "cassette.sqlite")
    yield web
    web.close()


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
def test_faults_become_words_before_the_deadline(one_web, server, fault, kind):
    limit = 1.0 if kind == "timeout" else 10.0  # a busy machine needs its time for ten megabytes
    got, words, seconds = failure_of(one_web, f"{server.url}/fault/{fault}", seconds=limit)
    assert got == kind and words.endswith(".") and words[0].isupper()
    assert seconds < limit + 0.3


def test_a_silence_ends_before_the_deadline(open_web, server):
    kind, _, seconds = failure_of(open_web(read_timeout=0.3), server.url + "/fault/silence", seconds=9)
    assert kind == "timeout" and seconds < 5


def test_server_down_and_tls_errors(open_web, server):
    web = open_web()
    assert failure_of(web, "http://127.0.0.1:9/")[0] == "connection"
    assert failure_of(web, server.url.replace("http:", "https:") + "/page")[0] == "tls"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_url = f"https://127.0.0.1:{silent.getsockname()[1]}/"
        kind, _, seconds = failure_of(open_web("b", connect_timeout=9.0), silent_url, seconds=0.9)
        assert kind == "timeout" and seconds < 1.3


def test_a_redirect_is_read_as_browsers_read_it(open_web):
    for sent, asked in (("/ü".encode().decode("latin-1"), "/%C3%BC"), ("/a b", "/a%20b")):
        with Server({"/here": (302, {"Location": sent}, b"")}) as server:
            server.pages[asked] = (200, {}, b"there")
            open_web().fetch(server.url + "/here", Counter(), time.monotonic() + 5)
            assert [path for path, *_ in server.sent] == ["/here", asked]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_certificates_are_checked_for_the_name_and_not_for_the_dialled_address(open_web, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=name.example -keyout {key} -out {certificate}"
    )
    subprocess.run([*command.split(), "-addext", "subjectAltName=DNS:name.example"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    local = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: local if "example" in host else real(host, *a, **k)
    )
    with Server({"/": (200, {}, b"secret")}, ssl_context=context) as server:
        port = server.http.server_port
        assert failure_of(open_web("a"), f"https://name.example:{port}/")[0] == "tls"  # nobody vouches for it
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        web = open_web("b")
        assert web.fetch(f"https://name.example:{port}/", Counter(), time.monotonic() + 2)[0] == b"secret"
        assert failure_of(web, f"https://other.example:{port}/")[0] == "tls"


def test_a_failed_exchange_gives_its_place_in_the_pool_back(open_web, server):
    web = open_web(connections_per_host=1)
    for fault in ("ten_megabytes", "picture", "drip_body", "reset_in_body", "silence", "missing", "circle"):
        failure_of(web, f"{server.url}/fault/{fault}", seconds=0.6)
        assert web.fetch(server.url + "/page", Counter(), time.monotonic() + 9)[0] == b"<p>hello"


def test_names_that_nobody_waits_for_any_more_do_not_hold_up_the_others(monkeypatch):
    asked, found, over = [], [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("1.1.1.1", 0))], threading.Event()

    def slow(host, *_, **__):
        asked.append(host)
        if host.startswith("slow"):
            over.wait(60)
        return found

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with ThreadPoolExecutor(64) as threads:
        for future in [threads.submit(check_url, f"http://slow{i}.example/", seconds=0.1) for i in range(64)]:
            with pytest.raises(BlockedURL, match="dns"):
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
        list(threads.map(lambda _: web.fetch(server.url, Counter(), time.monotonic() + 5), range(24)))
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
        return (200, {}, b"ok") if number > 1 else (429, {"Retry-After": "3"}, b"")

    with Server({"/": limited}) as server:
        open_web(max_retries=4).fetch(server.url + "/", Counter(), time.monotonic() + 30)
        assert len(times) == 2 and times[1] - times[0] >= 2.9  # a pause of our own is 0.75 s at most
        kind, _, seconds = failure_of(open_web("b", max_retries=4), server.url + "/fault/busy", seconds=30)
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
    kinds = {"/html": "bad_reply", "/cut": "bad_reply", "/deep": "bad_reply", "/key": "unauthorized", "/poor": "quota",
             "/pay": "quota", "/moved": "http_302"}  # fmt: skip
    with Server(pages) as server:
        web = open_web(allow_private_hosts=False)
        reply = web.fetch_json(server.url + "/ok", {"X-Key": "k"}, {"q": "ü"}, Counter(), time.monotonic() + 2)
        assert reply == {"a": 1}
        _, headers, body = server.sent[0]
        assert headers["X-Key"] == "k" and json.loads(body) == {"q": "ü"}
        for path, kind in kinds.items():
            with pytest.raises(WebFailure) as failure:
                web.fetch_json(server.url + path, {}, None, Counter(), time.monotonic() + 2)
            assert failure.value.kind == kind, path


# --- cassette


def ask(web, request, produce, counts=None, seconds=5.0):
    return web.cached("test", request, produce, Counter() if counts is None else counts, time.monotonic() + seconds)


def never():
    raise AssertionError("this was to come from the cassette")


def fail():
    raise WebFailure("http_404", "Not there.")


def test_identical_requests_at_the_same_time_are_one(open_web):
    web, counts, made = open_web(), Counter(), []

    def slow():
        made.append(1)
        time.sleep(0.2)
        return "reply"

    with ThreadPoolExecutor(16) as threads:
        replies = list(threads.map(lambda _: ask(web, {"q": 1}, slow, counts), range(16)))
    assert replies == ["reply"] * 16 and len(made) == 1 and counts["cache_hits"] == 15


def test_waiting_for_an_identical_request_has_a_deadline_and_a_crash_frees_the_others(open_web):
    web = open_web()
    first = threading.Thread(target=ask, args=(web, 1, lambda: time.sleep(0.5) or "late"))
    first.start()
    time.sleep(0.1)
    with pytest.raises(WebFailure, match="timeout"):
        ask(web, 1, never, seconds=0.2)
    first.join()
    assert ask(web, 1, never) == "late"
    with pytest.raises(ZeroDivisionError):
        ask(web, 2, lambda: 1 / 0)
    assert ask(web, 2, lambda: "fine") == "fine"


def test_modes_live_record_replay(open_web, monkeypatch):
    live = open_web(search_ttl=1000.0)
    assert ask(live, "a", lambda: {"x": "ä\ud800"}) == {"x": "ä\ud800"}
    with pytest.raises(WebFailure):
        ask(live, "b", fail)
    with pytest.raises(WebFailure, match="Not there"):
        ask(live, "b", never)  # a failure is remembered for a short time
    replay, record = open_web(cassette_mode="replay"), open_web(cassette_mode="record", search_ttl=1000.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 500)
    assert ask(live, "a", never) == {"x": "ä\ud800"}
    assert ask(live, "b", lambda: "back again") == "back again"
    monkeypatch.setattr(time, "time", lambda: now + 2000)
    assert ask(record, "a", never) == ask(replay, "a", never) == {"x": "ä\ud800"}
    assert ask(live, "a", lambda: "new") == "new"
    with pytest.raises(WebFailure) as failure:
        ask(replay, "c", never)
    assert failure.value.kind == "replay_miss" and "recording" in failure.value.words


def test_a_replay_repeats_failures_and_a_missing_recording_is_said_at_once(open_web):
    record = open_web(cassette_mode="record")
    with pytest.raises(WebFailure):
        ask(record, "b", fail)
    with pytest.raises(WebFailure, match="Not there"):
        ask(open_web(cassette_mode="replay"), "b", never)
    with pytest.raises(ConfigError, match="replay needs a recording"):
        open_web("elsewhere.sqlite", cassette_mode="replay")


WRITER = """
import sys, time
from collections import Counter
from deepresearcher_min.config import load_config
from deepresearcher_min.web import Web
web = Web(load_config([]), sys.argv[1])
for i in range(100_000):
    web.cached("test", [sys.argv[2], i], lambda: {"n": i, "text": "x" * 5000}, Counter(), time.monotonic() + 9)
    print(i, flush=True)
"""


def test_ranks_share_a_cassette_and_kill_minus_nine_loses_nothing_that_was_acknowledged(tmp_path):
    path = tmp_path / "cassette.sqlite"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, path, name], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    for writer in writers:
        for _ in range(200):
            writer.stdout.readline()
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
    acknowledged = [200 + len(writer.communicate()[0].splitlines()) for writer in writers]
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    web = Web(replace(CONFIG, cassette_mode="replay"), path)
    for name, number in zip("ab", acknowledged, strict=True):
        for i in range(number - 1):
            assert ask(web, [name, i], never)["n"] == i
    web.close()

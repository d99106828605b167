"""What requests would do of itself, and must not: ~/.netrc, proxies, cookies."""

import time
from collections import Counter

import pytest
from loopback import Server, lead_to

pytestmark = pytest.mark.quick


def fetch(web, url, **options):
    return web.fetch(url, Counter(), time.monotonic() + 5, **options)[0]


@pytest.mark.parametrize("own", [False, True])
def test_netrc_and_proxies_of_the_environment_change_nothing(open_web, tmp_path, monkeypatch, own):
    netrc = tmp_path / ".netrc"
    netrc.write_text("default login someone password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    pages = {"/": (302, {"Location": "/there"}, b""), "/there": (200, {}, b"here")}
    with Server(pages) as server:
        headers = {"Authorization": "Bearer key"}
        assert fetch(open_web(), server.url + "/there", own=own, headers=headers) == b"here"
        assert fetch(open_web(), server.url + "/") == b"here"
        sent = [headers.get("Authorization") for _, headers, _ in server.sent]
    assert sent == ["Bearer key", None, None]


def test_no_cookie_is_sent_back(open_web):
    set_it = {"Set-Cookie": "who=me; Path=/"}
    pages = {"/": (302, {"Location": "/there", **set_it}, b""), "/there": (200, set_it, b"{}")}
    with Server(pages) as server:
        web = open_web()
        for _ in range(2):
            fetch(web, server.url + "/")
            web.fetch_json(server.url + "/there", {}, {"q": 1}, Counter(), time.monotonic() + 5)
        assert len(server.sent) == 6
        assert not [headers for _, headers, _ in server.sent if "Cookie" in headers]
        assert not web.session.cookies


def test_what_is_ours_is_sent_and_nothing_of_a_page_reaches_another_host(open_web, monkeypatch):
    lead_to(monkeypatch, "127.0.0.1")
    with Server() as server:
        port = server.http.server_port
        server.pages["/"] = (302, {"Location": f"http://other.example:{port}/there"}, b"")
        server.pages["/there"] = (200, {}, b"here")
        assert fetch(open_web(), f"http://one.example:{port}/") == b"here"
        (_, first, _), (_, second, _) = server.sent
    assert [first["Host"], second["Host"]] == [f"one.example:{port}", f"other.example:{port}"]
    for headers in (first, second):
        assert headers["User-Agent"].startswith("Mozilla/5.0 (compatible; deepresearcher-min")
        assert headers["Accept-Encoding"] == "gzip, deflate"
        assert "Authorization" not in headers and "Referer" not in headers

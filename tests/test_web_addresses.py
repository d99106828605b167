"""web.check_url and what follows: hostile addresses, names that change, redirects, proxies."""

import ipaddress
import random
import socket
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import Server, failure_of, lead_to

from deepresearcher_min import web as web_module
from deepresearcher_min.web import WebFailure, check_url, is_public

pytestmark = pytest.mark.quick

REFUSED = """
http://127.0.0.1/ http://127.0.0.1:80/ http://127.1/ http://127.255.255.254/ http://0/
http://0.0.0.0/ http://2130706433/ http://0x7f000001/ http://0x7f.0.0.1/ http://0177.0.0.1/
http://017700000001/ http://127.0.0.1./ http://localhost/ http://LOCALHOST/ http://localhost./
http://10.0.0.1/ http://10.255.255.255/ http://172.16.0.1/ http://172.31.9.9/ http://192.168.0.1/
http://192.168.1.254/ http://169.254.169.254/latest/meta-data/ http://169.254.0.1/
http://2852039166/latest/ http://0xa9fea9fe/ http://100.64.0.1/ http://100.100.100.200/
http://100.127.255.255/ http://168.63.129.16/ http://192.0.0.192/ http://192.0.0.8/
http://192.0.2.5/ http://198.51.100.7/ http://203.0.113.9/ http://198.18.0.1/ http://192.88.99.1/
http://224.0.0.1/ http://239.255.255.250/ http://240.0.0.1/ http://255.255.255.255/ http://[::]/
http://[::1]/ http://[0:0:0:0:0:0:0:1]/ http://[::ffff:127.0.0.1]/ http://[::ffff:7f00:1]/
http://[::ffff:169.254.169.254]/ http://[::127.0.0.1]/ http://[64:ff9b::7f00:1]/
http://[64:ff9b::10.0.0.1]/ http://[64:ff9b:1::7f00:1]/ http://[2002:7f00:1::]/
http://[2002:c0a8:101::1]/ http://[2001:0:4136:e378::1]/ http://[2001:db8::1]/ http://[3fff::1]/
http://[fe80::1]/ http://[fe80::1%25eth0]/ http://[fc00::1]/ http://[fd00:ec2::254]/
http://[fec0::1]/ http://[ff02::1]/ http://[ff0e::1]/ http://[100::1]/ http://[5f00::1]/
http://\uff11\uff12\uff17.0.0.1/ http://\u2460\u2461\u2466.0.0.1/ http://127\u30020\u30020\u30021/
http://127%2e0%2e0%2e1/ http://user@1.1.1.1/ http://user:pass@1.1.1.1/ http://@1.1.1.1/
http://1.1.1.1@127.0.0.1/ http://127.0.0.1#@1.1.1.1/ http://127.0.0.1\\@1.1.1.1/
http://1.1.1.1\\@127.0.0.1/ http://1.1.1.1:22/ http://1.1.1.1:6379/ http://1.1.1.1:0/
http://1.1.1.1:99999/ http://1.1.1.1:-1/ https://1.1.1.1:8443/ file:///etc/passwd file://localhost/x
ftp://1.1.1.1/ gopher://1.1.1.1:80/_ data:text/html,hi javascript:alert(1) dict://1.1.1.1/
jar:http://1.1.1.1!/ http: http:// http:/1.1.1.1/ http:1.1.1.1 //1.1.1.1/ 1.1.1.1 example
/etc/passwd https:///x http://[::1 http://[]/ http://.../ http://a..b/ http://nosuch.invalid/
https://nosuch.invalid/ http://xn--/ http://[1.1.1.1]/ http://1.1.1.1:80:80/
"""
ALLOWED = """
http://1.1.1.1/ https://1.1.1.1/ http://8.8.8.8:80/a?b=c#d https://93.184.216.34:443/
http://172.32.0.1/ http://11.0.0.1/ http://100.128.0.1/ http://[2606:4700:4700::1111]/
https://[2a00:1450:4001:82a::200e]/x http://[::ffff:8.8.8.8]/ http://[64:ff9b::8.8.8.8]/
http://134744072/ http://192.0.1.1/ http://223.255.255.255/
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
    with pytest.raises(WebFailure) as failure:
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
    lead_to(monkeypatch, "93.184.216.34", "1.1.1.1")
    assert check_url("http://name.example/")[1] == ["93.184.216.34", "1.1.1.1"]
    lead_to(monkeypatch, "93.184.216.34", "127.0.0.1")
    with pytest.raises(WebFailure):
        check_url("http://name.example/")


def test_a_name_that_answers_differently_the_second_time_is_still_dialled_where_it_was_checked(
    open_web, monkeypatch
):
    asked, real = [], socket.getaddrinfo

    def rebinding(host, *_, **__):
        asked.append(host)
        return [
            (
                socket.AF_INET,
                socket.SOCK_STREAM,
                6,
                "",
                ("127.0.0.1" if len(asked) == 1 else "127.0.0.9", 0),
            )
        ]

    with Server({"/": (200, {}, b"the checked one")}) as server:
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda host, *a, **k: rebinding(host) if "example" in host else real(host, *a, **k),
        )
        body, _ = open_web().fetch(
            f"http://name.example:{server.http.server_port}/", Counter(), time.monotonic() + 2
        )
        assert body == b"the checked one" and asked == ["name.example"]
        assert server.sent[0][1]["Host"] == f"name.example:{server.http.server_port}"


def test_the_next_address_of_a_name_is_tried_when_the_first_refuses(open_web, monkeypatch):
    lead_to(monkeypatch, "127.0.0.9", "127.0.0.1")
    with Server({"/": (200, {}, b"here")}) as server:
        url, web = f"http://name.example:{server.http.server_port}/", open_web(max_retries=1)
        monkeypatch.setattr(random.SystemRandom, "uniform", lambda *_: 0.0)  # no pause
        assert web.fetch(url, Counter(), time.monotonic() + 3)[0] == b"here"


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
            web_module,
            "check_url",
            lambda url, private, seconds: check_url(url, url.startswith(server.url), seconds),
        )
        assert (
            failure_of(open_web(allow_private_hosts=False), server.url + "/")[0]
            == "refused_address"
        )


def test_private_addresses_are_refused_without_allow_private_hosts_and_proxies_do_not_help(
    open_web, monkeypatch
):
    with Server({"/page": (200, {}, b"<p>hello")}) as server:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, server.url)
        web = open_web(allow_private_hosts=False)
        assert failure_of(web, server.url + "/page")[0] == "refused_address"
        assert failure_of(web, "http://nosuch.invalid/")[0] == "dns"
        assert not server.requests

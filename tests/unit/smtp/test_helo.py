"""The name in EHLO is one that servers accept (RFC 5321 §4.1.3, §4.1.4)."""

import pytest

from outbox.mail.host_name import is_fqdn, is_literal
from outbox.smtp import helo
from outbox.smtp.helo import helo_name

HERE = ("10.0.0.5", 40000)


@pytest.mark.parametrize(
    "name", ["mail.example.com", "a.bc", "ip-10-0-0-5.ec2.internal", "xn--bcher-kva.example", "a.xn--p1ai", "1.example"]
)
def test_a_fully_qualified_domain_name_has_a_dot_and_a_top_level_domain(name):
    assert is_fqdn(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "localhost",
            "3f2a9bc41d07",
            "web_1.example.com",
            "10.0.0.5",
            "-a.example",
            "a..b",
            ".a",
            "a.b.",
            "a b.c",
        ),
        *("a b.c", "bücher.example", "a." * 127 + "ab", "a" * 64 + ".bc", "[10.0.0.5]"),
    ],
)
def test_what_servers_refuse_is_no_fully_qualified_domain_name(name):
    assert not is_fqdn(name)


@pytest.mark.parametrize("name", ["[192.0.2.1]", "[IPv6:2001:db8::1]", "[ipv6:::1]"])
def test_an_address_literal_has_brackets_and_a_tag_for_ipv6(name):
    assert is_literal(name)


@pytest.mark.parametrize("name", ["192.0.2.1", "[1.2.3]", "[2001:db8::1]", "[IPv6:192.0.2.1]", "[a]", "[]", "[1.2.3.4"])
def test_what_servers_cannot_read_is_no_address_literal(name):
    assert not is_literal(name)


@pytest.mark.parametrize(
    "host, name",
    [
        ("web1.example.com", "web1.example.com"),
        ("3f2a9bc41d07", "[10.0.0.5]"),
        ("localhost.localdomain", "[10.0.0.5]"),
        ("web1.local", "[10.0.0.5]"),
        ("web_1.example.com", "web-1.example.com"),
        ("10.0.0.5", "[10.0.0.5]"),
        ("", "[10.0.0.5]"),
    ],
)
def test_the_default_is_the_host_name_if_it_is_fully_qualified_and_else_an_address_literal(monkeypatch, host, name):
    monkeypatch.setattr(helo.socket, "gethostname", lambda: host)
    assert helo_name(None, HERE) == name
    assert is_fqdn(name) or is_literal(name)
    assert helo_name("mail.example.com", HERE) == "mail.example.com"


@pytest.mark.parametrize(
    "sockname, name",
    [
        (("2001:db8::1", 1, 0, 0), "[IPv6:2001:db8::1]"),
        (("fe80::1%eth0", 1, 0, 2), "[IPv6:fe80::1]"),
        (("::ffff:10.0.0.5", 1, 0, 0), "[10.0.0.5]"),
        ("/run/lmtp", "localhost"),
        ("", "localhost"),
        (None, "localhost"),
    ],
)
def test_the_literal_is_that_of_the_connections_own_address(monkeypatch, sockname, name):
    monkeypatch.setattr(helo.socket, "gethostname", lambda: "web1")
    assert helo_name(None, sockname) == name

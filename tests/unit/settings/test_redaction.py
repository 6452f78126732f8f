"""A login is not in what a server says, however the server spells it."""

import html
import json
import quopri
import re
import time
import urllib.parse
from base64 import b64decode, b64encode, urlsafe_b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.settings.redaction import KEPT_MAX, Redactor
from outbox.settings.urls import SmtpAddress
from outbox.smtp.replies import GarbageError, ReplyReader

LOGINS = [
    ("relay-user", "hunter2-Secret"),
    ("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"),
    ("reports@example.com", "p@ss w0rd: 100% \"sure\" & <safe> 'x'\\n"),
    ("jürgen@example.com", "Übermütig-ß-密码"),
    ("token", "token"),
]


def told_in_base64(said, user, password):
    """Return True if some base64 in the text, at any offset, holds four bytes of the login."""
    data = [user.encode(), password.encode(), f"\0{user}\0{password}".encode()]
    grams = {one[at : at + 4] for one in data for at in range(len(one) - 3)}
    squeezed = "".join(said.split()).translate(str.maketrans("-_", "+/"))
    for at in range(len(squeezed)):
        for size in (8, 12):
            piece = squeezed[at : at + size]
            if len(piece) == size and all(c.isascii() and (c.isalnum() or c in "+/") for c in piece):
                decoded = b64decode(piece)
                if any(gram in decoded for gram in grams):
                    return True
    return False


def encodings(user, password):
    for name, secret in (("user", user), ("password", password)):
        data = secret.encode()
        yield f"{name} plain", secret
        yield f"{name} in capitals", secret.upper() if len(secret.upper()) == len(secret) else secret
        yield f"{name} url", urllib.parse.quote(secret, safe="")
        yield f"{name} form", urllib.parse.quote_plus(secret)
        yield f"{name} url twice", urllib.parse.quote(urllib.parse.quote(secret, safe=""), safe="")
        yield f"{name} all percent", "".join(f"%{byte:02x}" for byte in data)
        yield f"{name} html", html.escape(secret)
        yield f"{name} json", json.dumps(secret)[1:-1]
        yield f"{name} quoted-printable", quopri.encodestring(data, quotetabs=True).decode().replace("=\n", "")
        yield f"{name} xtext", re.sub(rb"[^!-*,-<>-~]", lambda one: b"+%02X" % one[0][0], data).decode()
        yield f"{name} python", repr(data)[2:-1]
        yield f"{name} hex", data.hex()
        yield f"{name} base64", b64encode(data).decode()
        yield f"{name} base64 unpadded", b64encode(data).decode().rstrip("=")
        yield f"{name} base64url", urlsafe_b64encode(data).decode()
        for shift in range(3):
            yield f"{name} base64 behind {shift}", b64encode(b"\xf0" * shift + data + b"\xf0\xf1").decode()
    yield "PLAIN", b64encode(f"\0{user}\0{password}".encode()).decode()
    yield "PLAIN with authzid", b64encode(f"{user}\0{user}\0{password}".encode()).decode()
    yield "PLAIN in clear", f"\N{REPLACEMENT CHARACTER}{user}\N{REPLACEMENT CHARACTER}{password}"
    yield "Basic", b64encode(f"{user}:{password}".encode()).decode()
    yield "PLAIN quoted", urllib.parse.quote(b64encode(f"\0{user}\0{password}".encode()).decode(), safe="")
    yield "both", f"{user}:{password}"


CASES = [
    pytest.param(user, password, said, id=f"{number} {name}")
    for number, (user, password) in enumerate(LOGINS)
    for name, said in encodings(user, password)
]


@pytest.mark.parametrize("user, password, said", CASES)
@pytest.mark.parametrize("around", ["5.7.8 bad login {}", "5.7.8 <{}> refused", '"AUTH PLAIN {}" failed', "x={};"])
def test_a_login_is_redacted_in_every_spelling(user, password, said, around):
    redacted = Redactor(user, password)(around.replace("{}", said))
    assert "***" in redacted
    assert said not in redacted
    assert user not in redacted
    assert password not in redacted
    assert not told_in_base64(redacted, user, password)
    assert redacted.startswith(around.partition("{}")[0].rpartition(" ")[0])


@pytest.mark.parametrize("user, password", LOGINS)
def test_base64_that_is_cut_off_anywhere_is_redacted(user, password):
    redact = Redactor(user, password)
    for data in (user, password, f"\0{user}\0{password}"):
        for shift in range(3):
            whole = b64encode(b"\xf0" * shift + data.encode()).decode().rstrip("=")
            for size in range(8, len(whole)):
                assert not told_in_base64(redact(f"5.7.8 bad {whole[:size]}"), user, password)
                assert not told_in_base64(redact(f"5.7.8 bad {whole[-size:]} ..."), user, password)


@pytest.mark.parametrize("user, password", LOGINS)
def test_what_is_split_over_the_lines_of_a_reply_is_redacted(user, password):
    redact = Redactor(user, password)
    for said in (user, password, b64encode(f"\0{user}\0{password}".encode()).decode(), urllib.parse.quote(password)):
        for at in range(1, len(said)):
            for between in (" ", "\n", " 5.7.8 ", "\n5.7.8 "):
                redacted = redact(f"5.7.8 bad login {said[:at]}{between}{said[at:]} given")
                assert "".join(said.split()) not in "".join(redacted.replace("5.7.8", "").split())
                assert not told_in_base64(redacted.replace("5.7.8", ""), user, password)


def test_the_beginning_of_a_password_that_was_cut_off_is_redacted():
    assert Redactor("relay", "hunter2-Secret")("5.7.8 bad password Hunter2-Se") == "5.7.8 bad password ***"


@pytest.mark.parametrize("said", ["nter2-Secret", "unter2-Secre...", "UNTER2-SECRET", "er2-S\n5.7.8 ecret"])
def test_a_part_of_a_password_that_was_cut_off_at_its_beginning_is_redacted(said):
    redacted = Redactor("relay", "hunter2-Secret")(f"5.7.8 bad password {said}")
    assert redacted.startswith("5.7.8 bad password ***")
    assert not set("hunter2-secret") & set(redacted.lower().partition("***")[2])


@pytest.mark.parametrize("user, password", [("a", "b"), ("ab", "cd"), ("me", "x"), ("bob", "pw1")])
def test_no_login_is_too_short_to_be_redacted(user, password):
    redact = Redactor(user, password)
    for said in (
        *(b64encode(one.encode()).decode() for one in (user, password, f"\0{user}\0{password}")),
        *(b64encode(one.encode()).decode().rstrip("=") for one in (user, password, f"\0{user}\0{password}")),
    ):
        assert said not in redact(f"5.7.8 {said} is wrong")
    assert user not in redact(f"5.7.8 <{user}:{password}>")
    assert password not in redact(f"5.7.8 <{user}:{password}>")


@pytest.mark.parametrize(
    "said",
    [
        "2.0.0 Ok: queued as 4XyZ1k3Q9Vz1abc",
        "2.0.0 OK 1700000000 a1b2c3d4e5f6a7b8-c9d0e1f2a3b4c5d6si12345678abc.123 - gsmtp",
        "5.7.1 <nobody@example.org>: Recipient address rejected: Access denied",
        "4.7.0 Try again later (in reply to AUTH PLAIN command)",
        "0100018b2c3d4e5f-6a7b8c9d-0e1f-2a3b-4c5d-6e7f8a9b0c1d-000000",
        "",
    ],
)
def test_what_says_nothing_of_the_login_stays_as_it_is(said):
    for user, password in LOGINS:
        assert Redactor(user, password)(said) == said


# Neither the marks of what was redacted nor what replaces them here: a login of "*a" stands in "***" + "a".
CHARACTERS = st.characters(exclude_characters="*\0", codec="utf-8")


@given(
    st.text(CHARACTERS, max_size=60),
    st.text(CHARACTERS, min_size=1, max_size=20),
    st.text(CHARACTERS, min_size=1, max_size=20),
)
def test_any_text_can_be_redacted_and_holds_neither_of_them_then(said, user, password):
    redact = Redactor(user, password)
    for text in (said, said + user, password + said, f"{said}{user}\0{password}"):
        redacted = redact(text).replace("***", "\0\0\0")
        assert user not in redacted
        assert password not in redacted


def test_a_long_reply_is_redacted_in_good_time():
    for redact in (
        Redactor("u" * 100, "p" * 1000),
        Redactor("ü" * 50, "\\" * 50 + "密" * 50),
        Redactor("a", "%25" * 20),
    ):
        for said in ("a", "p", "cHBw", "u ", "%", "%25", "\\", "\\ü", "&amp;", "\ufffd", "=", "=3d", "+", "5.7.8 "):
            began_at = time.monotonic()
            assert len(redact(said * (65_536 // len(said)))) <= KEPT_MAX
            assert time.monotonic() - began_at < 2, said


def test_a_reader_of_replies_redacts_what_it_gives_and_what_it_cannot_read():
    address = SmtpAddress.parse("smtp://relay-user:hunter2-Secret@localhost")
    reader = ReplyReader(address.redact)
    secret = b64encode(b"\0relay-user\0hunter2-Secret")
    wire = b"550-5.7.1 you said hunter2-\r\n550-5.7.1 Secret and\r\n550 5.7.1 " + secret + b"\r\n250 fine\r\n"
    first, second = reader.feed(wire)
    assert first.text == "5.7.1 you said *** 5.7.1 *** and 5.7.1 ***"
    assert second.text == "fine"
    with pytest.raises(GarbageError, match=r"no SMTP reply: 'what is \*\*\* or x{60}\*\*\*") as raised:
        list(reader.feed(b"what is " + secret + b" or " + b"x" * 60 + b"hunter2-Secret\r\n"))
    assert "hunter" not in str(raised.value)


def test_an_address_without_a_login_redacts_nothing():
    address = SmtpAddress.parse("smtp://localhost")
    assert address.redact is None
    assert address.without_login("anything") == "anything"

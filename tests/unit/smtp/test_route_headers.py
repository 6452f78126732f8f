"""Additions of a route to every email."""

import pytest

from outbox.settings import Settings
from outbox.smtp.route_headers import RouteHeaders, prepare
from tests.unit.smtp.test_commands import said
from tests.unit.smtp.test_connection import Talk, both_ways, mail

TOKEN = "4711k1t0123456789abcdef"


def prepared(fields, claim):
    return prepare(claim.outgoing, RouteHeaders(fields))


@both_ways
def test_the_return_path_holds_the_token_and_fields_go_before_the_message_and_into_its_size(pipelining):
    headers = RouteHeaders({"X-Tag": "outbox={email_id}"}, None, "bounces+{token}@example.com")
    claim = mail(b".hello\r\n", token=TOKEN)
    field = f"X-Tag: outbox={claim.outgoing.email}\r\n".encode()
    talk = Talk(claim, pipelining=pipelining, size=True, headers=headers)
    assert said(talk, pipelining)[0] == f"MAIL FROM:<bounces+{TOKEN}@example.com> SIZE={len(field) + 8}"
    assert talk.say(*("250", "250", "354") if pipelining else ("250", "354"))[-1] == field + b"..hello\r\n"


@pytest.mark.parametrize(
    "key", ["a\r\nBcc: x@y\r\n\r\n", "ü\u2028ö", "k " * 200, "x" * 2000, "=?utf-8?q?x?=", "{email_id}"]
)
def test_a_key_in_a_field_is_always_one_field_of_ascii(key):
    lines = prepared({"X-Key": "{key}"}, mail(key=key)).head.decode("ascii").split("\r\n")
    assert lines[0].startswith("X-Key: ")
    assert lines[-1] == ""
    assert all(line.startswith(" ") and line.strip() for line in lines[1:-1])
    assert all(len(line) <= 998 for line in lines)
    if key == "{email_id}":
        assert lines[0] == "X-Key: {email_id}", "what a key holds is no placeholder"


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("order/7:ü@x", "order/7:%C3%BC@x"),
        ('a b"<c>, (d)\r\n', "a%20b%22%3Cc%3E%2C%20%28d%29%0D%0A"),
        ("x" * 900, "x" * 900),
    ],
)
def test_a_key_in_a_field_that_programs_read_is_percent_encoded(key, written):
    fields = {"Feedback-ID": "{key}:shop", "Keywords": "{key}", "References": "<{key}@a.example>"}
    made = prepared(fields, mail(key=key))
    lines = [f"Feedback-ID: {written}:shop", f"Keywords: {written}", f"References: <{written}@a.example>"]
    if "@" in written:
        lines[1] = f'Keywords: "{written}"'  # a phrase of more than atoms stands in quotes (RFC 5322 §3.2.5)
    if len(written) > 66:
        assert b"=?utf-8?q?xxx" in made.head
        lines.pop(1)
    assert set(lines) <= set(made.head.decode().split("\r\n"))
    assert made.problem is None


def test_a_key_that_no_line_can_hold_keeps_its_email_alone():
    made = prepared({"Feedback-ID": "{key}"}, mail(key="ü" * 400))
    assert made.head == b""
    assert made.problem.startswith(
        "its route's headers cannot be written: The header Feedback-ID has a part of more than"
    )


def test_a_field_that_the_message_has_is_left_to_it():
    claim = mail(b"Subject: x\r\nx-tag: mine\r\n\r\nX-Other: no field\r\n")
    assert prepared({"X-Tag": "route", "X-Other": "route"}, claim).head == b"X-Other: route\r\n"


WRITTEN = b"Auto-Submitted: auto-generated\r\nX-Auto-Response-Suppress: OOF, AutoReply\r\n"


@pytest.mark.parametrize(
    "header, fields, sent",
    [
        (WRITTEN, {"X-Tag": "t"}, b"X-Tag: t\r\n" + WRITTEN),
        (
            WRITTEN,
            {"X-Auto-Response-Suppress": "None", "auto-submitted": "no"},
            b"X-Auto-Response-Suppress: None\r\nauto-submitted: no\r\n",
        ),
        (
            b"X-Auto-Response-Suppress: All\r\n",
            {"x-auto-response-suppress": "OOF"},
            b"x-auto-response-suppress: OOF\r\n",
        ),
        (b"Auto-Submitted: auto-notified\r\n", {"Auto-Submitted": "no"}, b"Auto-Submitted: auto-notified\r\n"),
        (b"X-A: b\r\n", {"Reply-To": "help@example.com"}, b"Reply-To: help@example.com\r\nX-A: b\r\n"),
        (b"Reply-To: a@b.example\r\n", {"Reply-To": "help@example.com"}, b"Reply-To: a@b.example\r\n"),
    ],
    ids=["others", "defaults", "former default", "chosen", "Reply-To", "Reply-To chosen"],
)
def test_a_route_replaces_the_default_fields_and_no_field_that_an_application_chose(header, fields, sent):
    begin, end = b"From: a@example.com\r\n", b"Subject: x\r\n\r\nAuto-Submitted: auto-generated\r\n"
    made = prepared(fields, mail(begin + header + end))
    whole = made.head + made.message
    assert sorted(whole.split(b"\r\n")) == sorted((sent + begin + end).split(b"\r\n"))
    assert whole.endswith(end)
    assert made.wire_bytes == len(made.message)


def test_a_route_without_such_settings_adds_nothing():
    assert RouteHeaders.of(Settings()) is None

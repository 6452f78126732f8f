"""What bounces of several mail systems say, and that nothing that comes in can do more than not be read."""

import random
import subprocess
import sys
from base64 import encodebytes as b64encode
from binascii import b2a_qp
from contextlib import suppress

import pytest

from outbox.feedback.dsn import parse_bounce
from outbox.feedback.notice import Kind
from tests.support.bounce_samples import (
    ARF,
    DSN,
    EXCHANGE,
    EXIM,
    HEADER,
    ID,
    QMAIL,
    in_part,
    plain,
    postfix,
    verdict,
)


def report(fields):
    return (
        b"Content-Type: multipart/report; boundary=B\n\n--B\nContent-Type: message/delivery-status\n\n"
        + fields
        + b"\n--B--\n"
    )


HOSTILE = {
    "one long word": lambda: b"X-Failed-Recipients: " + b"a" * 2_000_000 + b"\r\n\r\nx\r\n",
    "one long word in many fields": lambda: b"X-Failed-Recipients: a@" * 90_000 + b"\n\nx",
    "empty lines": lambda: b"X-Failed-Recipients: a@example.com\r\n\r\n" + b"\n" * 2_000_000 + b"x",
    "no address": lambda: b"\r\nHi. This is the qmail-send\n<" + b"a" * 2_000_000 + b">:\n",
    "addresses": lambda: b"\r\nHi. This is the qmail-send\n" + b"<a@b>:\n" * 250_000,
    "white space": lambda: b"\r\n" + b" " * 2_000_000 + b"Hi. This is the",
    "statuses": lambda: b"\r\nHi. This is the qmail-send\n" + b"5.1.1 " * 300_000,
    "semicolons": lambda: b"Content-Type: multipart/report" + b";" * 40_000 + b"\n\nx",
    "semicolons in quotes": lambda: b'Content-Type: multipart/report; a="' + b";" * 40_000 + b"\n\nx",
    "quotes": lambda: b"Content-Type: multipart/report" + b';"' * 40_000 + b"\n\nx",
    "semicolons in a status": lambda: report(b"Action: failed\nFinal-Recipient: " + b";" * 200_000),
    "parentheses": lambda: b"Content-Type: multipart/report " + b"(" * 200_000 + b"\n\nx",
    "400 multiparts": lambda: nested(400),
    "400 multiparts over lines": lambda: nested(400) + b"x\n" * 900_000,
    "20,000 multiparts": lambda: nested(20_000),
    "blank lines in a report": lambda: report(b"\n" * 2_000_000),
    "blank lines of blanks in a report": lambda: report(b" \r\n" * 700_000),
    "groups in a report": lambda: report(b"Action: failed\n\n" * 120_000),
    "complaints": lambda: report(b"Feedback-Type: abuse\n\n" * 80_000).replace(b"delivery-status", b"feedback-report"),
    "Message-IDs": lambda: b"References: " + b"<a@b> " * 330_000 + b"\n\nx",
    "openings of Message-IDs": lambda: b"References: " + b"<" * 2_000_000 + b"\n\nx",
    "tokens": lambda: b"To: " + b"1k1t0123456789abcdef@x " * 90_000 + b"\n\nx",
    "returned messages": lambda: report(b"--B\nContent-Type: message/rfc822\n\n" * 50_000),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_no_message_holds_up_those_behind_it(name, tmp_path):
    path = tmp_path / "bounce"
    path.write_bytes(HOSTILE[name]())
    # In a process of its own, since nothing interrupts an expression that goes back and back: a second of the
    # processor and 100 MB beside what Python itself takes.
    code = (
        "import resource, sys, time; from outbox.feedback.dsn import parse_bounce\n"
        "raw = open(sys.argv[1], 'rb').read();"
        "limit = int(open('/proc/self/statm').read().split()[0]) * 4096 + 100_000_000;"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit)); began = time.process_time()\n"
        "try: parse_bounce(raw)\n"
        "except ValueError: pass\n"
        "took = time.process_time() - began; assert took < 1, took"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)


@pytest.mark.parametrize(
    "raw, kind, status, says",
    [
        (postfix(returned=HEADER), Kind.HARD, "5.1.1", "Recipient address rejected"),
        (plain(EXIM), Kind.HARD, "5.1.1", "no such user here"),
        (plain(QMAIL), Kind.HARD, "5.1.1", "no mailbox here"),
        (plain(EXCHANGE), Kind.HARD, "5.1.10", "Recipient not found by SMTP address lookup"),
        (plain(ARF, about="abuse"), Kind.COMPLAINED, None, "abuse (SomeGenerator/1.0)"),
    ],
    ids=["Postfix", "Exim", "qmail", "Exchange", "ARF"],
)
def test_each_mail_system_says_what_failed_and_returns_the_message_id(raw, kind, status, says):
    for said in (raw, raw.replace(b"\n", b"\r\n")):
        found = parse_bounce(said)
        (notice,) = found.notices
        assert (notice.kind, notice.status) == (kind, status)
        assert says in notice.reason
        assert "bo@example.com" in notice.addresses
        assert ID in found.message_ids


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"Subject: I am on holiday\nAuto-Submitted: auto-replied\n\nBack on Monday. 550 5.1.1\n",
        postfix(action="delivered", status="2.1.5"),
        postfix(action="relayed", status="2.0.0"),
        plain(ARF, about="not-spam"),
    ],
    ids=["nothing", "holiday", "delivered", "relayed", "not spam"],
)
def test_what_reports_no_failure_is_no_bounce(raw):
    assert parse_bounce(raw) is None


@pytest.mark.parametrize(
    "fields",
    [
        b"Action: failed\nStatus: 5.1.1\nStatus: 5.7.1\n",
        b"Action: failed\nStatus: 5.1.1 (5.7.1)\n",
        b"Action: failed\nAction: delayed\nStatus: 5.1.1\n",
        b"Action: failed\nStatus: 5.1.1\nX-Supplementary-Info: <mx.example.org #5.7.1 smtp;550 5.7.1 blocked>\n",
    ],
)
def test_of_a_field_that_is_there_twice_the_milder_counts(fields):
    assert verdict(in_part(DSN, b"Final-Recipient: rfc822; bo@example.com\n" + fields)) == Kind.SOFT


FIELDS = (
    b"Reporting-MTA: dns; mx.example.net\n\nFinal-Recipient: rfc822; bo@example.com\nAction: failed\nStatus: 5.1.1\n"
    b"Diagnostic-Code: smtp; 550 5.1.1 no such user\n"
)


@pytest.mark.parametrize(
    "raw",
    [
        in_part(DSN, FIELDS.replace(b":", b" :")),
        in_part(DSN, FIELDS.replace(b": ", b":").replace(b"rfc822;", b"rfc/822;")),
        in_part(DSN, FIELDS.replace(b"rfc822; ", b"")),
        in_part(DSN, b64encode(FIELDS), encoding="base64"),
        in_part(DSN, b64encode(FIELDS.replace(b"\n", b"\r\n")), encoding="BASE64"),
        in_part(DSN, b2a_qp(FIELDS.replace(b"failed", b"=66ailed").replace(b"=66", b"f")), encoding="quoted-printable"),
        in_part(DSN, FIELDS.replace(b":", b"=3A").replace(b"bo@", b"bo=40"), encoding="quoted-printable"),
        in_part(DSN, FIELDS.replace(b"Action", b"Diagnostic-Code: smtp; 550\n5.1.1 <bo@example.com>:\nno\nAction")),
        in_part(DSN, FIELDS.replace(b"Action", b"Diagnostic-Code: smtp; 550 5.1.1\n\nno such user\n\nAction")),
        in_part(DSN, FIELDS.replace(b"smtp; ", b"smtp;\n\t")),
        in_part(DSN, FIELDS.replace(b"Status", b"\nStatus")),
        in_part(DSN, b" " + FIELDS.replace(b"\n", b"\n ")),
        in_part("message/delivery_status", FIELDS),
        in_part("message/delivery-status-notification", FIELDS),
        in_part(DSN, FIELDS.replace(b"no such", b"no\n  such")),
        *(in_part(DSN, FIELDS.replace(b"failed", word)) for word in (
            b"failure", b"Failed", b"FAILED", b"undeliverable", b"failed (bad address)", b"fail", b"bounced", b"")),
        in_part(DSN, FIELDS.replace(b"Action: failed\n", b"")),
        in_part(DSN, FIELDS.replace(b"5.1.1\n", b"5.1.1 (bad destination mailbox address)\n", 1)),
        in_part(DSN, FIELDS.replace(b"net\n\nFinal", b"net\nFinal")),
        in_part(DSN, b"\n\n\n" + FIELDS.replace(b"\n\n", b"\n \n\t\n\n")),
        in_part(DSN, FIELDS).replace(b"delivery-status\n\n", b"delivery-status\n"),
        in_part(DSN, FIELDS.replace(b"\n\n", b"\n")).replace(b"delivery-status\n\n", b"delivery-status\n"),
        in_part(DSN, FIELDS.replace(b"Status: 5.1.1\n", b"").replace(b"failed", b"failure")),
        in_part(DSN, FIELDS + b"\n--B\nContent-Type: text/plain\n\nspam").replace(b'"B"', b'"lost"'),
        in_part(DSN, FIELDS).replace(b"\n", b"\r"),
        in_part(DSN, FIELDS).replace(b"\n", b"\r\n", 9),
        in_part(DSN, FIELDS.replace(b"\n", b"\r")),
        in_part(DSN, FIELDS.replace(b"\n", b"\r\r\n").replace(b"\r\r\n\r\r\n", b"\n\r\r\n")),
        in_part(f"{DSN}; charset=x-nonsense", FIELDS + b"X-Note: \xff\xfe\n"),
        in_part("Message/Delivery-Status", FIELDS.replace(b"Status", b"STATUS").replace(b"Action", b"action")),
        in_part("text/delivery-status", FIELDS),
        in_part("message/global-delivery-status", FIELDS.replace(b"rfc822", b"utf-8")),
        in_part("message/global-delivery-status", b64encode(FIELDS), encoding="base64"),
        in_part(DSN, FIELDS, outer="multipart/report"),
        in_part(DSN, FIELDS, outer="multipart/mixed"),
        in_part("text/plain", b"It failed.\n\n" + FIELDS),
        in_part("text/plain", b"It failed.\n\n" + FIELDS, outer="multipart/mixed"),
        in_part("message/rfc822", in_part(DSN, FIELDS), outer="multipart/mixed").replace(b'"B"', b'"C"', 1)
        .replace(b"--B\n", b"--C\n", 1)[:-6] + b"--C--\n",
        b"\n" + in_part(DSN, FIELDS),
        b"From MAILER-DAEMON Mon Nov 30 10:00:00 2026\n" + in_part(DSN, FIELDS),
    ],
)  # fmt: skip
def test_a_report_is_read_however_it_is_written(raw):
    assert verdict(raw) == Kind.HARD


@pytest.mark.parametrize(
    "kind",
    ["message/rfc822", "text/rfc822-headers", "text/rfc822-header", "message/rfc822-headers", "message/global",
     "message/global-headers", "Text/RFC822-Headers", "message/rfc822; charset=utf-8"],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["", "base64", "quoted-printable", "8bit"])
def test_the_message_id_of_what_is_returned_is_found_however_it_is_carried(kind, encoding):
    header = HEADER.encode() + b"\n\nHello\n"
    header = {"base64": b64encode(header), "quoted-printable": header.replace(b"@", b"=40")}.get(encoding, header)
    part = f"\n--B\nContent-Type: {kind}\nContent-Transfer-Encoding: {encoding or '7bit'}\n\n".encode() + header
    found = parse_bounce(in_part(DSN, FIELDS + part))
    assert ID in found.message_ids


def test_a_bounce_is_the_same_however_it_is_carried_and_another_is_another():
    assert parse_bounce(b"Delivered-To: x@y\n" + postfix()).identity == parse_bounce(postfix()).identity
    assert parse_bounce(postfix(number=2)).identity != parse_bounce(postfix()).identity
    assert parse_bounce(plain(QMAIL)).identity != parse_bounce(plain(QMAIL) + b"x").identity


def read_or_not(raw):
    with suppress(ValueError):  # which says that it cannot be read; anything else would end the command
        return parse_bounce(raw)


def nested(depth):
    head = b"".join(b'Content-Type: multipart/mixed; boundary="b%d"\n\n--b%d\n' % (n, n) for n in range(depth))
    return head + b"Content-Type: message/delivery-status\n\nAction: failed\n"


@pytest.mark.parametrize(
    "raw",
    [
        nested(5000),
        b"Content-Type: message/rfc822\n\n" * 5000,
        b"Content-Type: multipart/report; boundary=b\n\n" + b"--b\n\n" * 50_000,
        b"Content-Type: multipart/report; report-type=delivery-status\n\n--\n",
        b"\x00" * 100_000,
        b"X: " + b"\xff" * 3_000_000,
        b"Content-Type: message/delivery-status\nContent-Transfer-Encoding: base64\n\n!!!!\n",
        b"Content-Type: message/delivery-status; charset=\xff\nContent-Transfer-Encoding: x\n\nAction\n\n:\n",
        postfix(status="5.1.1\xff" * 500, diagnostic="\udcff;".encode("utf-8", "surrogateescape").decode("latin1")),
    ],
)
def test_hostile_input_is_read_or_said_to_be_unreadable(raw):
    found = read_or_not(raw)
    assert found is None or found.notices


def test_whatever_is_broken_in_a_bounce_it_is_read_or_said_to_be_unreadable():
    chance = random.Random(3464)
    samples = [postfix(token="7-0123456789ab", returned=HEADER), *map(plain, (EXIM, QMAIL, EXCHANGE))]
    for _ in range(800):
        raw = bytearray(chance.choice(samples))
        for _ in range(chance.randint(1, 12)):
            at = chance.randrange(len(raw))
            piece = chance.choice(
                (b"", b"\n", b"\r\n--B\n", b"\xff\x00", bytes(raw[at : at + 80]), b"=?x?q?=FF?= ;\n\n")
            )
            raw[at : at + chance.randint(0, 40)] = piece
        read_or_not(bytes(raw))

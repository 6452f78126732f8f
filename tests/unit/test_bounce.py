"""What bounces of several mail systems say, and that nothing that comes in can do more than not be read."""

import random
import subprocess
import sys
from contextlib import suppress

import pytest

from outbox.bounce import HARD, Kind, take_apart
from tests.bounces import ARF, EXCHANGE, EXIM, QMAIL, postfix

HEADER = "From: Reports <reports@example.com>\nTo: bo@example.com\nMessage-ID:\n <7.abcd@example.com>\nSubject: x"
ID = "<7.abcd@example.com>"


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
        "import resource, sys, time; from outbox.bounce import take_apart; raw = open(sys.argv[1], 'rb').read();"
        "limit = int(open('/proc/self/statm').read().split()[0]) * 4096 + 100_000_000;"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit)); began = time.process_time()\n"
        "try: take_apart(raw)\n"
        "except ValueError: pass\n"
        "took = time.process_time() - began; assert took < 1, took"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)


def plain(template, **more):
    return template.format(header=HEADER, message_id=ID, **more).encode()


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
        found = take_apart(said)
        (notice,) = found.notices
        assert (notice.kind, notice.status) == (kind, status)
        assert says in notice.said
        assert "bo@example.com" in notice.addresses
        assert ID in found.message_ids


@pytest.mark.parametrize(
    "action, status, diagnostic, kind",
    [
        *(("failed", status, None, Kind.HARD) for status in sorted(HARD)),
        *(("failed", f"5.{status}", None, Kind.SOFT) for status in ("1.0", "1.7", "1.8", "2.2", "4.4", "7.1", "0.0")),
        ("failed", "4.4.7", None, Kind.SOFT),
        ("delayed", "5.1.1", None, Kind.SOFT),
        ("delayed", "4.4.1", None, Kind.SOFT),
        ("failed", "5.0.0", "smtp; 550 5.1.1 no such user", Kind.HARD),
        ("failed", "5.0.0", "smtp; 550 host 5.1.1.9 refuses", Kind.SOFT),
        ("failed", "5.7.1", "smtp; 550 5.1.1 no such user", Kind.SOFT),
        ("failed", "nonsense", "", Kind.SOFT),
    ],
)
def test_only_a_failure_for_good_that_is_about_the_mailbox_is_hard(action, status, diagnostic, kind):
    (notice,) = take_apart(postfix(action=action, status=status, diagnostic=diagnostic or "smtp; no")).notices
    assert notice.kind == kind


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
    assert take_apart(raw) is None


def test_of_several_notices_only_that_which_names_a_recipient_is_about_it():
    other = (
        b"\n\nFinal-Recipient: rfc822; al@example.com\nAction: failed\nStatus: 5.2.2\n\n--B\nContent-Description: Und"
    )
    found = take_apart(postfix().replace(b"\n\n--B\nContent-Description: Und", other))
    assert [notice.kind for notice in found.notices] == [Kind.HARD, Kind.SOFT]
    assert found.about("AL@example.com").status == "5.2.2"
    assert found.about("cy@example.com") is None


def test_a_bounce_is_the_same_however_it_is_carried_and_another_is_another():
    assert take_apart(b"Delivered-To: x@y\n" + postfix()).identity == take_apart(postfix()).identity
    assert take_apart(postfix(number=2)).identity != take_apart(postfix()).identity
    assert take_apart(plain(QMAIL)).identity != take_apart(plain(QMAIL) + b"x").identity


def read_or_not(raw):
    with suppress(ValueError):  # which says that it cannot be read; anything else would end the command
        return take_apart(raw)


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

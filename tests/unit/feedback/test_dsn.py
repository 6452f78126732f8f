"""What bounces of several mail systems say, and that nothing that comes in can do more than not be read."""

import random
import subprocess
import sys
from base64 import encodebytes as b64encode
from binascii import b2a_qp
from contextlib import suppress

import pytest

from outbox.feedback.dsn import HARD, Kind, take_apart
from tests.support.bounce_samples import ARF, EXCHANGE, EXIM, PERSON, QMAIL, postfix
from tests.support.bounce_samples import report as small

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
        "import resource, sys, time; from outbox.feedback.dsn import take_apart; raw = open(sys.argv[1], 'rb').read();"
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
    (notice,) = take_apart(
        postfix(action=action, status=status, diagnostic=diagnostic or "smtp; 550 no such user")
    ).notices
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
    assert found.about("bo@example.com").kind == Kind.HARD
    assert (found.about("cy@example.com").kind, found.about("cy@example.com").counts) == (Kind.SOFT, False)


def verdict(raw, recipient="bo@example.com"):
    found = take_apart(raw)
    return found and found.about(recipient).kind


ALIAS = "team@example.com"


@pytest.mark.parametrize(
    "how",
    [
        {"final": "rfc822; left@example.com", "original": f"rfc822;{ALIAS}"},
        {"final": "rfc822; left@example.com"},
        {"final": "rfc822; reports@example.com"},
        {"final": "LOCAL; left", "original": f"rfc822;{ALIAS}"},
        {"final": f"rfc822; {ALIAS}", "more": "X-Actual-Recipient: rfc822; left@example.com\n"},
        {"final": f"rfc822; {ALIAS}", "more": "X-Actual-Recipient: X-Unix; |/usr/bin/vacation left\n"},
        {"final": f"rfc822; {ALIAS}", "diagnostic": "smtp; 550 5.1.1 <left@example.com>: User unknown"},
        {"final": f"rfc822; {ALIAS}", "diagnostic": "SMTP; 550 5.1.1 <left@example.com>... User unknown"},
        {"final": "rfc822; team@elsewhere.example"},
        {"final": "", "original": ""},
    ],
    ids=[
        "member",
        "alone",
        "our sender",
        "local user",
        "Sendmail",
        "program",
        "quoted",
        "quoted by Sendmail",
        "domain",
        "nobody",
    ],
)
def test_an_address_that_an_alias_leads_to_is_no_evidence_against_the_alias(how):
    found = take_apart(small(**how)).about(ALIAS)
    assert (found.kind, found.counts) == (Kind.SOFT, False)
    assert "5.1.1" in found.said


@pytest.mark.parametrize(
    "text, address",
    [
        (EXIM.replace("  bo@example.com\n", "  bo@example.com\n    (generated from team@example.com)\n"), ALIAS),
        (QMAIL, ALIAS),
    ],
    ids=["Exim", "qmail"],
)
def test_nor_is_it_in_a_text(text, address):
    assert verdict(plain(text), address) == Kind.SOFT
    assert verdict(plain(text)) == Kind.HARD


@pytest.mark.parametrize(
    "final, recipient",
    [
        ("rfc822; BO@Example.COM", "bo@example.com"),
        ("rfc822;<bo@example.com>", "Bo@example.com"),
        ("bo@example.com", "bo@example.com"),
        ("rfc/822;bo@example.com", "bo@example.com"),
        ("<bo@example.com>", "bo@example.com"),
        ("RFC822 ; bo@example.com.", "bo@example.com"),
        ("rfc822; bo@example.com (Bo)", "bo@example.com"),
        ('rfc822; "bo"@example.com', "bo@example.com"),
        ("LOCAL; bo", "bo@example.com"),
        ("rfc822; bo+2Bweek@example.com", "bo+week@example.com"),
        ("rfc822; bo+week@example.com", "bo+week@example.com"),
        ("rfc822; bo+2Bweek@example.com", "bo+2Bweek@example.com"),
        ("utf-8; j\u00f6rg@example.com", "j\u00f6rg@example.com"),
        ("utf-8; jo\u0308rg@example.com", "j\u00f6rg@example.com"),
        ("utf-8; j\\x{F6}rg@example.com", "j\u00f6rg@example.com"),
        ("UTF-8;j\\x{f6}rg@example.com", "j\u00f6rg@example.com"),
        ("utf-8; j\u00f6rg@b\u00fccher.example", "j\u00f6rg@xn--bcher-kva.example"),
        ("utf-8; bo\\x{2B}week@example.com", "bo+week@example.com"),
    ],
)
def test_an_address_is_the_recipients_in_each_of_its_spellings(final, recipient):
    assert verdict(small(final=final), recipient) == Kind.HARD
    assert verdict(small(final="", original=final), recipient) == Kind.HARD


@pytest.mark.parametrize(
    "how",
    [
        {"diagnostic": "smtp; 550 5.1.1 <bo@internal.example.com>: User unknown"},  # its server has rewritten it
        {"diagnostic": "smtp; 550 5.1.1 User unknown; ask <postmaster@example.com>"},
        {"final": "", "diagnostic": "smtp; 550 5.1.1 <bo@example.com>: User unknown"},
        {"final": "rfc822;", "original": "rfc822; bo@example.com"},
        {"final": "RFC822; RFC822; bo@example.com"},
        {"final": "rfc822 (SMTP); bo@example.com;"},
        {"diagnostic": "smtp; 550 5.1.2 domain example.com does not exist", "status": "5.1.2"},
    ],
)
def test_the_recipients_own_address_may_be_named_in_another_way(how):
    assert verdict(small(**how)) == Kind.HARD


@pytest.mark.parametrize(
    "said",
    [
        "<bo@another.example>: User unknown",
        "left@example.com... User unknown",
        "User unknown <left@example.com>",
        "unknown user: left@example.com.",
        "the sender's domain mail.another.example does not exist",
        "no such domain: another.example",
    ],
)
def test_words_that_name_another_address_or_domain_say_nothing_of_the_recipients(said):
    assert verdict(small(diagnostic=f"smtp; 550 5.1.1 {said}")) == Kind.SOFT


def test_a_transcript_that_names_another_address_says_nothing_of_the_recipients():
    transcript = b"--B\n\n... while talking to mx:\n550 5.1.1 <left@example.com>... User unknown\n--B\nContent-Type: "
    fields = b"Final-Recipient: rfc822; bo@example.com\nAction: failed\nStatus: 5.1.1\n"
    for name, kind in ((b"left", Kind.SOFT), (b"bo", Kind.HARD)):
        raw = in_part(DSN, fields).replace(b"--B\nContent-Type: ", transcript.replace(b"left", name), 1)
        assert verdict(raw) == kind


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


@pytest.mark.parametrize(
    "final", ["rfc822; bo+week@example.com", "rfc822; bob@example.com", "rfc822; bo@mx.example.com", "LOCAL; bob"]
)
def test_an_address_that_is_only_similar_is_another(final):
    assert verdict(small(final=final)) == Kind.SOFT


@pytest.mark.parametrize("code", ["\\x{A}", "\\x{0D}", "\\x{2028}", "\\x{D800}", "\\x{110000}", "+0A", "+7F"])
def test_no_code_in_an_address_becomes_a_control_character(code):
    (notice,) = take_apart(small(final=f"utf-8; bo{code}@example.com")).notices
    assert notice.addresses == {f"bo{code.lower()}@example.com"}


def test_of_two_statements_about_one_recipient_the_milder_counts():
    group = "Final-Recipient: rfc822; bo@example.com\nAction: failed\nStatus: 5.2.2\n"
    assert verdict(small(more=f"\n{group}")) == Kind.SOFT
    assert verdict(small(more=group)) == Kind.SOFT


def in_part(kind, content, *, encoding="", outer="multipart/report; report-type=delivery-status"):
    head = f"Content-Transfer-Encoding: {encoding}\n" if encoding else ""
    return (
        f"From: MAILER-DAEMON@mx.example.net\nReturn-Path: <>\nMessage-ID: <b@c>\n"
        f'Content-Type: {outer}; boundary="B"\n\n'
        f"--B\nContent-Type: {kind}\n{head}\n".encode()
        + content
        + b"\n--B--\n"
    )


FIELDS = (
    b"Reporting-MTA: dns; mx.example.net\n\nFinal-Recipient: rfc822; bo@example.com\nAction: failed\nStatus: 5.1.1\n"
    b"Diagnostic-Code: smtp; 550 5.1.1 no such user\n"
)
DSN = "message/delivery-status"


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
    found = take_apart(in_part(DSN, FIELDS + part))
    assert ID in found.message_ids


def test_a_report_without_the_servers_words_is_judged_by_the_transcript():
    head = b"--B\nContent-Type: text/plain\n\n   ----- Transcript of session follows -----\n"
    raw = small().replace(b"--B\n", head + b"<<< 550 5.7.1 Your IP address is on our blacklist\n--B\n", 1)
    assert verdict(raw) == Kind.SOFT
    assert verdict(raw.replace(b"5.7.1 Your IP address is on our blacklist", b"5.1.1 User unknown")) == Kind.HARD


@pytest.mark.parametrize(
    "text",
    [
        PERSON,
        PERSON.replace("In-Reply-To: {message_id}\nReferences: {message_id}\n", ""),
        PERSON.replace("In-Reply-To: {message_id}\nReferences: {message_id}\n", "").replace(
            "Return-Path: <bo@example.com>\n", ""
        ),
        PERSON.replace("<bo@example.com>:\n", "").replace("Return-Path: <bo@example.com>", "Return-Path: <>"),
        QMAIL.replace("\n\nHi", "\nIn-Reply-To: <7.abcd@example.com>\n\nHi"),
        QMAIL.replace("<bo@example.com>:\n", "bo@example.com\n"),
        QMAIL.replace("Hi. This is", "> Hi. This is").replace("<bo", "> <bo"),
        PERSON.replace("Hi. This", "Final-Recipient: rfc822; bo@example.com\nAction: failed\nStatus: 5.1.1\n\nThis"),
        QMAIL.replace("Hi. This is the qmail-send program", "Hello. I am away").replace(
            "Subject:", "Auto-Submitted: auto-replied\nX-Autoreply: yes\nSubject:"
        ),
    ],
)
def test_what_a_person_or_an_auto_reply_writes_is_no_bounce(text):
    assert take_apart(plain(text)) is None


def test_a_text_of_a_mail_system_is_known_by_its_return_path_or_its_sender():
    assert verdict(plain(QMAIL.replace("MAILER-DAEMON@", "mta@"))) == Kind.HARD
    assert verdict(plain(QMAIL.replace("Return-Path: <>", "Return-Path: <srs0@example.com>"))) == Kind.HARD
    assert verdict(plain(QMAIL.replace("MAILER-DAEMON@", "mta@").replace("Return-Path: <>\n", ""))) is None


def test_qmail_says_for_each_recipient_what_failed():
    text = QMAIL.replace("\n\n--- Below", "\n\n<al@example.com>:\nMailbox full. (#5.2.2)\n\n--- Below")
    assert verdict(plain(text)) == Kind.HARD
    assert take_apart(plain(text)).about("al@example.com").status == "5.2.2"


def test_a_complaint_of_a_person_to_whom_an_email_was_passed_on_is_not_the_recipients():
    raw = plain(ARF, about="abuse")
    assert verdict(raw) == Kind.COMPLAINED
    assert verdict(raw, "redacted@example.com") == Kind.COMPLAINED  # RFC 6590: the name may be hidden
    assert verdict(raw, "bo@elsewhere.example") == Kind.SOFT


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

from datetime import UTC, datetime, timedelta, timezone
from email import message_from_string
from email.policy import default

import pytest

from outbox.mail.mailbox import Mailbox
from outbox.mail.message import build

ANN = Mailbox("Ann Smith", "ann@example.com")
REPORTS = Mailbox("Progress reports", "reports@example.com")
MONDAY = datetime(2026, 11, 23, 6, 0, 7, tzinfo=timezone(timedelta(hours=-5)))


def message(**changes):
    given = {
        "sender": REPORTS, "recipient": ANN, "subject": "Progress",
        "text": "5 done\n", "html": "<p>5 done</p>\n",
        "date": MONDAY, "message_id": "7f3a@example.com", "list_id": "progress.example.com",
    }  # fmt: skip
    return build(**(given | changes))


def header_of(raw, name):
    head = raw.partition(b"\r\n\r\n")[0].decode().replace("\r\n ", " ")
    return dict(line.split(": ", 1) for line in head.split("\r\n"))[name]


def test_a_plain_message_looks_like_this():
    boundary = header_of(message(), "Content-Type").partition('boundary="')[2].rstrip('"')
    assert message().decode() == "\r\n".join((
        "From: Progress reports <reports@example.com>",
        "To: Ann Smith <ann@example.com>",
        "Subject: Progress",
        "Date: Mon, 23 Nov 2026 06:00:07 -0500",
        "Message-ID: <7f3a@example.com>",
        "List-Id: <progress.example.com>",
        "Auto-Submitted: auto-generated",
        "X-Auto-Response-Suppress: OOF, AutoReply",
        "MIME-Version: 1.0",
        f'Content-Type: multipart/alternative; boundary="{boundary}"',
        "",
        f"--{boundary}",
        "Content-Type: text/plain; charset=utf-8",
        "Content-Transfer-Encoding: quoted-printable",
        "",
        "5 done",
        "",
        f"--{boundary}",
        "Content-Type: text/html; charset=utf-8",
        "Content-Transfer-Encoding: quoted-printable",
        "",
        "<p>5 done</p>",
        "",
        f"--{boundary}--",
        "",
    ))  # fmt: skip


def test_headers_give_the_default_fields_another_value():
    raw = message(headers={"auto-submitted": "no", "X-Auto-Response-Suppress": "None"})
    head = raw.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    assert [line for line in head if "auto" in line.lower()] == ["auto-submitted: no", "X-Auto-Response-Suppress: None"]


def test_the_same_arguments_give_the_same_bytes():
    assert message() == message()


def test_another_message_id_gives_another_boundary():
    assert header_of(message(), "Content-Type") != header_of(message(message_id="8@example.com"), "Content-Type")


def test_without_a_list_there_is_no_list_id():
    assert b"List-Id" not in message(list_id=None)


@pytest.mark.parametrize("identifier", ["a@example.com", "<a@example.com>"])
def test_an_id_may_come_with_or_without_brackets(identifier):
    assert header_of(message(message_id=identifier), "Message-ID") == "<a@example.com>"


@pytest.mark.parametrize("identifier", ["", "a b", "a\r\nBcc: x", "ü@x", "a>b", "a" * 999])
def test_an_id_that_cannot_stand_in_a_header_is_refused(identifier):
    with pytest.raises(ValueError, match="cannot be an id"):
        message(message_id=identifier)


def test_a_naive_date_is_refused():
    with pytest.raises(ValueError, match="timezone"):
        message(date=datetime(2026, 11, 23))  # noqa: DTZ001 — naive on purpose


def test_an_offset_with_seconds_is_written_in_utc():
    lisbon_1900 = timezone(-timedelta(minutes=36, seconds=45))
    raw = message(date=datetime(1900, 1, 1, tzinfo=lisbon_1900))
    assert header_of(raw, "Date") == "Mon, 01 Jan 1900 00:36:45 +0000"


def test_utc_is_written_as_plus_zero():
    assert header_of(message(date=datetime(2027, 1, 1, tzinfo=UTC)), "Date") == "Fri, 01 Jan 2027 00:00:00 +0000"


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("", "ann@example.com"),
        (" \t\n ", "ann@example.com"),
        ("Ann Smith", "Ann Smith <ann@example.com>"),
        ("Smith, Ann", '"Smith, Ann" <ann@example.com>'),
        ('Ann "Q" \\ S.', '"Ann \\"Q\\" \\\\ S." <ann@example.com>'),
        ("Jürgen", "=?utf-8?q?J=C3=BCrgen?= <ann@example.com>"),
        ("田中", "=?utf-8?b?55Sw5Lit?= <ann@example.com>"),
        ("=?utf-8?q?x?=", "=?utf-8?b?PT91dGYtOD9xP3g/PQ==?= <ann@example.com>"),
        ("Ann\r\nBcc: spy@example.com", '"Ann Bcc: spy@example.com" <ann@example.com>'),
    ],
)
def test_a_display_name_is_written_so_that_it_is_read_as_given(name, written):
    assert header_of(message(recipient=Mailbox(name, "ann@example.com")), "To") == written


@pytest.mark.parametrize(
    "address",
    ["", "ann", "a@b@c", "ann@example.com>", "ann@exa\r\nmple.com", "ann@bücher.example", "ü\u2028n@b.example"],
)
def test_an_address_that_was_not_checked_is_refused(address):
    with pytest.raises(ValueError, match="check_address"):
        message(recipient=Mailbox("", address))


def test_a_subject_cannot_begin_a_new_header():
    assert header_of(message(subject="a\r\nBcc: spy@example.com\x00"), "Subject") == "a Bcc: spy@example.com"


def test_a_long_ascii_subject_is_folded_at_its_spaces():
    raw = message(subject="word " * 40)
    assert header_of(raw, "Subject") == " ".join(["word"] * 40)
    assert max(map(len, raw.split(b"\r\n"))) <= 76


def test_a_lone_surrogate_becomes_a_question_mark():
    raw = message(subject="\ud800", text="\ud800", recipient=Mailbox("\ud800", "ann@example.com"))
    assert raw.isascii()
    assert b"\r\n?\r\n--" in raw


def test_extra_headers_come_before_the_mime_headers():
    raw = message(headers={"X-SES-MESSAGE-TAGS": "outbox=17", "Resend-Idempotency-Key": "17"})
    assert b"X-SES-MESSAGE-TAGS: outbox=17\r\nResend-Idempotency-Key: 17\r\nMIME-Version" in raw


def test_a_long_url_in_an_extra_header_stays_readable():
    url = f"<https://example.com/{'u' * 300}>"
    assert header_of(message(headers={"List-Unsubscribe": url}), "List-Unsubscribe") == url


@pytest.mark.parametrize("name", ["", "X Y", "X:", "X\r\nBcc", "Ü", "x" * 65])
def test_a_header_name_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match="header's name"):
        message(headers={name: "x"})


@pytest.mark.parametrize("name", ["subject", "FROM", "Content-Type", "Message-Id", "Dkim-Signature", "received"])
def test_a_header_that_outbox_or_a_mail_server_writes_cannot_be_given(name):
    with pytest.raises(ValueError, match="cannot be given"):
        message(headers={name: "x"})


def test_a_body_that_quotes_the_boundary_does_not_end_its_part():
    boundary = header_of(message(), "Content-Type").partition('boundary="')[2].rstrip('"')
    raw = message(text=f"a\n--{boundary}\n--{boundary}--\n")
    assert raw.count(boundary.encode()) == 4  # in the header, before each part, and at the end


def test_an_address_beyond_ascii_stands_in_its_headers_in_utf8():
    built = message(recipient=Mailbox("Jürgen", "jürgen@b.example"), reply_to=[Mailbox("", "δ@b.example")])
    parsed = message_from_string(built.decode(), policy=default)
    assert parsed["to"].addresses[0].addr_spec == "jürgen@b.example"
    assert parsed["to"].addresses[0].display_name == "Jürgen"
    assert "\r\nReply-To: δ@b.example\r\n".encode() in built
    assert built.partition(b"\r\n\r\n")[2].isascii()

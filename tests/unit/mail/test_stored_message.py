"""Reading of stored messages: the result, and that no content takes long, much memory, or raises."""

import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.mail import mime
from outbox.mail.attachment import Attachment
from outbox.mail.mailbox import Mailbox
from outbox.mail.message import build
from outbox.mail.stored_message import TEXT_MAX, read_header, read_message
from tests.support.bounce_samples import postfix

MEGABYTES = 20 * 1024 * 1024  # the largest message that may be enqueued


def filled(piece, size=MEGABYTES):
    return piece * (size // len(piece))


def nested(depth, opening=b""):
    head = b"".join(
        b'Content-Type: multipart/mixed; boundary="%sb%d"\n\n--%sb%d\n' % (opening, n, opening, n) for n in range(depth)
    )
    return head + b"Content-Type: text/plain\n\nhello\n"


def in_parts(pieces):
    return b"Content-Type: multipart/mixed; boundary=b\n\n" + pieces


HOSTILE = {
    "semicolons": lambda: b"Content-Type: text/plain" + b";" * 40_000 + b"\n\nx",
    "semicolons in every part": lambda: in_parts(b"--b\nContent-Type: a/b%s\n\nx\n" % (b"; " * 4000) * 600),
    "semicolons in quotes": lambda: b'Content-Type: text/plain; a="' + b";" * 40_000 + b"\n\nx",
    "parentheses": lambda: b"Content-Type: text/plain " + b"(" * 2000 + b"\n\nx",
    "parentheses that close": lambda: b"Content-Type: text/plain " + b"(" * 4000 + b")" * 4000 + b"\n\nx",
    "megabytes of parentheses": lambda: b"Content-Type: text/plain " + filled(b"(") + b"\n\nx",
    "quotes": lambda: b"Content-Type: text/plain" + b';a="\\' * 100_000 + b"\n\nx",
    "encoded words": lambda: b"Subject: " + b"=?utf-8?q?a?= " * 300_000 + b"\n\nx",
    "openings of encoded words": lambda: b"Subject: " + b"=?a?q?" * 300_000 + b"\n\nx",
    "a long encoded word": lambda: b"Subject: =?utf-8?q?" + filled(b"=C3") + b"?=\n\nx",
    "400 multiparts": lambda: nested(400),
    "200,000 multiparts": lambda: nested(200_000),
    "multiparts over dashes": lambda: nested(16, b"-" * 60) + filled(b"-"),
    "multiparts over lines": lambda: nested(16) + filled(b"--\n"),
    "10,000 parts": lambda: in_parts(b"--b\n\nx\n" * 10_000),
    "parts without content": lambda: in_parts(filled(b"--b\n")),
    "parts with long headers": lambda: in_parts(filled(b"--b\n" + b"a\n" * 20_000 + b"\nx\n")),
    "lines like boundaries": lambda: in_parts(filled(b"--bx\n")),
    "boundaries in one line": lambda: in_parts(filled(b"--b")),
    "a boundary of dashes": lambda: b"Content-Type: multipart/x; boundary=" + b"-" * 190 + b"b\n\n" + filled(b"-"),
    "blank lines": lambda: b"Subject: x\n\n" + b"\n" * 2_000_000,
    "blank lines in the header": lambda: b"Subject: x\n" + b" \n" * 1_000_000,
    "a header line of megabytes": lambda: b"Subject: " + filled(b"a") + b"\n\nx",
    "header fields": lambda: filled(b"X: y\n"),
    "continuations": lambda: b"Subject: x\n" + filled(b" y\n"),
    "sections of a parameter": lambda: b"Content-Type: a/b%s\n\n" % b"".join(b";n*%d*=%%41" % n for n in range(99_999)),
    "a long section": lambda: b"Content-Type: a/b; n*0*=" + b"%41" * 1_000_000 + b"\n\n",
    "base64": lambda: b"Content-Transfer-Encoding: base64\n\n" + filled(b"QUFB\n"),
    "no base64": lambda: b"Content-Transfer-Encoding: base64\n\n" + filled(b"="),
    "quoted-printable": lambda: b"Content-Transfer-Encoding: quoted-printable\n\n" + filled(b"=3D"),
    "soft line breaks": lambda: b"Content-Transfer-Encoding: quoted-printable\n\n" + filled(b"= "),
    "punycode": lambda: b"Content-Type: text/plain; charset=punycode\n\n" + filled(b"a-9999"),
    "idna": lambda: b"Content-Type: text/plain; charset=idna\n\n" + filled(b"xn--a"),
    "escapes of ISO 2022": lambda: b"Content-Type: text/plain; charset=iso-2022-jp\n\n" + filled(b"\x1b$B\x1b(B"),
    "bytes that are no Thai": lambda: b"Content-Type: text/plain; charset=cp874\n\n" + filled(b"\xff"),
    "bytes that are no UTF-8": lambda: b"\n" + filled(b"\xff"),
    "NUL": lambda: filled(b"\x00"),
    "nothing": lambda: b"",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_no_stored_message_takes_a_second_or_raises(name):
    raw = HOSTILE[name]()
    began = time.process_time()
    found = read_message(raw)
    for one in found.attachments[:3]:
        one.content()
    assert time.process_time() - began < 1.0
    assert len(found.text or "") <= TEXT_MAX
    assert len(found.attachments) <= mime.PARTS_MAX
    assert sum(len(value) for _, value in found.headers) <= mime.HEAD_MAX


@pytest.mark.parametrize("charset", [*sorted(mime._CHARSETS), *(f"iso-8859-{n}" for n in range(18))])
def test_whatever_character_set_a_message_names_it_is_read(charset):
    word = f"=?{charset}?q?=FF=81?="
    found = read_message(f"Subject: {word}\nContent-Type: text/plain; charset={charset}\n\nhello\n\n".encode())
    assert found.text
    assert found.header("Subject") != word


@pytest.mark.parametrize("name", ["encoded words", "10,000 parts", "base64", "multiparts over lines", "blank lines"])
def test_no_stored_message_takes_more_memory_than_a_few_times_its_size(name, tmp_path):
    path = tmp_path / "message"
    path.write_bytes(HOSTILE[name]())
    # In a process of its own: the limit is on all that it maps.
    code = (
        "import resource, sys; from outbox.mail.stored_message import read_message;"
        "raw = open(sys.argv[1], 'rb').read();"
        "pages = int(open('/proc/self/statm').read().split()[0]); limit = pages * 4096 + 3 * 20 * 1024 * 1024;"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit)); read_message(raw)"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)


@pytest.mark.parametrize(
    "name, note",
    [
        ("400 multiparts", "nested more than 16 deep"),
        ("10,000 parts", "more than 500 parts"),
        ("lines like boundaries", "lines begin like a boundary"),
        ("header fields", "more than 1000 fields"),
        ("a header line of megabytes", "a header is longer than"),
        ("quoted-printable", "its text/plain part is larger than"),
    ],
)
def test_what_is_left_out_is_named(name, note):
    found = read_message(HOSTILE[name]())
    assert found.notes
    assert any(note in one for one in found.notes), found.notes


def test_the_body_behind_a_header_that_is_too_long_is_still_read():
    found = read_message(b"To: ann@example.com\nX: " + b"a " * 200_000 + b"\n\nhello\n")
    assert (found.text, found.header("to"), bool(found.notes)) == ("hello\n", "ann@example.com", True)


PICTURE = Attachment("ü.png", b"\x89PNG\x00", "image/png", cid="logo")
TABLE = Attachment("Bericht für März.csv", b"a;b\r\n", "text/csv")


@pytest.mark.parametrize("text", [None, "Grüße\n\n.\nFrom here\n", "x" * 100_000])
@pytest.mark.parametrize("html", [None, '<p>Grüße <img src="cid:logo"></p>'])
def test_what_outbox_builds_is_read_back_whole(text, html):
    if text is None and html is None:
        text = ""
    files = [TABLE, *([PICTURE] if html else [])]
    raw = build(
        sender=Mailbox("Jürgen", "reports@example.com"), recipient=Mailbox("Änn", "ann@example.com"),
        subject="Bericht für März " * 10, text=text, html=html, attachments=files,
        date=datetime(2026, 11, 23, tzinfo=UTC), message_id="1.x@example.com",
    )  # fmt: skip
    found = read_message(raw)
    assert found.notes == []
    assert (found.text or "").rstrip("\n") == (text or "").rstrip("\n")
    assert (found.html or "").rstrip("\n") == (html or "").rstrip("\n")
    assert found.header("SUBJECT") == ("Bericht für März " * 10).strip()
    assert read_header(raw, "subject") == found.header("subject")
    assert found.header("From") == "Jürgen <reports@example.com>"
    assert found.header("X-None") is None
    assert sorted((one.name, one.type, one.content(), one.size) for one in found.attachments) == sorted(
        (one.name, one.type, one.content, len(one.content)) for one in files
    )
    assert {one.cid for one in found.attachments} == ({"", "logo"} if html else {""})


@pytest.mark.parametrize(
    "value, name",
    [
        ('attachment; filename="a;b\\"c.txt"', 'a;b"c.txt'),
        ("attachment; filename=plain.txt", "plain.txt"),
        ("attachment (a (nested) comment); filename=x.txt (another)", "x.txt"),
        ("attachment; filename*=utf-8''%E2%82%AC%20rates.txt", "€ rates.txt"),
        ("attachment; filename*0*=utf-8''%E2%82; filename*1*=%AC%20; filename*2=rates.txt", "€ rates.txt"),
        ("attachment; filename*1=b; filename*0=a; filename*3=d", "ab"),
        ('attachment; filename="=?utf-8?q?=E2=82=AC?="', "€"),
        ('attachment; filename="x\x1b[2J\x00.txt"', "x [2J .txt"),
        ("attachment; filename*=punycode''a-9999", "a-9999"),
        ('attachment; filename="unterminated', "unterminated"),
        ("attachment; =; filename", ""),
    ],
)
def test_a_file_has_the_name_that_mail_programs_show(value, name):
    raw = f"Content-Type: application/x\nContent-Disposition: {value}\n\nx".encode()
    assert [one.name for one in read_message(raw).attachments] == [name]


@pytest.mark.parametrize(
    "value, text",
    [
        ("=?utf-8?b?w6k=?= =?utf-8?b?w6k=?=", "éé"),
        ("=?utf-8?q?=C3?=\n =?utf-8?q?=A9?=", "é"),
        ("a =?iso-8859-1?q?=E9_b?= c", "a é b c"),
        ("=?utf-8*de?q?x?=", "x"),
        ("=?x-unknown?q?=C3=A9?=", "é"),
        ("=?utf-8?b?!!!?=", ""),
        ("=?utf-8?x?a?=", "=?utf-8?x?a?="),
        ("a=?b", "a=?b"),
        ("grün", "grün"),
        ("one\n two\r\n\tthree", "one two three"),
        ("=?utf-8?q?a=0D=0Ab=1B=00?=", "a b"),
    ],
)
def test_a_header_is_one_line_with_its_encoded_words_decoded(value, text):
    assert read_message(f"Subject: {value}\n\n".encode()).header("Subject") == text


@given(st.binary(max_size=300), st.integers(0, 2000), st.integers(0, 60))
def test_whatever_bytes_there_are_they_are_read(junk, at, length):
    raw = postfix(token="x")
    broken = raw[:at] + junk + raw[at + length :]
    for one in (broken, broken.replace(b"\n", b"\r\n"), junk):
        found = read_message(one)
        assert "\n" not in "".join(value for _, value in found.headers)
        for file in found.attachments:
            assert len(file.content()) <= len(one)

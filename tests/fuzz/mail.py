"""Mail: what comes back, what is stored, what is built, and the addresses and tokens in it."""

import email
import email.policy
import re
from datetime import UTC, datetime

from hypothesis import strategies as st

from outbox.feedback.dsn import READ_MAX, parse_bounce
from outbox.feedback.notice import REASON_MAX, Kind
from outbox.feedback.report_fields import IDS_MAX, NOTICES_MAX
from outbox.mail import verp
from outbox.mail.attachment import Attachment, file_name
from outbox.mail.header_fields import BREAKS, one_line
from outbox.mail.mailbox import Mailbox, check_address, comparable, parse_mailbox
from outbox.mail.message import build
from outbox.mail.stored_message import read_message
from outbox.web.board.message_view import mail_of
from tests.fuzz.harness import fuzzed, pieces, words
from tests.support import bounce_samples

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

# ── bounces ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_TOKENS = (
    b"\r\n", b"\n", b"\r\n\r\n", b" ", b"\t", b";", b"(", b")", b'"', b"\\", b"=", b"*", b"<", b">", b"@", b",",
    b":", b"\0",
    b"Content-Type: multipart/report; report-type=delivery-status; boundary=B\r\n",
    b"Content-Type: multipart/mixed; boundary=B\r\n\r\n", b"--B\r\n", b"--B--\r\n", b'boundary="', b"--",
    b"Content-Type: message/delivery-status\r\n\r\n", b"Content-Type: message/feedback-report\r\n\r\n",
    b"Content-Type: message/rfc822\r\n\r\n", b"Content-Type: text/plain; charset=", b"utf-7", b"idna", b"x-none\r\n",
    b"Content-Transfer-Encoding: base64\r\n", b"Content-Transfer-Encoding: quoted-printable\r\n",
    b"Content-Transfer-Encoding: x-uuencode\r\n", b"=?utf-8?q?=C3=A9?=", b"=?idna?q?", b"name*0*=", b"%00",
    b"Final-Recipient: rfc822; bo@example.com\r\n", b"Action: failed\r\n", b"Status: 5.1.1\r\n", b"5.", b"1.1",
    b"Diagnostic-Code: smtp; 550 5.1.1 no\r\n", b"Original-Envelope-Id: 4711-0123456789ab\r\n",
    b"Feedback-Type: abuse\r\n", b"Original-Rcpt-To: <bo@example.com>\r\n", b"Message-ID: <1.a@example.com>\r\n",
    b"X-Failed-Recipients: bo@example.com\r\n", b"Hi. This is the qmail-send\r\n", b"<bo@example.com>:\r\n",
    b"In-Reply-To: <1.a@example.com> ", b"Subject: x\r\n", b"To: ", b"Received: by mx\r\n",
)  # fmt: skip
_SAMPLES = (
    bounce_samples.postfix(),
    bounce_samples.postfix(token="4711-0123456789ab", returned="Message-ID: <1.a@example.com>\n"),
)
_MAIL = pieces(*_TOKENS, seeds=_SAMPLES)


@fuzzed("bounces", _MAIL, bytes)
def a_bounce_is_read_within_its_bounds_or_refused(raw):
    try:
        found = parse_bounce(raw)
    except ValueError as error:
        assert not _CONTROL.search(str(error))
        return
    if found is None:
        return
    assert len(raw) > 0
    assert re.fullmatch(r"[0-9a-f]{32}", found.identity)
    assert 1 <= len(found.notices) <= NOTICES_MAX
    assert len(found.message_ids) <= IDS_MAX
    assert all(re.fullmatch(r"<[^<>\s]{1,900}>", one) for one in found.message_ids)
    assert len(found.evidence) <= READ_MAX
    for notice in found.notices:
        assert isinstance(notice.kind, Kind)
        assert len(notice.reason) <= REASON_MAX
        assert not re.search(r"[\r\n]", notice.reason)
        assert notice.status is None or re.fullmatch(r"[245]\.\d{1,3}\.\d{1,3}", notice.status)
        assert not any(re.search(r"[\r\n]", address) for address in notice.addresses)
    assert parse_bounce(raw) == found


# ── stored messages ──────────────────────────────────────────────────────────────────────────────────────────────────


_STORED = build(
    sender=Mailbox("Réports", "reports@example.com"), recipient=Mailbox("Ann", "ann@example.com"),
    subject="Ünwritten",
    text="Hello é", html='<img src="cid:logo">', date=datetime(2026, 11, 23, tzinfo=UTC),
    message_id="1.a@example.com",
    attachments=[Attachment("logo.png", b"\x89PNG", "image/png", cid="logo"), Attachment("r.csv", b"a,b",
    "text/csv")],
)  # fmt: skip


@fuzzed("stored", pieces(*_TOKENS, b"cid:logo", b"Content-ID: <logo>\r\n", seeds=(_STORED, *_SAMPLES)), bytes)
def any_stored_message_can_be_shown(raw):
    read_message(raw)
    mail_of(raw)


# ── messages that we build ───────────────────────────────────────────────────────────────────────────────────────────

_TEXT = words(
    "=?utf-8?q?=C3=A9?=", "a\r\nBcc: spy@example.com\r\n\r\n", "\r", "\n", "\r\n.\r\n", ".", "From ", "é", "🙂",
    " ", "\t",
    '"', "\\", "(", "<x@y>", "\u2028", "\x85", "\0", "\x1b", "--=_", "=", "e\u0301", "\udcff", "\ufeff", "x" * 80,
    size_max=20_000,
)  # fmt: skip
_BUILT = st.fixed_dictionaries(dict.fromkeys(("name", "subject", "text", "html", "extra", "file"), _TEXT))
LONG = 250  # characters; less than this is refused nowhere
_KEYS = [
    "From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "X-Auto-Response-Suppress", "X-Extra",
    "MIME-Version", "Content-Type",
]  # fmt: skip


@fuzzed("messages", _BUILT, dict)
def a_message_has_the_fields_and_bodies_that_were_given_and_no_others(given):
    attachments = []
    try:
        attachments = [Attachment(given["file"], b"x")]
    except ValueError:  # no name, or too long a one
        assert len(given["file"]) > LONG or file_name(given["file"]).strip(". ") == ""
    try:
        raw = build(
            sender=Mailbox(given["name"], "reports@example.com"),
            recipient=Mailbox(given["name"], "ann@example.com"),
            subject=given["subject"], text=given["text"], html=given["html"], headers={"X-Extra": given["extra"]},
            date=datetime(2026, 11, 23, tzinfo=UTC), message_id="7f3a.1@example.com", attachments=attachments,
        )  # fmt: skip
    except ValueError:  # only what is long may be too long
        assert max(len(given[name]) for name in ("name", "subject", "extra")) > LONG
        return
    assert raw.isascii()
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)|\0", raw)
    assert max(map(len, raw.split(b"\r\n"))) <= 998
    assert not re.search(rb"(?m)^\.\r$", raw)
    message = email.message_from_bytes(raw, policy=email.policy.default)
    assert sorted(message.keys()) == sorted(_KEYS)
    assert message["Subject"] == one_line(_whole(given["subject"]))
    assert [one.addr_spec for one in message["To"].addresses] == ["ann@example.com"]
    for kind, body in (("plain", given["text"]), ("html", given["html"])):
        part = message.get_body(preferencelist=(kind,))
        assert part.get_payload(decode=True).decode().replace("\r\n", "\n") == _lines(body)
    assert len([*message.iter_attachments()]) == len(attachments)


def _whole(text):
    return text.encode("utf-8", "replace").decode()


def _lines(text):
    return _whole(text).replace("\r\n", "\n").replace("\r", "\n")


# ── addresses ────────────────────────────────────────────────────────────────────────────────────────────────────────

ADDRESSES = words(
    "a", "@", ".", "-", "example.com", "bücher.example", "xn--", "xn--bcher-kva", "é", "e\u0301", "ß", "İ",
    "\u200d", " ",
    "\t", "\r\n", "\0", "<", ">", '"', "\\", ",", ";", ":", "(", "[127.0.0.1]", "1.2.3.4", "+", "=", "_", "🙂",
    "\u202e",
    "\uff20", "\uff0e", "\u3002", "\udcff", "a" * 64, "b" * 63, "invalid", "onion",
    seeds=("ann@example.com", "Ann <ann@example.com>", '"A, B \\" c" <ann@xn--bcher-kva.example>', "é@example.com"),
    size_max=20_000,
)  # fmt: skip


@fuzzed("addresses", ADDRESSES, str)
def what_passes_as_an_address_is_safe_in_an_envelope_and_in_a_header(text):
    for read in (check_address, comparable):
        try:
            address = read(text)
        except ValueError:
            continue
        assert read(address) == address
        assert len(address.encode()) <= 254
        assert address.count("@") == 1
        assert address.rpartition("@")[2].isascii()
        assert not re.search(r"[\s<>\"\\(),:;]", address)
        assert not _CONTROL.search(address)
    try:
        mailbox = parse_mailbox(text)
    except ValueError:
        return
    assert check_address(mailbox.address) == mailbox.address
    assert not BREAKS.search(mailbox.name.replace(" ", ""))
    try:
        raw = build(
            sender=mailbox, recipient=mailbox, subject="", text="", html=None, message_id="1@example.com",
            date=datetime(2026, 11, 23, tzinfo=UTC),
        )  # fmt: skip
    except ValueError:
        assert len(mailbox.name) > LONG
        return
    assert email.message_from_bytes(raw).keys() == [
        *("From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "X-Auto-Response-Suppress", "MIME-Version"),
        *("Content-Type", "Content-Transfer-Encoding"),
    ]


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_IN_TEXT = words(
    "4711-0123456789ab", "4711k1t0123456789abcdef", "-", "k", "t", "9" * 19, "9" * 20, "0", "f", "F", "bounces+",
    "@", "=",
    " ", "\n", "é", "<", ">", seeds=("bounces+4711-0123456789ab@example.com", "4711k2t0123456789abcdef"),
)  # fmt: skip


@fuzzed("tokens", _IN_TEXT, str)
def tokens_in_any_text_are_short_lower_case_and_found_again(text):
    for find in (verp.former_tokens_in, verp.tokens_in):
        found = find(text)
        assert find(" ".join(_token(one) for one in found)) == found
        for one in found:
            token = _token(one)
            assert re.fullmatch(r"[0-9a-z-]+", token)
            assert len(token) <= verp.TOKEN_MAX
            number = one[0] if isinstance(one, tuple) else verp.email_of(one)
            assert 1 <= number < 10**19


def _token(found):
    return found[1] if isinstance(found, tuple) else found

"""What is said because of what the server offers, and what a route adds to every email."""

import re
from dataclasses import replace

import dkim
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from outbox.errors import ConfigurationError
from outbox.settings import DkimSettings, Settings
from outbox.settings.urls import SmtpAddress
from outbox.smtp.dkim import load_signer
from outbox.smtp.extensions import Offers, original_recipient
from outbox.smtp.route_headers import Letterhead
from outbox.smtp.verdict import Accepted, Refused
from tests.unit.smtp.test_connection import HELLO, Talk, both_ways, mail

ALL = {"size_max": 1000, "eight_bit": True, "utf8": True, "dsn": True}
TOKEN = "4711k1t0123456789abcdef"
ABROAD = "jürgen@b.example"
UTF8_HEADER = f"To: {ABROAD}\r\n\r\nhello\r\n".encode()
BINARY_BODY = b"Subject: x\r\n\r\n\xe9\r\n"


def to(address, message=HELLO):
    claim = mail(message)
    claim.recipient = address
    return claim


def said(talk, pipelining):
    """MAIL and RCPT as they were said."""
    written = talk.wire.taken() if pipelining else [*talk.wire.taken(), *talk.say("250")]
    mail_from, rcpt_to, *_ = b"".join(written).decode().splitlines()
    return mail_from, rcpt_to


@both_ways
def test_plain_mail_is_said_without_parameters_whatever_is_offered_if_bounces_are_not_to_name_it(pipelining):
    claim = mail()
    talk = Talk(claim, pipelining=pipelining, offers=ALL)
    assert said(talk, pipelining) == (f"MAIL FROM:<{claim.sender}>", f"RCPT TO:<{claim.recipient}>")


@both_ways
def test_where_dsn_is_offered_a_bounce_names_the_email(pipelining):
    claim = to("a+b=c@example.com")
    claim.token = TOKEN
    talk = Talk(claim, pipelining=pipelining, size=True, offers=ALL, dsn=True)
    assert said(talk, pipelining) == (
        f"MAIL FROM:<{claim.sender}> SIZE={len(HELLO)} RET=HDRS ENVID={TOKEN}",
        "RCPT TO:<a+b=c@example.com> NOTIFY=FAILURE ORCPT=rfc822;a+2Bb+3Dc@example.com",
    )


@both_ways
def test_where_it_is_not_nothing_is_said_of_it(pipelining):
    talk = Talk(mail(), pipelining=pipelining, offers=ALL | {"dsn": False}, dsn=True)
    assert not any("=" in line for line in said(talk, pipelining))


def test_an_original_recipient_beyond_ascii_has_an_address_type_of_its_own():
    assert original_recipient("jü+r@b.example") == r"utf-8;j\x{FC}\x{2B}r@b.example"


@both_ways
@pytest.mark.parametrize(
    ("claim", "parameters"),
    [
        (to(ABROAD), " BODY=8BITMIME SMTPUTF8"),
        (mail(UTF8_HEADER), " BODY=8BITMIME SMTPUTF8"),
        (mail(BINARY_BODY), " BODY=8BITMIME"),
        (mail(), ""),
    ],
)
def test_8_bits_are_said_where_they_are_offered_and_needed(pipelining, claim, parameters):
    claim, following = replace(claim), mail()
    talk = Talk(claim, following, pipelining=pipelining, offers=ALL)
    mail_from, rcpt_to = said(talk, pipelining)
    assert (mail_from, rcpt_to) == (f"MAIL FROM:<{claim.sender}>{parameters}", f"RCPT TO:<{claim.recipient}>")
    replies = ("250", "250", "354") if pipelining else ("250", "354")
    assert talk.say(*replies)[-1] == claim.message
    written = [*talk.mark(), *talk.say("250 taken")]
    assert talk.desk.verdicts == [(claim, Accepted("250 taken"))]
    next_one = f"MAIL FROM:<{following.sender}>\r\n".encode()
    assert next_one in b"".join(written), "what one email needs is not said of the next"


@both_ways
@pytest.mark.parametrize(
    ("claim", "offers", "reason"),
    [
        (to(ABROAD), ALL | {"utf8": False}, "an address of it is not ASCII, and this server does not offer SMTPUTF8"),
        (mail(UTF8_HEADER), ALL | {"utf8": False}, "the message's header is not ASCII, and this server does not"),
        (mail(BINARY_BODY), ALL | {"eight_bit": False}, "the message has 8-bit bytes, and this server does not offer"),
        (mail(b"Subject: \xe9\r\n\r\nx\r\n"), ALL, "the message's header is neither ASCII nor UTF-8"),
        (mail(b"x" * 998 + b"\r\n."), ALL, "the message has 1001 bytes and this server takes at most 1000"),
    ],
)
def test_what_the_server_cannot_take_is_refused_unsent_and_the_connection_goes_on(pipelining, claim, offers, reason):
    claim, following = replace(claim), mail()
    talk = Talk(claim, following, pipelining=pipelining, offers=offers)
    ((refused, verdict),) = talk.desk.verdicts
    assert refused is claim
    assert not claim.marked
    assert isinstance(verdict, Refused)
    assert verdict.reply.startswith(reason)
    assert "so it was not sent: " in verdict.reply or "and it was not sent: " in verdict.reply
    assert said(talk, pipelining)[1] == f"RCPT TO:<{following.recipient}>"
    assert not talk.desk.ended


def test_a_sender_beyond_ascii_that_a_return_path_stands_in_for_asks_for_nothing():
    claim = mail()
    claim.sender = ABROAD
    talk = Talk(claim, offers=ALL | {"utf8": False}, letterhead=Letterhead({}, None, "bounces@b.example"))
    assert said(talk, pipelining=True)[0] == "MAIL FROM:<bounces@b.example>"


def test_an_idle_connection_that_is_started_with_what_it_cannot_take_is_idle_again():
    talk = Talk(offers=ALL | {"utf8": False})
    talk.conversation.start(to(ABROAD))
    assert [type(verdict) for _, verdict in talk.desk.verdicts] == [Refused]
    assert talk.wire.taken() == []
    assert talk.desk.idles == 2


def test_an_extension_is_known_by_the_reply_to_ehlo():
    offers = Offers.of({"pipelining": "", "size": " 500 ", "8bitmime": "", "smtputf8": "", "dsn": ""})
    assert offers == Offers(pipelining=True, size=True, size_max=500, eight_bit=True, utf8=True, dsn=True)
    assert Offers.of({"size": "", "smtputf8": ""}) == Offers(size=True)
    assert Offers.of({"size": "²"}) == Offers(size=True)


# ── what a route adds ────────────────────────────────────────────────────────────────────────────────────────


@both_ways
def test_the_return_path_holds_the_token_and_fields_go_before_the_message_and_into_its_size(pipelining):
    letterhead = Letterhead({"X-Tag": "outbox={email_id}"}, None, "bounces+{token}@example.com")
    claim = mail(b".hello\r\n")
    claim.token = TOKEN
    field = f"X-Tag: outbox={claim.email}\r\n".encode()
    talk = Talk(claim, pipelining=pipelining, size=True, letterhead=letterhead)
    assert said(talk, pipelining)[0] == f"MAIL FROM:<bounces+{TOKEN}@example.com> SIZE={len(field) + 8}"
    assert talk.say(*("250", "250", "354") if pipelining else ("250", "354"))[-1] == field + b"..hello\r\n"


@pytest.mark.parametrize(
    "key", ["a\r\nBcc: x@y\r\n\r\n", "ü\u2028ö", "k " * 200, "x" * 2000, "=?utf-8?q?x?=", "{email_id}"]
)
def test_a_key_in_a_field_is_always_one_field_of_ascii(key):
    claim = mail()
    claim.key = key
    Letterhead({"X-Key": "{key}"}).prepare(claim)
    lines = claim.head.decode("ascii").split("\r\n")
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
    claim = mail()
    claim.key = key
    Letterhead({"Feedback-ID": "{key}:shop", "Keywords": "{key}", "References": "<{key}@a.example>"}).prepare(claim)
    lines = [f"Feedback-ID: {written}:shop", f"Keywords: {written}", f"References: <{written}@a.example>"]
    if "@" in written:
        lines[1] = f'Keywords: "{written}"'  # a phrase of more than atoms stands in quotes (RFC 5322 §3.2.5)
    if len(written) > 66:
        assert b"=?utf-8?q?xxx" in claim.head
        lines.pop(1)
    assert set(lines) <= set(claim.head.decode().split("\r\n"))
    assert claim.fault is None


def test_a_key_that_no_line_can_hold_keeps_its_email_alone():
    claim = mail()
    claim.key = "ü" * 400
    Letterhead({"Feedback-ID": "{key}"}).prepare(claim)
    assert claim.head is None
    assert claim.fault.startswith(
        "its route's headers cannot be written: The header Feedback-ID has a part of more than"
    )


def test_a_field_that_the_message_has_is_left_to_it():
    claim = mail(b"Subject: x\r\nx-tag: mine\r\n\r\nX-Other: no field\r\n")
    Letterhead({"X-Tag": "route", "X-Other": "route"}).prepare(claim)
    assert claim.head == b"X-Other: route\r\n"


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
    claim = mail(begin + header + end)
    letterhead = Letterhead(fields)
    for _ in range(2):
        letterhead.prepare(claim)
    whole = claim.head + claim.message
    assert sorted(whole.split(b"\r\n")) == sorted((sent + begin + end).split(b"\r\n"))
    assert whole.endswith(end)
    assert claim.wire_bytes == len(claim.message)


@pytest.fixture(scope="module")
def key():
    return rsa.generate_private_key(65537, 2048)


def pem(key, form=serialization.PrivateFormat.PKCS8, passphrase=None):
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, encryption)


def table(path):
    return DkimSettings(domain="example.com", selector="s1", key_file=str(path))


@pytest.mark.parametrize("form", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL])
def test_whoever_has_the_published_record_can_verify_what_is_sent(tmp_path, key, form):
    (tmp_path / "dkim.pem").write_bytes(pem(key, form))
    letterhead = Letterhead({"Feedback-ID": "outbox", "X-SES-Tag": "a"}, load_signer(table("dkim.pem"), tmp_path))
    claim = mail(b"From: a@example.com\r\nList-Unsubscribe: <https://x>\r\nList-Unsubscribe-Post: y\r\n\r\n.hi\nyou")
    talk = Talk(claim, size=True, letterhead=letterhead)
    (content,) = talk.take_content()
    sent = (b"\r\n" + content).replace(b"\r\n..", b"\r\n.")[2:]
    asked = []

    def look_up(name, timeout=5):
        asked.append(name)
        return letterhead.signer.record.encode()

    assert dkim.verify(sent, dnsfunc=look_up)
    assert asked == [b"s1._domainkey.example.com."]
    assert not dkim.verify(sent.replace(b"Feedback-ID: outbox", b"Feedback-ID: other"), dnsfunc=look_up)
    signed = re.search(rb"h=([^;]+);", re.sub(rb"\s+", b"", sent.partition(b"bh=")[0]))[1].split(b":")
    assert {b"list-unsubscribe", b"list-unsubscribe-post", b"feedback-id"} < set(signed)
    assert b"x-ses-tag" not in signed, "what the next server takes out must not break the signature"


def test_a_key_file_with_a_byte_order_mark_and_line_ends_of_windows_can_be_used(tmp_path, key):
    (tmp_path / "dkim.pem").write_bytes(b"\xef\xbb\xbf" + pem(key).replace(b"\n", b"\r\n"))
    assert load_signer(table("dkim.pem"), tmp_path).sign(b"From: a@example.com\r\n\r\nx", head=b"")


SEEN = [
    "From", "Sender", "Reply-To", "To", "Cc", "Subject", "Date", "Message-ID", "In-Reply-To", "References",
    "MIME-Version", "Content-Type", "Content-Transfer-Encoding", "Content-Disposition", "List-Id", "List-Help",
    "List-Unsubscribe", "List-Unsubscribe-Post", "List-Post", "List-Subscribe", "List-Owner", "List-Archive",
    "Importance", "Priority", "Sensitivity", "Disposition-Notification-To", "Return-Receipt-To", "Mail-Reply-To",
    "Mail-Followup-To",
]  # fmt: skip
# What servers add on the way, and what a person who resends an email adds.
ON_THE_WAY = (
    b"Return-Path: <a@example.com>\r\n", b"Received: from a by b; Mon, 23 Nov 2026 06:00:07 +0000\r\n",
    b"Authentication-Results: b; dkim=pass\r\n", b"Delivered-To: b@example.com\r\n", b"X-Spam-Score: 0\r\n",
    b"Feedback-ID: 1.eu-west-1.AmazonSES\r\n", b"Resent-From: <b@example.com>\r\nResent-To: <c@example.com>\r\n",
)  # fmt: skip


@pytest.fixture(scope="module")
def signer(tmp_path_factory, key):
    directory = tmp_path_factory.mktemp("dkim")
    (directory / "dkim.pem").write_bytes(pem(key))
    return load_signer(table("dkim.pem"), directory)


@pytest.mark.parametrize("there", [1, 0, 2])
def test_no_field_that_a_reader_sees_can_be_added_in_front(signer, there):
    fields = [f"{name}: {'a@example.com' if name == 'From' else 'b'}\r\n".encode() for name in SEEN]
    header = b"".join([fields[0], *fields[1:] * there, b"Auto-Submitted: auto-generated\r\n"])
    message = header + b"\r\nhello\r\n"
    sent = signer.sign(message) + message

    def passes(mail):
        return dkim.verify(mail, dnsfunc=lambda *_, **__: signer.record.encode())

    assert passes(sent)
    for added in ON_THE_WAY:
        assert passes(added + sent), added
    for name, field in zip(SEEN, fields, strict=True):
        assert not passes(f"{name}: evil@example.com\r\n".encode() + sent), name
        assert not passes(f"{name.upper()}: evil@example.com\r\n".encode() + sent), name
        assert not passes(field + sent), name


def test_a_field_that_is_there_cannot_be_changed_or_taken_out(signer):
    message = b"".join(f"{name}: a@example.com\r\n".encode() for name in SEEN) + b"\r\nhello\r\n"
    sent = signer.sign(message) + message
    for name in SEEN:
        for other in (b"", f"{name}: b@example.com\r\n".encode()):
            changed = sent.replace(f"\r\n{name}: a@example.com\r\n".encode(), b"\r\n" + other)
            assert changed != sent
            assert not dkim.verify(changed, dnsfunc=lambda *_, **__: signer.record.encode()), name


@pytest.mark.parametrize("message", [b"no header at all", b" folded\r\nSubject: hello\r\n\r\nx", b""])
def test_what_cannot_be_signed_is_refused_and_never_sent_unsigned(tmp_path, key, message):
    (tmp_path / "dkim.pem").write_bytes(pem(key))
    claim = mail(message)
    talk = Talk(claim, letterhead=Letterhead({}, load_signer(table("dkim.pem"), tmp_path)))
    ((_, verdict),) = talk.desk.verdicts
    assert isinstance(verdict, Refused)
    assert verdict.reply.startswith("it cannot be signed: ")
    assert talk.wire.taken() == []


@pytest.mark.parametrize("what", ["nothing", "no key", "another kind", "a passphrase", "a public key", "a directory"])
def test_a_key_that_cannot_sign_is_one_sentence(tmp_path, key, what):
    path = tmp_path / "dkim.pem"
    public = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    content = {
        "no key": b"hello", "another kind": pem(ec.generate_private_key(ec.SECP256R1())),
        "a passphrase": pem(key, passphrase=b"x"), "a public key": key.public_key().public_bytes(*public),
    }  # fmt: skip
    if what in content:
        path.write_bytes(content[what])
    elif what == "a directory":
        path.mkdir()
    with pytest.raises(ConfigurationError) as caught:
        load_signer(table(path), tmp_path)
    (sentence,) = caught.value.faults
    assert sentence.startswith(f"dkim.key_file: {path} ")
    assert "\n" not in sentence


def test_a_route_without_such_settings_adds_nothing():
    assert Letterhead.of(Settings()) is None


# ── where mail goes ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("url", "address", "shown"),
    [
        ("lmtp://store", SmtpAddress("store", 24, implicit_tls=False, scheme="lmtp"), "lmtp://store:24"),
        ("LMTP://[::1]:2424", SmtpAddress("::1", 2424, implicit_tls=False, scheme="lmtp"), "lmtp://[::1]:2424"),
        (
            "lmtp:///run/lmtp%20socket",
            SmtpAddress("", 0, implicit_tls=False, scheme="lmtp", path="/run/lmtp socket"),
            "lmtp:///run/lmtp%20socket",
        ),
        ("file:///var/try", SmtpAddress("", 0, implicit_tls=False, scheme="file", path="/var/try"), "file:///var/try"),
    ],
)
def test_lmtp_and_a_maildir_are_addresses_too(url, address, shown):
    found = SmtpAddress.parse(url)
    assert found == address
    assert found.name == found.redacted == shown


@pytest.mark.parametrize("url", ["file://here", "file:///", "file://", "lmtp://", "lmtp://a:b@host", "lmtp://host/x"])
def test_a_url_that_is_none_is_said_with_the_mend(url):
    with pytest.raises(ValueError, match=r"; (write|end) "):
        SmtpAddress.parse(url)

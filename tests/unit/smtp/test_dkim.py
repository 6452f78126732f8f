"""DKIM signatures, checked with the published record."""

import re

import dkim
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from outbox.errors import ConfigurationError
from outbox.settings import DkimSettings
from outbox.smtp.dkim import load_signer
from outbox.smtp.route_headers import RouteHeaders
from outbox.smtp.verdict import Refused
from tests.unit.smtp.test_connection import Talk, mail


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
    headers = RouteHeaders({"Feedback-ID": "outbox", "X-SES-Tag": "a"}, load_signer(table("dkim.pem"), tmp_path))
    claim = mail(b"From: a@example.com\r\nList-Unsubscribe: <https://x>\r\nList-Unsubscribe-Post: y\r\n\r\n.hi\nyou")
    talk = Talk(claim, size=True, headers=headers)
    (content,) = talk.take_content()
    sent = (b"\r\n" + content).replace(b"\r\n..", b"\r\n.")[2:]
    asked = []

    def look_up(name, timeout=5):
        asked.append(name)
        return headers.signer.record.encode()

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
    talk = Talk(claim, headers=RouteHeaders({}, load_signer(table("dkim.pem"), tmp_path)))
    ((_, verdict),) = talk.owner.verdicts
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

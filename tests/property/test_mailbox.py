"""Settings and messages judge an address with one parser: what the settings accept can be sent, and the reverse."""

import email
import email.policy
from datetime import UTC, datetime

from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from outbox.mail.mailbox import check_address, is_plain, parse_mailbox
from outbox.mail.message import build
from outbox.settings import Settings

# No surrogates: neither TOML nor pydantic has them.
CHARACTERS = st.characters(exclude_categories=["Cs"])
NAMES = st.text(st.one_of(st.sampled_from('Aé.,;:@()[]<>"\\ \t\n\u00a0\u2028'), CHARACTERS), max_size=20)
LOCALS = st.text(st.sampled_from("abü.+-_'\"@ \u00a0"), max_size=70)
DOMAINS = st.text(st.sampled_from("abx1ü.-_@[]"), max_size=20) | st.sampled_from(
    [
        "example.com",
        "EXAMPLE.com",
        "xn--bcher-kva.example",
        "bücher.example",
        "x.invalid",
        "a.onion",
        "10.0.0.5",
        "a--b",
    ]
)
ADDRESSES = st.builds("{}@{}".format, LOCALS, DOMAINS) | st.text(CHARACTERS, max_size=20)
MAILBOXES = (
    st.builds("{}<{}>".format, NAMES, ADDRESSES)
    | st.builds('"{}" <{}>'.format, NAMES, ADDRESSES)
    | ADDRESSES
    | st.builds("{} {}".format, NAMES, ADDRESSES)
)


def accepted(key, text):
    """The value that the settings have for this text; None if they refuse it."""
    try:
        return getattr(Settings.model_validate({key: text}), key)
    except ValidationError:
        return None


def parsed(read, text):
    try:
        return read(text)
    except ValueError:
        return None


def built(mailbox):
    """The From field of a message, as Python's parser reads it."""
    raw = build(
        sender=mailbox, recipient=mailbox, subject="", text="", html=None, message_id="1@example.com",
        date=datetime(2026, 11, 30, tzinfo=UTC),
    )  # fmt: skip
    return email.message_from_string(raw.decode(), policy=email.policy.default)["From"].addresses


@given(text=MAILBOXES)
@example("Reports <a..b@example.com>")
@example("Reports <.a@example.com>")
@example("Reports <a@example.invalid>")
@example("Reports <a@10.0.0.5>")
@example(f"Reports <{'a' * 65}@example.com>")
@example("Reports <a@-example.com>")
@example('"Reports"\u00a0<a@example.com>')
@example("Re\u2028ports <a@example.com>")
def test_a_sender_that_the_settings_accept_can_be_built_into_a_message(text):
    sender = accepted("sender", text)
    if sender is not None:
        mailbox = parse_mailbox(sender)
        (found,) = built(mailbox)
        assert found.addr_spec == mailbox.address


@given(text=MAILBOXES)
def test_a_mailbox_that_messages_accept_is_accepted_as_sender_unless_it_needs_quotes_or_ascii(text):
    mailbox = parsed(parse_mailbox, text)
    is_accepted = accepted("sender", text) is not None
    assert is_accepted == (mailbox is not None and is_plain(text.strip()))


@given(text=MAILBOXES)
def test_every_mailbox_that_messages_accept_can_be_written_as_sender(text):
    mailbox = parsed(parse_mailbox, text)
    if mailbox is not None:
        escaped = mailbox.name.replace("\\", "\\\\").replace('"', '\\"')
        assert parse_mailbox(accepted("sender", f'"{escaped}" <{mailbox.address}>')) == mailbox


@given(text=ADDRESSES)
@example("a@example.invalid")
@example("ju\u0308rgen@b.example")
def test_an_address_is_accepted_by_redirect_to_as_it_is_by_generate_if_its_domain_is_in_ascii(text):
    address = parsed(check_address, text.strip())
    wanted = address if address is not None and text.strip().rpartition("@")[2].isascii() else None
    assert accepted("redirect_to", text) == wanted


@given(text=ADDRESSES)
def test_a_bounce_address_and_a_reply_to_are_accepted_if_generate_accepts_them_and_they_are_in_ascii(text):
    address = parsed(check_address, text.strip())
    wanted = address is not None and text.strip().isascii()
    assert (accepted("return_path", text) is not None) == wanted
    assert (accepted("headers", {"Reply-To": text}) is not None) == wanted

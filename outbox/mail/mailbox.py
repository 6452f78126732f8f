"""Addresses and mailboxes: checked, parsed, and written for a header field (RFC 5322 §3.4, RFC 6531, RFC 6532).

There is one parser: `outbox.settings` checks with it the addresses that it reads, so that none of them fails later.
`message` writes its own header fields with it, `structured_fields` those that routes and applications add.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from outbox.mail.header_fields import BREAKS, ENCODED_WORD_MAX, encoded_words, folded, one_line
from outbox.mail.host_name import LABEL

_ADDRESS_MAX: Final = 254  # bytes; RFC 3696 erratum 1690
_LOCAL_MAX: Final = 64  # bytes; RFC 5321 §4.5.3.1.1, RFC 6531 §3.2

_ATEXT = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\-"  # RFC 5322 §3.2.3
_UTF8 = "\u00a1-\u2027\u202a-\ud7ff\ue000-\U0010ffff"  # in a local part: RFC 6532 §3.2


def _address_of(atext: str) -> re.Pattern[str]:
    """Return the pattern of an address whose local part is made of these characters (RFC 5321 §4.1.2)."""
    return re.compile(rf"(?=.{{1,64}}@)[{atext}]+(?:\.[{atext}]+)*@{LABEL}(?:\.{LABEL})*")


_ADDRESS: Final = _address_of(_ATEXT)
_ADDRESS_UTF8: Final = _address_of(_UTF8 + _ATEXT)  # RFC 6531 §3.3
# What needs a closer look than a pattern: Punycode and other labels with "--" in third place (RFC 5890
# §2.3.1), domains that end in a number (an IP address), and names that can never receive mail (RFC 6761,
# RFC 7686, RFC 3172).
_DOUBTFUL_DOMAIN: Final = re.compile(r"[@.]..--|[@.][0-9]+$|[@.](?:invalid|onion|arpa)$", re.IGNORECASE)
# Blanks before the < belong to the name, which is stripped: a second run for them would make many blanks quadratic.
_MAILBOX: Final = re.compile(r"(?P<name>\"(?:[^\"\\]|\\.)*\" *|[^\"<>]*)<(?P<address>[^<>]*)>")
# A mailbox in the syntax of RFC 5322 §3.4, without comments and groups: punctuation of a name only in quotes.
_PLAIN_ADDRESS = rf"[{_UTF8}{_ATEXT}.]+@[A-Za-z0-9.-]+"
_PLAIN: Final = re.compile(rf"{_PLAIN_ADDRESS}|(?:\"(?:[^\"\\]|\\.)*\" *|[^\"<>,;:@()\[\]\\]*)<{_PLAIN_ADDRESS}>")
_PHRASE: Final = re.compile(rf"[{_ATEXT} ]*")


@dataclass(frozen=True, slots=True)
class Mailbox:
    """A sender or recipient: `name` may be empty, `address` is as `check_address` gives it."""

    name: str
    address: str


def check_address(text: str) -> str:
    """Return the address in the form in which it goes to the server: the domain in lower case and as A-labels.

    The domain has A-labels after a local part that is not ASCII, too, where U-labels would be as right (RFC 6531
    §3.7.3): one domain has one spelling. Such a local part is in Unicode's NFC; the server must offer SMTPUTF8 for it.

    Spaces around it are dropped, since char(n) columns have them. Dotless and test domains (`localhost`,
    `x.test`) pass: the server knows what it can deliver. No DNS.

    Raises:
        ValueError: it is not an address; the message is one sentence.

    """
    text = text.strip(" ")
    if len(text) <= _ADDRESS_MAX and _ADDRESS.fullmatch(text) and not _DOUBTFUL_DOMAIN.search(text):
        local, _, domain = text.partition("@")
        return f"{local}@{domain.lower()}"
    return _checked_closely(text)


def comparable(address: str) -> str:
    """Return the form in which addresses are compared: A to Z in lower case, the domain as A-labels.

    In SQL it is `lower(recipient COLLATE "C")`, since addresses in the outbox have their domain as A-labels already.

    Raises:
        ValueError: it is not an address.

    """
    return check_address(address).encode().lower().decode()


def _checked_closely(text: str) -> str:
    if BREAKS.search(text):
        raise ValueError(f"{text!r} is no email address: spaces and control characters cannot be in one.")
    from email_validator import EmailNotValidError, validate_email

    try:
        found = validate_email(
            text,
            check_deliverability=False,
            allow_smtputf8=True,
            strict=True,
            test_environment=True,
            globally_deliverable=False,
        )
    except EmailNotValidError as error:
        raise ValueError(f"{text!r} is no email address: {error}") from error
    if found.ascii_domain.rpartition(".")[2].isdigit():
        raise ValueError(f"{text!r} is no email address: a domain name is needed after the @, not a number.")
    address = f"{found.local_part}@{found.ascii_domain}"
    if len(found.local_part.encode()) > _LOCAL_MAX or len(address.encode()) > _ADDRESS_MAX:
        raise ValueError(
            f"{text!r} is no email address: in UTF-8 it has more than {_LOCAL_MAX} bytes before the @, "
            f"or more than {_ADDRESS_MAX} in all."
        )
    return address


def is_plain(text: str) -> bool:
    """Return True for text in the syntax of one mailbox: a name with punctuation in quotes, and a domain in ASCII.

    `parse_mailbox` reads more: names that applications compose without quotes, such as `A, B <a@example.com>`, and
    domains beyond ASCII. In settings, which a person writes, such a text may be meant as two addresses.
    """
    return _PLAIN.fullmatch(text) is not None and not BREAKS.search(text.replace(" ", ""))


def parse_mailbox(text: str) -> Mailbox:
    """Return the mailbox of `Progress reports <reports@example.com>`, `"A, B" <…>` or an address alone.

    Raises:
        ValueError: it is not one mailbox, or its address is not valid; the message is one sentence.

    """
    text = text.strip(" ")
    if BREAKS.search(text.replace(" ", "")):
        raise ValueError(f"{text!r} is not a mailbox: it has a line break or another control character.")
    if "<" not in text and ">" not in text:
        return Mailbox("", check_address(text))
    match = _MAILBOX.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a mailbox: write Name <user@example.com>, or the address alone.")
    name = match["name"].strip(" ")
    if name.startswith('"'):
        name = re.sub(r"\\(.)", r"\1", name[1:-1])
    return Mailbox(one_line(name), check_address(match["address"]))


def mailboxes_header(field: str, mailboxes: Sequence[Mailbox]) -> list[str]:
    """Return one header field of several mailboxes; nothing if there is none."""
    return [folded(field, listed([mailbox_words(field, mailbox) for mailbox in mailboxes]))] if mailboxes else []


def mailbox_header(field: str, mailbox: Mailbox) -> str:
    """Return the header field of one mailbox."""
    return folded(field, mailbox_words(field, mailbox))


def listed(items: Sequence[list[str]]) -> list[str]:
    """Return the words of a list, with a comma after each item but the last."""
    return [word for item in items[:-1] for word in (*item[:-1], f"{item[-1]},")] + [*items[-1]]


def mailbox_words(field: str, mailbox: Mailbox) -> list[str]:
    """Return a mailbox as words, between which it may be folded. ValueError for an address that was not checked."""
    if not (_ADDRESS.fullmatch(mailbox.address) or _ADDRESS_UTF8.fullmatch(mailbox.address)):
        raise ValueError(f"{mailbox.address!r} cannot stand in {field}: pass it through check_address.")
    words = phrase(mailbox.name)
    return [*words, f"<{mailbox.address}>"] if words else [mailbox.address]


def phrase(text: str) -> list[str]:
    """Return a display name as atoms, as one quoted string, or as encoded words (RFC 5322 §3.2.5, RFC 2047 §5).

    Any white space is a space: a no-break space has no meaning in a name, and parsers lose it beside another space.
    Nothing is returned for a name that is empty.
    """
    text = " ".join(one_line(text).split())
    if not text:
        return []
    # Readers decode "=?…?=" even inside quotes, and some keep the line break of a folded quoted string.
    if not text.isascii() or "=?" in text or len(text) > ENCODED_WORD_MAX:
        return encoded_words(text)
    if _PHRASE.fullmatch(text):
        return [text]
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return [f'"{escaped}"']

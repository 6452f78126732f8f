"""Addresses and mailboxes: checked, parsed, and written for a header field (RFC 5322 §3.4, RFC 6531, RFC 6532).

`message` writes its own fields with it, `structured` those that others ask for.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from outbox.mail.header_fields import BREAKS, ENCODED_WORD_MAX, encoded_words, folded, one_line

_ADDRESS_MAX = 254  # bytes; RFC 3696 erratum 1690
_LOCAL_MAX = 64  # bytes; RFC 5321 §4.5.3.1.1, RFC 6531 §3.2

_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_ADDRESS = re.compile(rf"(?=.{{1,64}}@){_ATOM}(?:\.{_ATOM})*@{_LABEL}(?:\.{_LABEL})*")
# The same with a local part in any letters (RFC 6531 §3.3), as `check_address` lets pass.
_ATOM_UTF8 = _ATOM.replace("A-Z", "\u00a1-\u2027\u202a-\ud7ff\ue000-\U0010ffffA-Z")
_ADDRESS_UTF8 = re.compile(rf"(?=.{{1,64}}@){_ATOM_UTF8}(?:\.{_ATOM_UTF8})*@{_LABEL}(?:\.{_LABEL})*")
# What needs a closer look than a pattern: Punycode and other labels with "--" in third place (RFC 5890
# §2.3.1), domains that end in a number (an IP address), and names that can never receive mail (RFC 6761,
# RFC 7686, RFC 3172).
_DOUBTFUL_DOMAIN = re.compile(r"[@.]..--|[@.][0-9]+$|[@.](?:invalid|onion|arpa)$", re.IGNORECASE)
# Blanks before the < belong to the name, which is stripped: a second run for them would make many blanks quadratic.
_SENDER = re.compile(r"(?P<name>\"(?:[^\"\\]|\\.)*\" *|[^\"<>]*)<(?P<address>[^<>]*)>")
_PHRASE = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~ -]*")


@dataclass(frozen=True, slots=True)
class Mailbox:
    """Who sends or receives: `name` may be empty, `address` is as `check_address` gives it."""

    name: str
    address: str


def check_address(text: str) -> str:
    """The address in the form in which it goes to the server: the domain in lower case and as A-labels.

    So it is too behind a local part that is not ASCII, where U-labels would be as right (RFC 6531 §3.7.3): one domain
    has one spelling. Such a local part is in Unicode's NFC; the server must offer SMTPUTF8 for it.

    Spaces around it are dropped, since char(n) columns have them. Dotless and test domains (`localhost`,
    `x.test`) pass: the server knows what it can deliver. ValueError with one sentence otherwise. No DNS.
    """
    text = text.strip(" ")
    if len(text) <= _ADDRESS_MAX and _ADDRESS.fullmatch(text) and not _DOUBTFUL_DOMAIN.search(text):
        local, _, domain = text.partition("@")
        return f"{local}@{domain.lower()}"
    return _checked_closely(text)


def comparable(address: str) -> str:
    """The one form in which addresses are compared: A to Z in lower case, the domain as A-labels. Else ValueError.

    In SQL it is `lower(recipient COLLATE "C")`, since what is in the outbox has its domain as A-labels already.
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


def parse_sender(text: str) -> Mailbox:
    """`Progress reports <reports@example.com>`, `"A, B" <…>` or the address alone; else ValueError."""
    text = text.strip(" ")
    if BREAKS.search(text.replace(" ", "")):
        raise ValueError(f"{text!r} is not a mailbox: it has a line break or another control character.")
    if "<" not in text and ">" not in text:
        return Mailbox("", check_address(text))
    match = _SENDER.fullmatch(text)
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

"""Addresses as reports write them, and their comparison with the recipient of an email."""

import re
import sys
from collections.abc import Iterator
from typing import Final
from unicodedata import category, normalize

from outbox.feedback.report_fields import untyped

# Anyone may send such a text: each expression begins where a word or a line does, and looks a bounded way ahead.
ADDRESS: Final = re.compile(r"(?<![^\s<>,;\"])[^\s<>,;\"@]{1,64}@[^\s<>,;\"]{1,255}")
AFTER_ADDRESS: Final = ".:!?'()[]"
_XTEXT: Final = re.compile(r"\+([2-6][0-9A-F]|7[0-9A-E])")  # RFC 3461 §4, without control characters
_NOT_IN_ADDRESSES: Final = frozenset(("Cc", "Cs", "Zl", "Zp"))  # control characters, surrogates, separators of lines
_UNITEXT: Final = re.compile(r"\\x\{([0-9A-Fa-f]{1,6})\}")  # RFC 6533 §3


def forms(value: str) -> Iterator[str]:
    """Yield the address in a field's value, and what it is if it is encoded as RFC 3461 or RFC 6533 encode one."""
    address = address_in(value)
    if not address:
        return
    yield normal_address(address)
    if "+" in address:
        decoded = _XTEXT.sub(lambda found: chr(int(found[1], 16)), address)
        yield normal_address(_UNITEXT.sub(_character, decoded))
    if "\\x{" in address:
        yield normal_address(_UNITEXT.sub(_character, address))


def _character(found: re.Match[str]) -> str:
    code = int(found[1], 16)
    if code > sys.maxunicode or category(chr(code)) in _NOT_IN_ADDRESSES:
        return found[0]
    return chr(code)


def address_in(value: str) -> str:
    """Return the address in a field's value: what stands in angle brackets, or the first word."""
    value = untyped(value)[:2000].rstrip(";, ")
    _, opened, rest = value.partition("<")
    if opened:
        return rest.partition(">")[0].strip()
    return value.partition(" ")[0].strip() if '"' not in value else value.strip()


def normal_address(address: str) -> str:
    """Return an address in the one form in which addresses are compared, as `mailbox.comparable` does where it can."""
    local, at, domain = normalize("NFC", address.strip()).rpartition("@")
    if not at:
        return address.strip().lower()
    local = local.rpartition(":")[2] if local.startswith("@") else local  # a source route (RFC 5321 §C)
    if len(local) > 1 and local[0] == local[-1] == '"':
        local = re.sub(r"\\(.)", r"\1", local[1:-1])
    return f"{local.encode('utf-8', 'replace').lower().decode()}@{_ascii_domain(domain.rstrip('.').lower())}"


def _ascii_domain(domain: str) -> str:
    if domain.isascii() or len(domain) > 255:  # noqa: PLR2004
        return domain
    import idna

    try:
        return idna.encode(domain, uts46=True).decode("ascii")
    except (idna.IDNAError, UnicodeError):
        return domain


def is_same_mailbox(actual: str, ours: str) -> bool:
    """Return True if X-Actual-Recipient is the recipient's own mailbox: the address, or the same name on its host."""
    local, _, domain = ours.rpartition("@")
    for form in forms(actual):
        name, at, host = form.rpartition("@")
        if form in (ours, local) or (at and name == local and is_same_domain(host, domain)):
            return True
    return False


def is_same_domain(host: str, domain: str) -> bool:
    """Return True if one of the two is the other or a part of it."""
    return host == domain or host.endswith(f".{domain}") or domain.endswith(f".{host}")

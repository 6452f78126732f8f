"""Host names and address literals, as mail servers accept them (RFC 5321 §2.3.5 and §4.1.3)."""

import ipaddress
import re
from typing import Final

LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
"""Pattern of one label of a domain name in ASCII (RFC 1035 §2.3.1)."""

_DOMAIN: Final = re.compile(rf"(?=.{{1,253}}\Z){LABEL}(?:\.{LABEL})*")
# The last label begins with a letter: "10.0.0.5" is an address, and no top-level domain is a number (RFC 3696 §2).
_FQDN: Final = re.compile(rf"(?=.{{4,253}}\Z)(?:{LABEL}\.)+(?=[A-Za-z]){LABEL}")


def is_domain(name: str) -> bool:
    """Return True for a domain name in ASCII of one label or more (RFC 1035 §2.3.1)."""
    return _DOMAIN.fullmatch(name) is not None


def is_fqdn(name: str) -> bool:
    """Return True for a fully qualified domain name (RFC 5321 §2.3.5)."""
    return _FQDN.fullmatch(name) is not None


def is_literal(name: str) -> bool:
    """Return True for an address literal: `[192.0.2.1]` or `[IPv6:2001:db8::1]` (RFC 5321 §4.1.3)."""
    found = re.fullmatch(r"\[(IPv6:)?([0-9A-Fa-f:.]+)\]", name, re.IGNORECASE)
    if found is None:
        return False
    try:
        address = ipaddress.ip_address(found[2])
    except ValueError:
        return False
    return (found[1] is None) is (address.version == 4)  # noqa: PLR2004 - IPv4

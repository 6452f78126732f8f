"""Name that this host gives in HELO, EHLO and LHLO: a fully qualified domain name, or an address literal.

Servers commonly refuse anything else, a container's host name for example (Postfix: reject_non_fqdn_helo_hostname).
RFC 5321 §4.1.4 asks a client without a name of its own for the literal of its address (§4.1.3).
"""

import ipaddress
import re
import socket
from typing import Any, Final

from outbox.mail.host_name import is_fqdn

# Names that any machine may have, so they do not identify this one.
_NOT_UNIQUE: Final = frozenset({"localdomain", "localhost", "local", "invalid"})
WITHOUT_A_NAME: Final = "localhost"  # on a Unix socket, which has no address


def name_of_host() -> str:
    """Return the system's host name. Not getfqdn(): it asks the resolver, which may not answer."""
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()).strip("-.") or WITHOUT_A_NAME


def helo_name(wanted: str | None, sockname: Any) -> str:
    """Return the name for a connection whose own address is `sockname` (`getsockname`); `wanted` is the setting."""
    if wanted is not None:
        return wanted
    host = name_of_host()
    if is_fqdn(host) and host.rpartition(".")[2].lower() not in _NOT_UNIQUE:
        return host
    return literal_of(sockname) or WITHOUT_A_NAME


def literal_of(sockname: Any) -> str | None:
    """Return the address literal of a socket's address; None for a Unix socket."""
    if not isinstance(sockname, tuple):
        return None
    try:
        address = ipaddress.ip_address(str(sockname[0]).partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return f"[IPv6:{address}]"
        address = address.ipv4_mapped
    return f"[{address}]"

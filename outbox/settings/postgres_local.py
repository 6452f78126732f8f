"""Parts of a connection to Postgres that come from this machine: the files of TLS, and the name of the user.

They are checked before a server is asked, so that an error names the parameter and the path.
"""

import getpass
import os
import ssl
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from outbox.settings.postgres_parameters import SYSTEM

# Files of TLS: parameter, environment variable, sslmodes in which the driver reads it, and what it holds.
_VERIFYING: Final = frozenset({"require", "verify-ca", "verify-full"})
_ENCRYPTING: Final = _VERIFYING | {"allow", "prefer"}
_FILES: Final = (
    ("sslrootcert", "PGSSLROOTCERT", _VERIFYING, "the certificates of authorities"),
    ("sslcrl", "PGSSLCRL", _VERIFYING, "a list of revoked certificates"),
    ("sslcert", "PGSSLCERT", _ENCRYPTING, "the client's certificate"),
    ("sslkey", "PGSSLKEY", _ENCRYPTING, "the client's key"),
)
# Bundles of the authorities that a system trusts: Debian and Alpine, Red Hat, SUSE, BSD and macOS.
_BUNDLES: Final = (
    "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem", "/usr/local/share/certs/ca-root-nss.crt",
)  # fmt: skip
_PEM: Final = b"-----BEGIN "
_HEAD: Final = 65_536  # octets in which the first certificate of a file begins, comments before it included


# Files that the driver reads from the home directory where the parameters name none; each may be missing.
_DEFAULTS: Final = ("root.crt", "root.crl", "postgresql.crt", "postgresql.key")


def resolve(
    given: Mapping[str, str], environ: Mapping[str, str] = os.environ, *, has_tcp: bool = True
) -> dict[str, str]:
    """Return the parameters with `sslrootcert=system` replaced by the path of the system's bundle.

    Without `has_tcp`, all hosts are sockets, and TLS is used only where `sslmode` asks for it.

    Raises:
        ValueError: a file that the driver would read is missing, unreadable or not PEM; the error names its parameter.

    """
    found = dict(given)
    mode = found.get("sslmode") or environ.get("PGSSLMODE") or ("prefer" if has_tcp else "disable")
    if (found.get("sslrootcert") or environ.get("PGSSLROOTCERT")) == SYSTEM:
        found["sslrootcert"] = _bundle()
    for name, variable, modes, content in _FILES:
        path = found.get(name) or environ.get(variable)
        if path and mode in modes:
            _require_pem(name if found.get(name) else variable, path, content)
    if mode in _ENCRYPTING:
        _require_readable_home()
    if mode.startswith("verify-") and not (found.get("sslrootcert") or environ.get("PGSSLROOTCERT")):
        _require_default_roots(mode)
    return found


def _require_pem(name: str, path: str, content: str) -> None:
    fix = f"name a file with {content} in PEM that this user can read"
    try:
        with Path(path).open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be read ({error.strerror}); {fix}") from error
    if _PEM not in head:
        raise ValueError(f"{name}: {path} is not PEM; {fix}")


def _require_readable_home() -> None:
    """Return True if the default files can be read or are missing; HOME may be another user's, as in containers."""
    with suppress(RuntimeError, KeyError):  # without a home directory the driver reads none
        for name in _DEFAULTS:
            path = Path.home() / ".postgresql" / name
            try:
                path.open("rb").close()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                fix = "make it readable, or set HOME to a directory of this user"
                raise ValueError(f"{path} cannot be read ({error.strerror}); {fix}") from error


def _require_default_roots(mode: str) -> None:
    """Return True if libpq's default file of authorities is there."""
    try:
        path = Path.home() / ".postgresql/root.crt"
        is_there = path.exists()
    except (RuntimeError, KeyError, OSError):  # a user without a home directory
        path, is_there = Path("~/.postgresql/root.crt"), False
    if not is_there:
        raise ValueError(
            f"sslmode={mode} needs the certificates of authorities, and {path} does not exist; write "
            "sslrootcert=system for those that this system trusts, or sslrootcert=/path/of/ca.pem"
        )


def _bundle() -> str:
    paths = ssl.get_default_verify_paths()
    for path in (os.environ.get(paths.openssl_cafile_env), paths.cafile, *_BUNDLES):
        if path and Path(path).is_file():
            return path
    raise ValueError(
        "sslrootcert=system: no bundle of trusted authorities was found on this system; install its package "
        "ca-certificates, or write sslrootcert=/path/of/ca.pem"
    )


def require_user(names: Iterable[str | None]) -> None:
    """Return True if one of these names a user, or the system has a name for the user of this process.

    Raises:
        ValueError: the user id has no name, as in containers that run under an arbitrary one.

    """
    if any(names):
        return
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        raise ValueError(
            f"names no user, and the user id {os.getuid()} of this process has no entry in /etc/passwd; "
            "write one, as in postgresql://user@host/database, or set PGUSER"
        ) from None

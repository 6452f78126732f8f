"""Logins that come from files, read again once a server refuses them, so that a rotated password needs no restart.

The files are the settings file and those that OUTBOX_<KEY>_FILE variables name. `outbox.settings` makes the sources:

    login = settings.smtp_login("")               # or the name of a route; settings.database_url.login is Postgres's
    login.current                                 # the address with the login that is used now
    if (address := login.renew()) is not None:    # after a refused login
        ...                                       # `address`, now also `login.current`, has another login: use it
    if login.has_changed(): ...                   # while pausing after a refused login: files changed, renew again

Nothing here writes or waits. Files are checked with stat(2), which costs microseconds, and read only after a change.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

Stamp = tuple[tuple[int, int, int, int] | None, ...]


def stamp_of(files: Sequence[Path]) -> Stamp:
    """Return a value that changes once one of the files is written, replaced, removed, or reached by another link.

    Symbolic links are followed: Kubernetes replaces a secret by turning the link of its directory.
    """
    return tuple(_stamp(path) for path in files)


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def age_s(files: Sequence[Path]) -> float | None:
    """Return how long ago the newest of the files was written, in seconds; None if none can be looked at."""
    written_ns = [stamp[2] for stamp in stamp_of(files) if stamp is not None]
    return time.time() - max(written_ns) / 1e9 if written_ns else None


class LoginSource(Generic[T]):
    """An address with its login, and the files that both came from. Without files it never changes."""

    def __init__(self, current: T, files: Sequence[Path], read: Callable[[], T | str]) -> None:
        """`read` returns the address that the files have now, or the reason why it cannot be used."""
        self.current = current
        self.problem = ""
        """Reason why the files' newest content is not used, or empty."""
        self.files = tuple(files)
        self._read = read
        self._seen: Stamp | None = None

    def has_changed(self) -> bool:
        """Return True if a file has changed since `renew` last read it, or if `renew` has not read it yet."""
        return bool(self.files) and stamp_of(self.files) != self._seen

    def renew(self) -> T | None:
        """Read the files again if they changed; return the address if it differs from `current`, else None."""
        if not self.files:
            return None
        stamp = stamp_of(self.files)  # before reading, so that a change while it is read is a change afterwards
        if stamp == self._seen:
            return None
        found = self._read()
        self._seen = stamp
        self.problem = found if isinstance(found, str) else ""
        if isinstance(found, str) or found == self.current:
            return None
        self.current = found
        return found

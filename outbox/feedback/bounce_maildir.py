"""Maildir of bounces: each message is read once, also after a kill, and one that crashes the process is set aside."""

import fcntl
import os
import re
import stat
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import asyncpg

from outbox.database.connection import Connection, is_lost
from outbox.database.values import storable
from outbox.errors import ConfigurationError
from outbox.feedback.bounces import Outcome, Policy, Read, record
from outbox.feedback.dsn import READ_MAX, parse_bounce

FAILURES_MAX: Final = 2  # of one message, before it is set aside
FAILURES_BYTES_MAX: Final = 1_000_000
LOCK_FILE: Final = "outbox-bounce.lock"


async def read_maildir(connection: Connection, directory: Path, *, policy: Policy) -> AsyncIterator[Read]:
    """Read the messages in `new` of a Maildir, and move each to `cur` once its result is committed.

    Messages that were read get the flag S (seen), and also F (flagged) if they could not be verified or read. One
    process reads a directory at a time; it ends at once if another has the lock, on this server or, if the file system
    has locks, on another. After a kill a message is read again. A message whose reading fails or crashes the process
    twice is moved to `cur` with F but not S, so that it does not block others.

    Raises:
        ConfigurationError: the directory is not a Maildir, or its lock cannot be taken.

    """
    new, cur = directory / "new", directory / "cur"
    for path in (new, cur):
        if not path.is_dir():
            raise ConfigurationError(f"DIR: {directory} is no Maildir, since it has no {path.name}; name one that is.")
    with _locked(directory) as failures:
        if failures is None:
            yield Read(Outcome.BUSY, f"{directory} is being read by another process; nothing was done.")
            return
        for name in _names(new):
            found = await _read_file(connection, new / name, failures, policy)
            if found is not None:
                yield _moved(found, new / name, cur)
        failures.keep_only(_names(new))


async def _read_file(connection: Connection, path: Path, failures: "Failures", policy: Policy) -> Read | None:
    """Read one file; return None if it is gone. It counts as failed while it is parsed, in case the process crashes."""
    name, before = storable(path.name), failures.of(path.name)
    if before >= FAILURES_MAX:
        return Read(Outcome.SET_ASIDE, f"{name}: reading it failed {before} times; it is in cur, flagged: look at it.")
    try:
        failures.note(path.name, before + 1)
        bounce = parse_bounce(_bytes_of(path))
        failures.note(path.name, before)
        found = await record(connection, bounce, name=name, policy=policy)
    except FileNotFoundError:  # moved by hand, or by a mail reader
        found = None
    except _FileError as error:
        found = Read(Outcome.STAYS, f"{name}: it cannot be read ({error}); it stays where it is.")
    except ValueError as error:  # also asyncpg's for a value that it cannot encode
        found = Read(Outcome.UNREADABLE, f"{name}: {error}; nothing was changed.")
    except Exception as error:
        if is_lost(error) or (isinstance(error, asyncpg.PostgresError) and not isinstance(error, asyncpg.DataError)):
            failures.note(path.name, before)
            raise  # a problem of the database, which would fail the next message as well
        failures.note(path.name, before + 1)
        reason = f"{type(error).__name__}: {error}"
        return Read(Outcome.STAYS, f"{name}: reading it failed ({reason}); it stays and is tried again once.")
    failures.note(path.name, 0)
    return found


class _FileError(Exception):
    """File that the file system cannot read."""


def _bytes_of(path: Path) -> bytes:
    """Return the first `READ_MAX` bytes of a file. Pipes and devices do not block it.

    Raises:
        FileNotFoundError: it is gone.
        _FileError: it cannot be read.
        ValueError: it is not a file.

    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                with os.fdopen(descriptor, "rb", closefd=False) as file:
                    return file.read(READ_MAX)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _FileError(error.strerror) from error
    raise ValueError("it is not a file")


def _moved(found: Read, path: Path, cur: Path) -> Read:
    """Move a message to `cur` with the flags of its outcome; return the result to report."""
    flags = {Outcome.SET_ASIDE: "F", Outcome.UNBELIEVED: "FS", Outcome.UNREADABLE: "FS"}.get(found.outcome, "S")
    if found.outcome is Outcome.STAYS:
        return found
    try:
        path.rename(cur / f"{path.name.partition(':')[0]}:2,{flags}")
    except FileNotFoundError:
        pass  # moved by hand, or by a mail reader
    except OSError as error:
        return Read(Outcome.STAYS, f"{path.name}: it cannot be moved to cur ({error.strerror}); it is read again.")
    return found


class Failures:
    """Number of failures of each message of a directory, kept in the lock file, so that it survives a kill.

    Written in place and not synced: it has to survive the process, not the machine.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        lines = os.pread(descriptor, FAILURES_BYTES_MAX, 0).decode("utf-8", "replace").splitlines()
        words = [line.split(" ", 1) for line in lines]
        self._counts = {one[1]: int(one[0]) for one in words if len(one) > 1 and re.fullmatch("[0-9]{1,9}", one[0])}

    def of(self, name: str) -> int:
        """Return how often reading the message failed."""
        return self._counts.get(_line(name), 0)

    def note(self, name: str, count: int) -> None:
        """Record how often reading it failed; 0 forgets it."""
        if self.of(name) != count:
            self._counts[_line(name)] = count
            self._write()

    def keep_only(self, names: Sequence[str]) -> None:
        """Forget the messages that are not there any more."""
        there = {_line(name) for name in names}
        self._counts = {name: count for name, count in self._counts.items() if name in there}
        self._write()

    def _write(self) -> None:
        self._counts = {name: count for name, count in self._counts.items() if count}
        made = "".join(f"{count} {name}\n" for name, count in self._counts.items()).encode()
        with suppress(OSError):  # a full disk: reading matters more than counting
            os.pwrite(self._descriptor, made, 0)
            os.ftruncate(self._descriptor, len(made))


def _line(name: str) -> str:
    """Return the name of a file as one line of UTF-8."""
    return "?".join(storable(name).splitlines())


@contextmanager
def _locked(directory: Path) -> "Iterator[Failures | None]":
    """Hold the lock of a directory and yield its failures; None if another process has it. The process's end frees it.

    Raises:
        ConfigurationError: the lock's file cannot be written or is no file, or the file system has no locks.

    """
    path = directory / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"DIR: {path} cannot be written ({error.strerror}); let this user write to {directory}."
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigurationError(f"DIR: {path} is not a file; remove it.")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        except OSError as error:
            raise ConfigurationError(
                f"DIR: {path} cannot be locked ({error.strerror}); use a Maildir on a file system with locks."
            ) from error
        yield Failures(descriptor)
    finally:
        os.close(descriptor)


def _names(new: Path) -> Sequence[str]:
    try:
        return sorted(path.name for path in new.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ConfigurationError(f"DIR: {new} cannot be read ({error.strerror}); let this user read it.") from error

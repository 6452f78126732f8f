"""Returned bounces and complaints: verified, and recorded once.

A bounce must prove the email that it is about: by the token that was sent with the email (`verp`), which Postgres
checks with a key that only the schema's owner reads, or by its Message-ID, if outbox made that unpredictably. An
address or a guessable Message-ID proves nothing: otherwise anyone could stop the mail of another person.

A token belongs to one recipient. All recipients of a copy share the Message-ID, so each could forge the bounce of
another: such a bounce is written to the trail and suppresses no address.
"""

import fcntl
import os
import re
import stat
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import asyncpg

from outbox.database.connection import is_lost
from outbox.database.values import storable
from outbox.errors import ConfigurationError
from outbox.feedback.dsn import READ_MAX, Bounce, Kind, normal_address, take_apart
from outbox.mail.verp import former_token_of, former_tokens_in, tokens_in
from outbox.relay.suppression import Reason

ID_MAX: Final = 2**63 - 1
TOKENS_MAX: Final = 20
COPIES_MAX: Final = 1000  # of one message to further recipients that are searched
FAILURES_MAX: Final = 2  # of one message, before it is set aside
FAILURES_BYTES_MAX: Final = 1_000_000
LOCK_FILE: Final = "outbox-bounce.lock"

# As `outbox.put` and `generate` make one: the email's id, or that of the first copy, and 64 random bits.
_UNPREDICTABLE: Final = re.compile(r"<([1-9][0-9]{0,18})\.[0-9a-f]{16}@[^<>\s]{1,900}>")


class Outcome(StrEnum):
    """Result of reading one message."""

    HARD = "hard"
    SOFT = "soft"
    COMPLAINED = "complained"
    AGAIN = "again"
    OTHER = "other"
    UNBELIEVED = "unbelieved"
    UNREADABLE = "unreadable"
    SET_ASIDE = "set_aside"
    STAYS = "stays"
    BUSY = "busy"

    @property
    def is_fault(self) -> bool:
        """Return True if a person should look at it."""
        return self in (Outcome.UNBELIEVED, Outcome.UNREADABLE, Outcome.SET_ASIDE, Outcome.STAYS)


@dataclass(frozen=True, slots=True)
class Read:
    """Result of one message, and a sentence about it."""

    outcome: Outcome
    sentence: str


@dataclass(frozen=True, slots=True)
class Sent:
    """The email that came back."""

    id: int
    key: str
    recipient: str
    message_id: str


@dataclass(frozen=True, slots=True)
class Proof:
    """Email that a bounce proves to be about. `shared` is True if recipients of other copies have the same proof."""

    email: Sent
    shared: bool


# $1: tokens. The first that is valid counts.
PROVED: Final = """
SELECT m.id, m.key, m.recipient, m.message_id FROM unnest($1::text[]) WITH ORDINALITY AS t (token, place)
  JOIN outbox.email m ON m.id = outbox.bounce_email(t.token) ORDER BY t.place LIMIT 1
"""

EMAILS: Final = "SELECT id, key, recipient, message_id FROM outbox.email WHERE id = ANY ($1::bigint[])"
# All copies of one message have the same Message-ID, which begins with the id of the first.
COPIES: Final = """
SELECT m.id, m.key, m.recipient, m.message_id FROM generate_series(2, $3::integer) AS n
 CROSS JOIN LATERAL (SELECT id, key, recipient, message_id FROM outbox.email WHERE key = $1 || '#' || n OFFSET 0) m
 WHERE m.message_id = $2
"""


async def find(connection: Any, bounce: Bounce) -> Proof | None:
    """Return the email that a bounce proves to be about; None if it proves nothing."""
    if tokens := tokens_in(bounce.evidence)[:TOKENS_MAX]:
        row = await connection.fetchrow(PROVED, tokens)
        if row is not None:
            return Proof(Sent(*row), shared=False)
    return await _by_message_id(connection, bounce)


async def _by_message_id(connection: Any, bounce: Bounce) -> Proof | None:
    """Return the email whose unpredictable Message-ID a bounce shows, or a digest of it (a token without a key)."""
    former = dict(former_tokens_in(bounce.evidence)[:TOKENS_MAX])
    wanted = {*former, *(number for one in bounce.message_ids if (number := _first_of(one)) is not None)}
    rows = [Sent(*row) for row in await connection.fetch(EMAILS, [number for number in wanted if number <= ID_MAX])]
    for one in rows:
        shown = one.message_id in bounce.message_ids
        digest = former.get(one.id) == former_token_of(one.id, one.message_id)
        number = _first_of(one.message_id)
        first: Sent | None = one
        if not (shown or digest) or number is None or number > ID_MAX:
            continue
        if number != one.id:
            row = await connection.fetchrow(EMAILS, [number])
            first = Sent(*row) if row is not None and row["message_id"] == one.message_id else None
        if first is not None:
            return await _of_copies(connection, first, one if digest else None, bounce)
    return None


def _first_of(message_id: str) -> int | None:
    """Return the id that an unpredictable Message-ID begins with; None if it is another kind of Message-ID."""
    found = _UNPREDICTABLE.fullmatch(message_id)
    return int(found[1]) if found is not None else None


async def _of_copies(connection: Any, first: Sent, one: Sent | None, bounce: Bounce) -> Proof | None:
    """Return which copy of a message a bounce is about; if there are several, it has to name the recipient."""
    copies = [Sent(*row) for row in await connection.fetch(COPIES, first.key, first.message_id, COPIES_MAX)]
    if one is None and copies:
        named = {address for notice in bounce.notices for address in notice.addresses}
        one = next((copy for copy in (first, *copies) if normal_address(copy.recipient) in named), None)
    if one is None and not copies:
        one = first
    return Proof(one, shared=bool(copies)) if one is not None else None


# One statement, so one commit: a bounce is written completely or not at all, and only once. $8: others cannot have
# written it; $9: it counts towards `bounces_max`.
RECORD: Final = """
WITH new AS (
    INSERT INTO outbox.bounce (email, message, kind, status, proves, counts) VALUES ($1, $2, $3, $4, $8, $9)
    ON CONFLICT (email, message) DO NOTHING RETURNING email
), trail AS (
    INSERT INTO outbox.attempt (email, attempt, verdict, reply)
    SELECT n.email, coalesce(d.attempt, 0), 'bounced', $5
      FROM new n LEFT JOIN outbox.delivery d ON d.email = n.email
), listed AS (
    INSERT INTO outbox.suppression (address, reason, who, why, email)
    SELECT lower(m.recipient COLLATE "C"), $6, 'outbox bounce', $7, m.id
      FROM new n JOIN outbox.email m ON m.id = n.email WHERE $6::text IS NOT NULL
    ON CONFLICT (address, report) DO NOTHING RETURNING address
)
SELECT EXISTS (SELECT FROM new) AS is_new, EXISTS (SELECT FROM listed) AS is_listed
"""

# $1 an address, $2 seconds, $3 bounces_max, $4 what the last bounce said. The address goes onto the list if so many
# different emails to it failed. `lower` without a collation is what the index on recipients has, and the aggregate
# keeps the plan at one look-up for each email, whatever the statistics say. The statement runs after the commit of the
# bounce, so of two processes that record one each, the later counts both.
LIST_COUNTED: Final = """
WITH counted AS (
    SELECT count(*) AS emails, max(m.id) AS email FROM outbox.email m
     WHERE lower(m.recipient) = lower($1::text) AND lower(m.recipient COLLATE "C") = lower($1::text COLLATE "C")
       AND (SELECT bool_or(b.counts) FROM outbox.bounce b
             WHERE b.email = m.id AND b.at > now() - $2 * interval '1 second')
), listed AS (
    INSERT INTO outbox.suppression (address, reason, who, why, email)
    SELECT lower($1::text COLLATE "C"), $5, 'outbox bounce',
           emails || CASE WHEN emails = 1 THEN ' email' ELSE ' emails' END || ' bounced ' || $4::text, email
      FROM counted WHERE emails >= $3::integer
    ON CONFLICT (address, report) DO NOTHING RETURNING address
)
SELECT emails FROM counted WHERE EXISTS (SELECT FROM listed)
"""

STATEMENTS: Final = (PROVED, EMAILS, COPIES, RECORD, LIST_COUNTED)
SETTLE: Final = "SELECT outbox.settle_bounced($1)"
SETTLE_ALL: Final = "SELECT outbox.settle_bounced()"

_WORDS: Final = {
    Kind.HARD: "bounced for good",
    Kind.SOFT: "bounced, perhaps for now",
    Kind.COMPLAINED: "its reader complained",
}
_REASONS: Final = {Kind.HARD: Reason.BOUNCED, Kind.COMPLAINED: Reason.COMPLAINED}


@dataclass(frozen=True, slots=True)
class Policy:
    """Effect of bounces on the suppression list.

    Without `suppressing` the list does not change. `bounces_max` different emails to an address that failed within
    `within_s` put it onto the list, although none of the bounces says that it does not exist; None is never.
    """

    suppressing: bool = True
    bounces_max: int | None = None
    within_s: float = 0.0
    within: str = ""


async def read(connection: Any, raw: bytes, *, name: str, policy: Policy = Policy()) -> Read:
    """Read one message and record what it proves."""
    try:
        bounce = take_apart(raw)
    except ValueError as error:
        return Read(Outcome.UNREADABLE, f"{name}: {error}; nothing was changed.")
    return await _believe(connection, bounce, name=name, policy=policy)


async def settle_doubts(connection: Any) -> int:
    """Settle as sent what came into doubt after its bounce was read; return how many emails that were.

    A server may send a bounce before the relay gives up waiting for its reply.
    """
    return int(await connection.fetchval(SETTLE_ALL))


async def _believe(connection: Any, bounce: Bounce | None, *, name: str, policy: Policy) -> Read:
    if bounce is None:
        return Read(Outcome.OTHER, f"{name}: it is neither a bounce nor a complaint; nothing was changed.")
    proof = await find(connection, bounce)
    if proof is None:
        return Read(
            Outcome.UNBELIEVED,
            f"{name}: it cannot be verified, since it has neither a valid token nor the unpredictable Message-ID of an "
            "email that outbox sent to its recipient; nothing was changed.",
        )
    return await _record(connection, proof, bounce, policy)


async def _record(connection: Any, proof: Proof, bounce: Bounce, policy: Policy) -> Read:
    """Record a bounce that was verified, and what follows from it.

    Each statement is idempotent and commits by itself, so after a kill in between the message is read again.
    """
    sent = proof.email
    found = bounce.about(sent.recipient)
    said = storable(found.said) or "it gives no reason"
    suppressing = policy.suppressing and not proof.shared
    reason = _REASONS.get(found.kind) if suppressing else None
    counts = suppressing and found.counts
    is_new, is_listed = await connection.fetchrow(
        RECORD,
        sent.id,
        bounce.identity,
        found.kind.value,
        found.status,
        f"{_WORDS[found.kind]}: {said}",
        reason and reason.value,
        said,
        not proof.shared,
        counts,
    )
    bounced = await _list_counted(connection, sent, said, policy) if counts else None
    is_settled = await connection.fetchval(SETTLE, sent.id) > 0
    if not (is_new or is_settled or bounced):
        return Read(Outcome.AGAIN, f"{sent.key}: this bounce was read before; nothing was changed.")
    if is_listed:
        follows = f"{sent.recipient} gets no more email"
    elif bounced is not None:
        follows = f"{sent.recipient} gets no more email, since {_emails(bounced)} to it bounced within {policy.within}"
    elif proof.shared and found.kind in _REASONS:
        follows = (
            f"{sent.recipient} is still written to, since others who got a copy could say this; see outbox suppress"
        )
    elif reason is not None:
        follows = f"{sent.recipient} is on the suppression list already"
    else:
        follows = f"{sent.recipient} is still written to"
    if is_settled:
        follows += "; the email was in doubt and is sent now, since the bounce proves that a server accepted it"
    return Read(Outcome(found.kind.value), f"{sent.key}: {_WORDS[found.kind]} ({said}); {follows}.")


def _emails(count: int) -> str:
    return f"{count:,} email{'' if count == 1 else 's'}"


async def _list_counted(connection: Any, sent: Sent, said: str, policy: Policy) -> int | None:
    """Suppress the recipient if too many emails to it failed; return how many did, None if it is not suppressed."""
    if policy.bounces_max is None:
        return None
    emails: int | None = await connection.fetchval(
        LIST_COUNTED,
        sent.recipient,
        policy.within_s,
        policy.bounces_max,
        f"within {policy.within}, the last one with {said}",
        Reason.BOUNCED.value,
    )
    return emails


async def read_maildir(connection: Any, directory: Path, *, policy: Policy = Policy()) -> AsyncIterator[Read]:
    """Read the messages in `new` of a Maildir, and move each to `cur` once its result is committed.

    Messages that were read get the flag S (seen), and also F (flagged) if they could not be verified or read. One
    process reads a directory at a time; it ends at once if another has the lock, on this server or, if the file system
    has locks, on another. After a kill a message is read again. A message whose reading fails or crashes the process
    twice is moved to `cur` with F but not S, so that it does not block others.

    Raises:
        ConfigurationError: the directory is not a Maildir, or its lock cannot be taken.

    """
    new, cur = directory / "new", directory / "cur"
    for place in (new, cur):
        if not place.is_dir():
            raise ConfigurationError(f"DIR: {directory} is no Maildir, since it has no {place.name}; name one that is.")
    with _locked(directory) as failures:
        if failures is None:
            yield Read(Outcome.BUSY, f"{directory} is being read by another process; nothing was done.")
            return
        for name in _names(new):
            found = await _read_file(connection, new / name, failures, policy)
            if found is not None:
                yield _moved(found, new / name, cur)
        failures.keep_only(_names(new))


async def _read_file(connection: Any, path: Path, failures: "Failures", policy: Policy) -> Read | None:
    """Read one file; return None if it is gone. It counts as failed while it is parsed, in case the process crashes."""
    name, before = storable(path.name), failures.of(path.name)
    if before >= FAILURES_MAX:
        return Read(Outcome.SET_ASIDE, f"{name}: reading it failed {before} times; it is in cur, flagged: look at it.")
    try:
        failures.note(path.name, before + 1)
        bounce = take_apart(_bytes_of(path))
        failures.note(path.name, before)
        found = await _believe(connection, bounce, name=name, policy=policy)
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

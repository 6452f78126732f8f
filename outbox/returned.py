"""What came back, believed or not, and written once: a bounce is only believed about an email that it proves to know.

The proof is a token (`verp`) or the Message-ID, which only those know who got the email. An address alone proves
nothing: whoever can write to us could else end anybody's mail. Where several got copies of one message each knows as
much as the others, so a bounce of one is told in its trail, and suppresses nobody.
"""

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from outbox.bounce import READ_MAX, Bounce, Kind, Notice, take_apart
from outbox.database import storable
from outbox.errors import ConfigurationError
from outbox.suppression import Reason
from outbox.verp import emails_in, token_of

ID_MAX: Final = 2**63 - 1
TOKENS_MAX: Final = 20
COPIES_MAX: Final = 1000  # of one message to further recipients, that are looked through


class Outcome(StrEnum):
    """What became of a message that was read."""

    HARD = "hard"
    SOFT = "soft"
    COMPLAINED = "complained"
    AGAIN = "again"
    OTHER = "other"
    UNBELIEVED = "unbelieved"
    UNREADABLE = "unreadable"

    @property
    def is_fault(self) -> bool:
        """Whether a person may want to look at it."""
        return self in (Outcome.UNBELIEVED, Outcome.UNREADABLE)


@dataclass(frozen=True, slots=True)
class Read:
    """A message that was read, and a sentence about it."""

    outcome: Outcome
    sentence: str


@dataclass(frozen=True, slots=True)
class Sent:
    """The email that came back."""

    id: int
    key: str
    recipient: str
    message_id: str


EMAILS: Final = "SELECT id, key, recipient, message_id FROM outbox.email WHERE id = ANY ($1::bigint[])"
# All copies of one message bear one Message-ID, which begins with the id of the first.
COPIES: Final = """
SELECT m.id, m.key, m.recipient, m.message_id FROM generate_series(2, $3::integer) AS n
  JOIN outbox.email m ON m.key = $1 || '#' || n WHERE m.message_id = $2
"""

# Whether others got a copy, who know what this one's recipient knows: `key`, `key#2` and so on.
SHARED: Final = """
SELECT EXISTS (SELECT FROM outbox.email WHERE key IN ($1, $1 || '#2') AND id <> $2 AND message_id = $3)
"""


async def find(connection: Any, bounce: Bounce) -> Sent | None:
    """The email that a bounce proves to be about; None if it proves nothing."""
    tokens = emails_in(bounce.evidence)[:TOKENS_MAX]
    ids = [int(found[1]) for one in bounce.message_ids if (found := re.match(r"<([1-9][0-9]{0,18})\.", one))]
    wanted = [number for number in {*(number for number, _ in tokens), *ids} if number <= ID_MAX]
    rows = [Sent(*row) for row in await connection.fetch(EMAILS, wanted)] if wanted else []
    for one in rows:
        if (one.id, token_of(one.id, one.message_id)) in tokens:
            return one
    for one in rows:
        if one.message_id in bounce.message_ids:
            return await _whose(connection, one, bounce)
    return None


async def _whose(connection: Any, first: Sent, bounce: Bounce) -> Sent | None:
    """Of the copies of a message that which a bounce is about: it has to say to whom, if there are several."""
    copies = [Sent(*row) for row in await connection.fetch(COPIES, first.key, first.message_id, COPIES_MAX)]
    if not copies:
        return first
    named = {address for notice in bounce.notices for address in notice.addresses}
    return next((one for one in (first, *copies) if one.recipient.lower() in named), None)


# One statement, so one commit: whatever ends it, all of a bounce is written or nothing, and a second time nothing is.
RECORD: Final = """
WITH new AS (
    INSERT INTO outbox.bounce (email, message, kind, status) VALUES ($1, $2, $3, $4)
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

_WORDS: Final = {
    Kind.HARD: "bounced for good",
    Kind.SOFT: "bounced, perhaps for now",
    Kind.COMPLAINED: "its reader complained",
}
_REASONS: Final = {Kind.HARD: Reason.BOUNCED, Kind.COMPLAINED: Reason.COMPLAINED}


async def read(connection: Any, raw: bytes, *, name: str, suppressing: bool = True) -> Read:
    """Read one message, and write what it proves. Without `suppressing` nobody comes onto the suppression list."""
    try:
        bounce = take_apart(raw)
    except ValueError as error:
        return Read(Outcome.UNREADABLE, f"{name}: {error}; nothing was changed.")
    if bounce is None:
        return Read(Outcome.OTHER, f"{name}: it is no bounce and no complaint; nothing was changed.")
    sent = await find(connection, bounce)
    notice = bounce.about(sent.recipient) if sent is not None else None
    if sent is None or notice is None:
        return Read(
            Outcome.UNBELIEVED,
            f"{name}: it cannot be believed, since it has no token and no Message-ID of an email of ours that it would "
            "be about; nothing was changed.",
        )
    first = re.sub("#[0-9]+$", "", sent.key)
    is_shared = await connection.fetchval(SHARED, first, sent.id, sent.message_id)
    return await _record(connection, sent, bounce, notice, suppressing=suppressing and not is_shared, shared=is_shared)


async def _record(
    connection: Any, sent: Sent, bounce: Bounce, notice: Notice, *, suppressing: bool, shared: bool
) -> Read:
    said = storable(notice.said) or "it does not say why"
    reason = _REASONS.get(notice.kind) if suppressing else None
    is_new, is_listed = await connection.fetchrow(
        RECORD,
        sent.id,
        bounce.identity,
        notice.kind.value,
        notice.status,
        f"{_WORDS[notice.kind]}: {said}",
        reason and reason.value,
        said,
    )
    if not is_new:
        return Read(Outcome.AGAIN, f"{sent.key}: this bounce was read before; nothing was changed.")
    if is_listed:
        follows = f"{sent.recipient} gets no more email"
    elif shared and notice.kind in _REASONS:
        follows = (
            f"{sent.recipient} is still written to, since others who got a copy could say this; see outbox suppress"
        )
    elif reason is not None:
        follows = f"{sent.recipient} is on the suppression list already"
    else:
        follows = f"{sent.recipient} is still written to"
    return Read(Outcome(notice.kind.value), f"{sent.key}: {_WORDS[notice.kind]} ({said}); {follows}.")


async def read_maildir(connection: Any, directory: Path, *, suppressing: bool = True) -> AsyncIterator[Read]:
    """Read what is in `new` of a Maildir, and move each message to `cur` once what it says is committed.

    Seen (S) is what was read, flagged (F) beside it what could not be believed or read. Any number of servers may do
    this at once: both may read a message, one of them writes it, and one moves it. After a kill it is read again.

    Raises:
        ConfigurationError: the directory is no Maildir.

    """
    new, cur = directory / "new", directory / "cur"
    for place in (new, cur):
        if not place.is_dir():
            raise ConfigurationError(f"DIR: {directory} is no Maildir, since it has no {place.name}; name one that is.")
    for name in _names(new):
        try:
            with (new / name).open("rb") as file:
                raw = file.read(READ_MAX)
        except FileNotFoundError:
            continue  # another server has moved it
        except OSError as error:
            yield Read(Outcome.UNREADABLE, f"{name}: it cannot be read ({error.strerror}); it stays where it is.")
            continue
        found = await read(connection, raw, name=name, suppressing=suppressing)
        try:
            (new / name).rename(cur / f"{name.partition(':')[0]}:2,{'F' if found.outcome.is_fault else ''}S")
        except FileNotFoundError:
            if found.outcome is Outcome.AGAIN:
                continue  # another server has read it, written it and moved it
        except OSError as error:
            yield Read(Outcome.UNREADABLE, f"{name}: it cannot be moved to cur ({error.strerror}); it is read again.")
            continue
        yield found


def _names(new: Path) -> Sequence[str]:
    try:
        return sorted(path.name for path in new.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ConfigurationError(f"DIR: {new} cannot be read ({error.strerror}); let this user read it.") from error

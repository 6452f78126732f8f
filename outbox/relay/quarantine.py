"""Quarantine of rows that cannot be read or written, by id, so that they never stop other rows.

A relay's statements move many rows at once, and one row with invalid data makes the whole statement fail: an attempt
that has reached the largest integer, a date outside a CHECK that is newer than the row, bytes that are not text. Then
the statement is repeated row by row (`sift`), and a row that fails alone is quarantined: dead if its email was surely
not sent, in doubt without a time limit if it may have been. Its trail gives the reason.

A row that cannot even be quarantined is skipped by this relay for `LEFT_OUT_S`, and logged each time.
"""

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import asyncpg

from outbox.database.connection import LOST_SESSION, Connection
from outbox.database.values import storable
from outbox.log import Events
from outbox.mail.delivery_state import DeliveryState

log = Events("outbox.relay")

# A delivery that so many relays died with is a suspect: a relay holds one of them at a time, so that a guilty one
# takes no other delivery down with it. After QUARANTINE_AFTER deaths in all it is quarantined: dead, until a person
# sends it again. The index `delivery_suspect` in schema.sql repeats the 3.
SUSPECT_AFTER: Final = 3
QUARANTINE_AFTER: Final = 6
SUSPECT: Final = f"orphaned >= {SUSPECT_AFTER}"
UNSUSPECTED: Final = f"orphaned < {SUSPECT_AFTER}"

REASON_MAX: Final = 500  # characters
LEFT_OUT_S: Final = 60.0
LEFT_OUT_MAX: Final = 10_000

# Classes of SQLSTATE whose errors come from what a row holds (PostgreSQL docs, appendix A): data exception, integrity
# constraint violation, program limit exceeded, raised by a user's trigger, internal error (of which corrupted
# data is one). All others mean a problem of the server, the session or the schema: no row is to blame.
_OF_A_ROW: Final = ("22", "23", "54", "P0", "XX")
_UNREADABLE_BLOCK: Final = "58030"
# What asyncpg raises while it decodes a value. The statement has been committed by then.
UNDECODABLE: Final = (ValueError, OverflowError)


def is_of_a_row(error: BaseException) -> bool:
    """Return True if a row may be to blame for the error of a statement, rather than the server or the session."""
    if isinstance(error, UNDECODABLE):
        return True
    if not isinstance(error, asyncpg.PostgresError) or isinstance(error, LOST_SESSION):
        return False
    state = getattr(error, "sqlstate", None) or ""
    return state[:2] in _OF_A_ROW or state == _UNREADABLE_BLOCK


# $1 email, $2 reason, $3 the state of what was marked already, $4 relays whose rows may be changed besides free ones.
# Whatever the row holds, the new values fit its columns and CHECKs.
QUARANTINE: Final = """
WITH found AS (
    SELECT email,
           CASE WHEN state = 'pending' THEN 'dead' ELSE $3 END AS state,
           CASE WHEN state = 'pending' THEN least(greatest(attempt, 0)::bigint + 1, 2147483647)::integer
                ELSE greatest(attempt, 1) END AS attempt,
           CASE WHEN state <> 'pending' AND $3 = 'in_doubt' THEN 'infinity'::timestamptz
                WHEN due_at >= '1970-01-01 UTC' AND due_at < '3000-01-01 UTC' THEN due_at
                ELSE now() END AS due_at,
           CASE WHEN send_before < '3000-01-01 UTC' THEN greatest(send_before, '1970-01-01 UTC') END AS send_before,
           CASE WHEN state <> 'pending' THEN coalesce(relay, 0) END AS relay
      FROM outbox.delivery
     WHERE email = $1 AND settled_at IS NULL AND state IN ('pending', 'sending', 'in_doubt')
       AND (relay IS NULL OR relay = ANY ($4::integer[]) OR state = 'in_doubt')
       FOR UPDATE SKIP LOCKED
), ended AS (
    UPDATE outbox.delivery d
       SET state = f.state, attempt = f.attempt, due_at = f.due_at, send_before = f.send_before, relay = f.relay,
           withdrawn = least(greatest(d.withdrawn, 0), f.attempt - 1),
           orphaned = least(greatest(d.orphaned, 0), 1000),
           settled_at = CASE WHEN f.state <> 'in_doubt' THEN now() END,
           doubted_at = CASE WHEN f.state = 'in_doubt' THEN now() END,
           marked_at = CASE WHEN f.state = 'in_doubt' THEN coalesce(d.marked_at, now()) ELSE d.marked_at END,
           paused = NULL
      FROM found f WHERE d.email = f.email
    RETURNING d.email, d.attempt, d.relay, d.state, CASE WHEN d.relay IS NOT NULL THEN d.marked_at END AS marked_at
), trail AS (
    INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply, marked_at)
    SELECT email, attempt, relay, CASE state WHEN 'dead' THEN 'quarantined' WHEN 'sent' THEN 'accepted' ELSE state END,
           $2, marked_at
      FROM ended
)
SELECT state FROM ended
"""
KEY: Final = "SELECT left(key, 200) FROM outbox.email WHERE id = $1"

STATEMENTS: Final = (QUARANTINE, KEY)


@dataclass(slots=True)
class Quarantine:
    """Rows that a relay's session cannot read or write; `relays` are those whose rows it may change."""

    relays: tuple[int, ...] = ()
    count: int = 0
    """Number of rows found that cannot be read or written."""
    _left_out: dict[int, float] = field(default_factory=dict)

    @property
    def left_out(self) -> list[int]:
        """Return the emails that this relay skips for now, since they could not be quarantined either."""
        now = time.monotonic()
        if any(until < now for until in self._left_out.values()):
            self._left_out = {email: until for email, until in self._left_out.items() if until >= now}
        return list(self._left_out)

    async def put(
        self,
        connection: Connection,
        email: int,
        reason: object,
        *,
        marked: DeliveryState = DeliveryState.IN_DOUBT,
        relays: Iterable[int] = (),
    ) -> None:
        """Quarantine an email that is pending, or is to be settled as `marked`; if that fails, skip it for a while.

        `relays` are further ones whose rows may be changed: dead relays whose rows the caller has locked.
        """
        self.count += 1
        why = storable(f"{type(reason).__name__}: {reason}" if isinstance(reason, BaseException) else str(reason))
        why = f"outbox cannot work with its row: {why}"[:REASON_MAX]
        try:
            async with connection.transaction():
                state = await connection.fetchval(QUARANTINE, email, why, marked, [*self.relays, *relays])
            missing = "it is locked, or another relay's"
        except Exception as error:
            if not is_of_a_row(error):
                raise
            state, missing = None, str(error)
        key = await _key(connection, email)
        of = {"key": key, "email": email, "reason": why}
        if state is not None:
            log.error(
                "email_quarantined",
                "{key} is quarantined ({state}): {reason}; correct its row, then run `outbox retry` or `resolve`",
                state=state,
                **of,
            )
            return
        if len(self._left_out) >= LEFT_OUT_MAX:
            self._left_out.pop(next(iter(self._left_out)))
        self._left_out[email] = time.monotonic() + LEFT_OUT_S
        log.error(
            "email_left_out",
            "{key} (email {email}) is left out for {for_s:g} s: {reason}; it could not be quarantined ({missing}); "
            "correct its row in outbox.delivery",
            for_s=LEFT_OUT_S,
            missing=missing,
            **of,
        )

    async def sift(
        self,
        connection: Connection,
        emails: Iterable[int],
        alone: Callable[[int], Awaitable[Any]],
        *,
        relays: Iterable[int] = (),
    ) -> list[Any]:
        """Run a statement that failed for these emails for each by itself; return the results.

        An email for which it fails again is quarantined. Inside of a transaction each has a savepoint.
        """
        found = []
        left_out = set(self.left_out)
        for email in emails:
            if email in left_out:
                continue
            try:
                async with connection.transaction():
                    found.append(await alone(email))
            except Exception as error:
                if not is_of_a_row(error):
                    raise
                await self.put(connection, email, error, relays=relays)
        return found

    async def all_or_each(
        self,
        connection: Connection,
        emails: Sequence[int],
        statement: Callable[[Sequence[int]], Awaitable[Sequence[Any]]],
    ) -> list[Any]:
        """Run a statement that reads or writes these emails; if one of them makes it fail, for each by itself.

        Return all rows. An email that fails by itself is quarantined.
        """
        try:
            return list(await statement(emails))
        except Exception as error:
            if not is_of_a_row(error):
                raise
        each = await self.sift(connection, emails, lambda email: statement([email]))
        return [row for rows in each for row in rows]


async def _key(connection: Connection, email: int) -> str:
    try:
        async with connection.transaction():
            return str(await connection.fetchval(KEY, email) or f"email {email}")
    except Exception as error:
        if not is_of_a_row(error):
            raise
        return f"email {email}"

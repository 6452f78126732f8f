"""Tick in parts, after a row made a whole tick fail: finds that row and does the rest.

`tick` is one statement. If it fails because of a row, nothing was committed, or the commit is unknown. So

- an empty tick comes first. If that fails too, no row is to blame, and its error is raised;
- settlements and marks are written together and, if that fails, one by one;
- the emails to claim are read as ids only, then claimed one by one.

What fails by itself is quarantined. A row that another session has locked is neither waited for nor quarantined: its
verdict stays with the relay until the lock is gone. A relay stays with ticks in parts until one of them finds nothing
wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from outbox.database.connection import Connection
from outbox.mail.delivery_state import DeliveryState
from outbox.relay.claims import CLAIM, CLAIMED, GATE, SMALL_BYTES, TOKENS, Claimed, claimed_of
from outbox.relay.quarantine import SUSPECT, UNSUSPECTED, Quarantine, is_of_a_row
from outbox.relay.settlement import Settlement
from outbox.relay.tick import TickRequest, TickResult, tick

# Which of these rows another session has locked at this moment. $1 emails.
LOCKED: Final = """
WITH free AS (SELECT email FROM outbox.delivery WHERE email = ANY ($1::bigint[]) FOR UPDATE SKIP LOCKED)
SELECT email FROM outbox.delivery WHERE email = ANY ($1::bigint[]) AND email NOT IN (SELECT email FROM free)
"""


async def locked_emails(connection: Connection, emails: Sequence[int]) -> frozenset[int]:
    """Return which emails' rows another session has locked; waits for none of them."""
    return frozenset(row["email"] for row in await connection.fetch(LOCKED, emails)) if emails else frozenset()


# What a tick would claim now, as ids only, which can always be read. $1 route, $2 claims, $3 suspects, $4 left out.
CANDIDATES: Final = f"""
(SELECT email FROM outbox.delivery
  WHERE settled_at IS NULL AND state = 'pending' AND relay IS NULL AND due_at <= now() AND {SUSPECT}
    AND route = $1 AND email <> ALL ($4::bigint[]) AND (send_before IS NULL OR send_before > now())
  ORDER BY due_at, email LIMIT $3)
UNION ALL
(SELECT email FROM outbox.delivery
  WHERE settled_at IS NULL AND state = 'pending' AND relay IS NULL AND due_at <= now() AND {UNSUSPECTED}
    AND route = $1 AND priority = 1 AND email <> ALL ($4::bigint[]) AND (send_before IS NULL OR send_before > now())
  ORDER BY due_at, email LIMIT $2)
UNION ALL
(SELECT email FROM outbox.delivery
  WHERE settled_at IS NULL AND state = 'pending' AND relay IS NULL AND due_at <= now() AND {UNSUSPECTED}
    AND route = $1 AND priority = 0 AND email <> ALL ($4::bigint[]) AND (send_before IS NULL OR send_before > now())
  ORDER BY due_at, email LIMIT $2)
"""
# $1 email, $2 relay, $3 budget, $4 limit, $5 epoch.
CLAIM_ONE: Final = f"""
WITH {GATE.format(known="$5::bigint")}, chosen AS (
    SELECT email, due_at FROM outbox.delivery
     WHERE email = $1 AND state = 'pending' AND settled_at IS NULL AND relay IS NULL AND (SELECT is_open FROM gate)
       FOR UPDATE SKIP LOCKED
), {CLAIM.format(relay="$2", budget="$3::bigint", limit="$4::bigint", small=SMALL_BYTES)}
SELECT {TOKENS} AS tokens,
       {CLAIMED.format(limit="$4::bigint", small=SMALL_BYTES)}
  FROM claimed c
"""


async def candidates(connection: Connection, request: TickRequest, left_out: Sequence[int]) -> list[int]:
    """Return which emails a tick would claim: suspects, then urgent ones, then others, each due longest first."""
    claims_max = request.claims_max
    rows = await connection.fetch(CANDIDATES, request.route, claims_max, request.suspects_max, left_out)
    return [row["email"] for row in rows][:claims_max]


async def claim_one(
    connection: Connection, relay: int, email: int, *, budget: int, bytes_max: int, epoch: int | None = None
) -> Claimed:
    """Claim one email, if it is free."""
    rows = await connection.fetch(CLAIM_ONE, email, relay, budget, bytes_max, epoch)
    return claimed_of(rows, rows[0]["tokens"] if rows else None, relay, bytes_max)


@dataclass(frozen=True, slots=True)
class TickInParts:
    """One tick of a relay that is not done in one statement; what fails goes into the quarantine of its session."""

    connection: Connection
    relay: int
    quarantine: Quarantine
    request: TickRequest

    async def run(self) -> TickResult:
        """Do what `tick` does; a row that cannot be read or written does not stop the others.

        Raises:
            Exception: the error is of the database, not of a row. It is unknown what was committed.

        """
        request = self.request
        done = await self._tick(TickRequest(route=request.route, server=request.server, epoch=request.epoch))
        done = replace(done, reached=None, urgent_reached=None)
        marks = list(request.marks) if done.is_open else []
        locked = await locked_emails(self.connection, [*marks, *(one.email for one in request.settlements)])
        settled = await self._settle([one for one in request.settlements if one.email not in locked])
        done = replace(done, settled=settled, locked=locked)
        done = await self._mark([email for email in marks if email not in locked], done)
        if request.claims_max <= 0 or not done.is_open:
            return done
        return await self._claim(done)

    async def _tick(self, request: TickRequest) -> TickResult:
        return await tick(self.connection, self.relay, request)

    async def _settle(self, settlements: Sequence[Settlement]) -> frozenset[tuple[int, int]]:
        if not settlements:
            return frozenset()
        try:
            return (await self._tick(TickRequest(settlements=settlements))).settled
        except Exception as error:
            if not is_of_a_row(error):
                raise
        settled: set[tuple[int, int]] = set()
        for one in settlements:
            try:
                settled |= (await self._tick(TickRequest(settlements=[one]))).settled
            except Exception as error:
                if not is_of_a_row(error):
                    raise
                await self._quarantine_settled(one, error)
                settled.add(one.identity)
        return frozenset(settled)

    async def _quarantine_settled(self, one: Settlement, error: Exception) -> None:
        outcome = one.outcome
        is_known = outcome.state in (DeliveryState.SENT, DeliveryState.IN_DOUBT)
        marked = outcome.state if is_known else DeliveryState.DEAD
        reason = f"{error}; the verdict on attempt {one.attempt} was {outcome.verdict}: {outcome.reply}"
        await self.quarantine.put(self.connection, one.email, reason, marked=marked, relays=[one.relay])

    async def _mark(self, marks: list[int], done: TickResult) -> TickResult:
        parts = [marks] if marks else []
        marked, expired, quarantined = dict(done.marked), set(done.expired), set()
        for part in parts:  # the list grows while it runs
            try:
                found = await self._tick(TickRequest(marks=part, epoch=self.request.epoch))
            except Exception as error:
                if not is_of_a_row(error):
                    raise
                if len(part) > 1:
                    parts += [[email] for email in part]
                else:
                    await self.quarantine.put(self.connection, part[0], error)
                    quarantined.add(part[0])
            else:
                marked |= found.marked
                expired |= found.expired
                if not found.is_open:  # the barrier was raised just now
                    done = replace(done, is_open=False, epoch=found.epoch)
                    break
        return replace(done, marked=marked, expired=frozenset(expired), quarantined=frozenset(quarantined))

    async def _claim(self, done: TickResult) -> TickResult:
        request = self.request
        budget = request.bytes_max if request.budget is None else request.budget
        is_over = False

        async def claim(email: int) -> Claimed:
            nonlocal budget, is_over
            found = await claim_one(
                self.connection,
                self.relay,
                email,
                budget=max(budget, 0),
                bytes_max=request.bytes_max,
                epoch=request.epoch,
            )
            budget -= sum(claim.size for claim in found.claims if not claim.is_fetched)
            # Or another relay was faster: then the next look finds nothing.
            is_over = is_over or not (found.claims or found.unfit)
            return found

        emails = await candidates(self.connection, request, self.quarantine.left_out)
        each: list[Claimed] = await self.quarantine.sift(self.connection, emails, claim)
        return replace(
            done,
            claims=[claim for found in each for claim in found.claims],
            unfit={email: why for found in each for email, why in found.unfit.items()},
            listed=frozenset(email for found in each for email in found.listed),
            bytes_wanted=SMALL_BYTES if is_over else 0,
        )


STATEMENTS: Final = (LOCKED, CANDIDATES, CLAIM_ONE)

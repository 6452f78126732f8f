"""Rate limit of a route, shared by the fleet: the moments that a relay has reserved, and the row they come from.

All relays of a route walk one line of moments, `1 / rate` apart. A relay takes a few of them in one short transaction
and starts one email at each; a relay that dies or finds nothing to send has wasted a fraction of a second of the
fleet's rate. No relay waits for the row: one that finds it locked looks again a moment later. `RateLimiter` decides,
without a database of its own.

The rate is the one of the settings, or the one that the mail server takes, if that is less: `report_refusal` keeps it
in the same row, and `found_rate` decides about it.
"""

import math
import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Final

from outbox.database.connection import Connection
from outbox.database.driver import Record
from outbox.database.values import storable
from outbox.relay.found_rate import SILENCE_MAX_S, Found, RateRefusal, slow_down

AHEAD_S: Final = 0.25  # so much of the fleet's rate is in the hands of its relays at a time
HORIZON_S: Final = 1.0  # moments further away are not given out yet
STALE_S: Final = 0.5  # under a rate, a moment that nothing was started at is lost: made up for, it would be a burst
TAKEN_S: Final = 0.005  # until the row is looked at again when another relay was at it
USED_UP_S: Final = 30.0  # until it is looked at again when the day's emails are sent
PORTION_MAX: Final = 100
DAY_AGO: Final = "now() - interval '24 hours 15 minutes'"  # allowances are counted by the begun quarter of an hour


@dataclass(slots=True)
class RateLimiter:
    """Limiter of the starts of emails; without a rate and a `daily_max` each may start at once.

    Times are of any steady clock, given as `now`. `rate_per_s` is the rate of the settings, `found_per_s` the one that
    the server takes. `alive` is how many relays share the rate, `used_up` why nothing may be sent for a longer while.
    """

    rate_per_s: float | None = None
    daily_max: int | None = None
    alive: int = 1
    used_up: str | None = None
    ask_at: float = 0.0
    """Time from which it is worth while to ask for more."""
    unused: int = 0
    """Moments that were counted for the day and that nothing was started at; the next `reserve` takes them back."""
    found: Found | None = None
    """Rate that the server takes, as of the last look."""
    found_per_s: float | None = None
    refused: "RefusedTry | None" = None
    """A refusal that is not reported to the fleet yet."""
    _moments: deque[float] = field(default_factory=deque)

    @property
    def is_bounded(self) -> bool:
        """Return True if there is any limit at all."""
        return self.rate_per_s is not None or self.daily_max is not None or self.found_per_s is not None

    @property
    def speed(self) -> float | None:
        """Return the rate in force, in emails a second of the fleet: the lower of the settings' and the server's."""
        return _lower(self.rate_per_s, self.found_per_s)

    @property
    def held(self) -> int:
        """Return how many moments are reserved and not used."""
        return len(self._moments)

    @property
    def share(self) -> int:
        """Return how many emails to hold, and to have moments for: fair to each relay, at least one."""
        speed = self.speed
        if speed is None:
            return PORTION_MAX
        return min(max(math.ceil(speed * AHEAD_S / self.alive), 1), PORTION_MAX)

    def is_used_up(self, now: float) -> bool:
        """Return True if nothing may be sent for a longer while, as far as is known."""
        return self.used_up is not None and now < self.ask_at

    def capacity(self, ready: int) -> int:
        """Return how many more emails to hold when so many wait already."""
        return max(self.share - ready, 0)

    def wants(self, ready: int, now: float) -> int:
        """Return how many moments to ask for now, for so many emails that wait."""
        if not self.is_bounded or now < self.ask_at:
            return 0
        self._forget_stale(now)
        return max(min(ready, self.share) - len(self._moments), 0)

    def may_start(self, now: float) -> bool:
        """Return True if an email may be started now; if so, its moment is used."""
        if not self.is_bounded:
            return True
        self._forget_stale(now)
        if not self._moments or self._moments[0] > now:
            return False
        self._moments.popleft()
        return True

    def next_at(self, now: float) -> float:
        """Return when the next email may start, or more moments be asked for; `now` if at once, or without a limit."""
        at = self._moments[0] if self._moments else self.ask_at
        return max(at, now) if self.is_bounded else now

    def grant(self, grant: "Grant", asked_at: float, now: float) -> None:
        """Take what was given. Moments count from when they were asked for: an answer that came late must not move
        them into a stretch of the line that the next ones are drawn from.
        """
        self.unused -= grant.taken_back
        self.used_up = None
        if grant.used_up:
            self.used_up = f"the {self.daily_max:,} emails that 24 hours may have (daily_max) are sent"
            self.ask_at = now + USED_UP_S
        elif not grant.emails:
            # Not all at once: those who had to turn back come again spread over the time that they share.
            gap_s = 1 / self.speed if self.speed else TAKEN_S
            spread_s = max(min(gap_s * self.alive, HORIZON_S), TAKEN_S)
            self.ask_at = now + grant.wait_s + spread_s * random.random()  # noqa: S311 - jitter, not a secret
        gap_s = grant.gap_s if grant.gap_s is not None else 1 / self.speed if self.speed is not None else 0.0
        self._moments.extend(asked_at + grant.wait_s + number * gap_s for number in range(grant.emails))

    def forget(self) -> None:
        """Let the moments go: they were for emails that are no longer here."""
        self.unused += len(self._moments)
        self._moments.clear()

    def refuse(self, refused: "RefusedTry") -> None:
        """Stop at once after a refusal because of the rate, until the fleet has been told and gives new moments."""
        if self.refused is None or refused.started_at >= self.refused.started_at:
            self.refused = refused
        estimate = max(refused.fleet_rate, 1.0)
        self.found_per_s = min(self.found_per_s or estimate, estimate)
        self.forget()

    def note_reported(self, refused: "RefusedTry") -> bool:
        """Note that the fleet knows of a refusal; return False if there was another one meanwhile."""
        if self.refused is not refused:
            return False
        self.refused = None
        return True

    def share_with(self, relays: int) -> None:
        """Note how many relays share the rate, with this one."""
        self.alive = relays

    def adopt(self, found: Found | None) -> bool:
        """Take over what the fleet knows of the server's rate; return True if that is a limit where there was none."""
        if self.refused is not None:
            return False  # what was read is older than what is about to be said
        was_free = self.found is None
        self.found_per_s = found.rate_now if found is not None else None
        self.found = found if self.found_per_s is not None else None
        return was_free and self.found is not None

    def _forget_stale(self, now: float) -> None:
        while self.speed is not None and self._moments and self._moments[0] < now - STALE_S:
            self._moments.popleft()
            self.unused += 1


@dataclass(frozen=True, slots=True)
class RefusedTry:
    """A try that was refused because of the rate, and what else is needed for a `RateRefusal`. Times as there."""

    said: str
    started_at: float
    accepted_started_at: float | None
    """Time at which the latest try that was accepted was started."""
    fleet_rate: float
    is_supposed: bool = False
    accepts: bool = True

    def as_of(self, now: float) -> RateRefusal:
        """Return it with ages instead of times."""
        accepted_at = self.accepted_started_at
        return RateRefusal(
            self.said,
            now - self.started_at,
            now - accepted_at if accepted_at is not None else None,
            self.fleet_rate,
            self.is_supposed,
            self.accepts,
        )


@dataclass(frozen=True, slots=True)
class Grant:
    """Moments in the line, the first of them in `wait_s` and the others `gap_s` apart. None: ask again then, or much
    later if the day is used up.

    `taken_back` moments, which came to nothing, are off the day's count. `found` is what is known of the server's rate.
    """

    emails: int
    wait_s: float = 0.0
    used_up: bool = False
    taken_back: int = 0
    gap_s: float | None = None
    found: Found | None = None


def _lower(one: float | None, other: float | None) -> float | None:
    return min((rate for rate in (one, other) if rate is not None), default=None)


ENSURE: Final = "INSERT INTO outbox.pace (route) VALUES ($1) ON CONFLICT (route) DO NOTHING"

# What is known of the server's rate, as `found_of` reads it. The line, `next_at`, shows how long the fleet has sent.
FOUND: Final = """
found_rate, extract(epoch FROM now() - found_at)::float8 AS begun_s,
extract(epoch FROM resumes_at - now())::float8 AS silent_s, silence_s,
extract(epoch FROM least(next_at, now()) - resumes_at)::float8 AS sending_s, said"""

LOCK: Final = f"SELECT {FOUND} FROM outbox.pace WHERE route = $1 FOR UPDATE SKIP LOCKED"

# $2 rate, $3 seconds since the round began, $4 seconds of silence, $5 reply.
SLOW_DOWN: Final = f"""
UPDATE outbox.pace
   SET found_rate = $2, found_at = now() - $3::float8 * interval '1 second', silence_s = $4::float8, said = $5,
       resumes_at = now() + $4::float8 * interval '1 second',
       next_at = greatest(least(next_at, now() + {HORIZON_S} * interval '1 second'),
                          now() + $4::float8 * interval '1 second')
 WHERE route = $1
"""

# A statement of its own, after the lock: in one with it, the sum over the day would be older than the lock.
# A line that reaches further than any relay walks it was drawn before the server's clock was set back. $6 is how long
# the server is left alone. The time in which nothing was sent is no time in which the found rate grows.
RESERVE: Final = f"""
WITH line AS (
    SELECT greatest(CASE WHEN next_at > now() + ({2 * HORIZON_S} + $2::integer * $3::float8 + $6::float8)
                                                * interval '1 second' THEN now()
                         ELSE next_at END, now() + $6::float8 * interval '1 second') AS from_at
      FROM outbox.pace WHERE route = $1
), day AS (
    SELECT $4::bigint + $5::bigint - coalesce(sum(emails), 0) AS left_over FROM outbox.allowance
     WHERE route = $1 AND since > {DAY_AGO} AND $4::bigint IS NOT NULL
), given AS (
    SELECT from_at, left_over <= 0 AS used_up,
           CASE WHEN from_at > now() + {HORIZON_S} * interval '1 second' THEN 0
                ELSE greatest(least($2::integer, left_over), 0) END AS emails
      FROM line, day
), walked AS (
    UPDATE outbox.pace
       SET next_at = given.from_at + given.emails * $3::float8 * interval '1 second',
           resumes_at = resumes_at + greatest(now() - greatest(next_at, resumes_at), interval '0')
      FROM given WHERE route = $1 AND given.emails > 0
), counted AS (
    INSERT INTO outbox.allowance AS a (route, since, emails)
    SELECT $1, date_bin('15 minutes', now(), 'epoch'), greatest(emails - $5::bigint, 0) FROM given
     WHERE (emails > 0 OR $5::bigint > 0) AND $4::bigint IS NOT NULL
    ON CONFLICT (route, since) DO UPDATE
       SET emails = greatest(a.emails + (SELECT emails FROM given) - $5::bigint, 0)
), forgotten AS (
    DELETE FROM outbox.allowance WHERE route = $1 AND since < now() - interval '25 hours'
)
SELECT emails::integer AS emails, coalesce(used_up, false) AS used_up,
       extract(epoch FROM from_at - now())::float8 - CASE WHEN emails > 0 THEN 0 ELSE {HORIZON_S} END AS wait_s
  FROM given
"""

STATEMENTS: Final = (ENSURE, LOCK, RESERVE, SLOW_DOWN)


async def reserve(
    connection: Connection, route: str, emails: int, *, rate_per_s: float | None, daily_max: int | None, unused: int = 0
) -> Grant:
    """Reserve at most `emails` moments of the fleet's line, which no other relay has.

    Return no moments where another relay is at it right now, where the line reaches too far ahead already, or where the
    day's emails are used up. `daily_max` holds for any 24 hours, counted by the quarter of an hour. The rate is the
    caller's own, or the one that the server takes if that is lower: servers whose settings differ walk the same line in
    steps of their own. `unused` moments, which were given before and came to nothing, are taken off the day's count.
    """
    async with connection.transaction():
        pace = await connection.fetchrow(LOCK, route)
        if pace is None:
            await connection.execute(ENSURE, route)
            return Grant(0, TAKEN_S)
        found = found_of(pace)
        speed = _lower(rate_per_s, found.rate_now if found is not None else None)
        gap_s = 1 / speed if speed is not None else 0.0
        silent_s = max(found.silent_s, 0.0) if found is not None else 0.0
        row = await connection.fetchrow(RESERVE, route, emails, gap_s, daily_max, unused, silent_s)
    return Grant(row["emails"], max(row["wait_s"], 0.0), row["used_up"], unused, gap_s, found)


def found_of(row: Record) -> Found | None:
    """Return what is known of the rate that a server takes, from a row with the columns of `FOUND`.

    A silence that is longer than any was written before the server's clock was set back.
    """
    if row["found_rate"] is None:
        return None
    silent_s = row["silent_s"] if row["silent_s"] <= 2 * SILENCE_MAX_S else 0.0
    return Found(
        row["found_rate"], max(row["begun_s"], 0.0), silent_s, row["silence_s"], max(row["sending_s"], 0.0), row["said"]
    )


async def report_refusal(connection: Connection, route: str, refusal: RateRefusal) -> tuple[bool, Found | None]:
    """Tell the fleet of a refusal because of the rate; return what is known of the server's rate now.

    Relays that hear the refusals of one round slow down once. False: another relay was at the row; try again.
    """
    async with connection.transaction():
        row = await connection.fetchrow(LOCK, route)
        if row is None:
            await connection.execute(ENSURE, route)
            row = await connection.fetchrow(LOCK, route)
        if row is None:
            return False, None
        found = found_of(row)
        slower = slow_down(found, refusal)
        if slower is not None:
            found = replace(slower, said=storable(slower.said))
            await connection.execute(SLOW_DOWN, route, found.rate, found.begun_s, found.silence_s, found.said)
    return True, found

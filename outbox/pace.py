"""How fast the fleet may send: the moments that a relay has reserved, and the row through which relays share them.

All relays of a route walk one line of moments, `1 / rate` apart. A relay takes a few of them in one short transaction
and starts one email at each; who dies or finds nothing to send has wasted a fraction of a second of the fleet's rate.
Nobody waits for the row: who finds it locked looks again a moment later. `Pace` decides, without a database of its own.
"""

import math
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

AHEAD_S: Final = 0.25  # so much of the fleet's rate is in the hands of its relays at a time
HORIZON_S: Final = 1.0  # moments that are further away are nobody's yet
STALE_S: Final = 0.5  # under a rate, a moment that nothing was started at is lost: made up for, it would be a burst
TAKEN_S: Final = 0.005  # until the row is looked at again when another relay was at it
USED_UP_S: Final = 30.0  # until it is looked at again when the day's emails are sent
PORTION_MAX: Final = 100


@dataclass(slots=True)
class Pace:
    """When this relay may start its next email; always, without `rate_per_s` and `daily_max`.

    Times are of any steady clock, given as `now`. `alive` is how many relays share the rate, `used_up` why nothing
    may be sent for a longer while.
    """

    rate_per_s: float | None = None
    daily_max: int | None = None
    alive: int = 1
    used_up: str | None = None
    ask_at: float = 0.0
    """When it is worth while to ask for more."""
    unused: int = 0
    """Moments that were counted for the day and that nothing was started at; the next `reserve` takes them back."""
    _moments: deque[float] = field(default_factory=deque)

    @property
    def is_bounded(self) -> bool:
        """Whether there is any limit at all."""
        return self.rate_per_s is not None or self.daily_max is not None

    @property
    def held(self) -> int:
        """How many moments are in hand."""
        return len(self._moments)

    @property
    def share(self) -> int:
        """How many emails to hold, and to have moments for, at a time: fair to each relay, at least one."""
        if self.rate_per_s is None:
            return PORTION_MAX
        return min(max(math.ceil(self.rate_per_s * AHEAD_S / self.alive), 1), PORTION_MAX)

    def is_used_up(self, now: float) -> bool:
        """Whether nothing may be sent for a longer while, as far as is known."""
        return self.used_up is not None and now < self.ask_at

    def room(self, ready: int) -> int:
        """How many more emails to hold when so many wait already."""
        return max(self.share - ready, 0)

    def wants(self, ready: int, now: float) -> int:
        """How many moments to ask for now, for so many emails that wait."""
        if not self.is_bounded or now < self.ask_at:
            return 0
        self._forget_stale(now)
        return max(min(ready, self.share) - len(self._moments), 0)

    def may_start(self, now: float) -> bool:
        """Whether an email may be started now; if so, its moment is used."""
        if not self.is_bounded:
            return True
        self._forget_stale(now)
        if not self._moments or self._moments[0] > now:
            return False
        self._moments.popleft()
        return True

    def next_at(self, now: float) -> float:
        """When the next email may be started, or more moments asked for: `now` if at once, or if there is no limit."""
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
            gap_s = 1 / self.rate_per_s if self.rate_per_s else TAKEN_S
            spread_s = max(min(gap_s * self.alive, HORIZON_S), TAKEN_S)
            self.ask_at = now + grant.wait_s + spread_s * random.random()  # noqa: S311 - jitter, not a secret
        gap_s = 1 / self.rate_per_s if self.rate_per_s is not None else 0.0
        self._moments.extend(asked_at + grant.wait_s + number * gap_s for number in range(grant.emails))

    def forget(self) -> None:
        """Let the moments go: they were for emails that are no longer here."""
        self.unused += len(self._moments)
        self._moments.clear()

    def _forget_stale(self, now: float) -> None:
        while self.rate_per_s is not None and self._moments and self._moments[0] < now - STALE_S:
            self._moments.popleft()
            self.unused += 1


@dataclass(frozen=True, slots=True)
class Grant:
    """So many moments, the first of them in `wait_s`; none: ask again then, or much later if the day is used up.

    `taken_back` moments, which came to nothing, are off the day's count.
    """

    emails: int
    wait_s: float = 0.0
    used_up: bool = False
    taken_back: int = 0


ENSURE: Final = "INSERT INTO outbox.pace (route) VALUES ($1) ON CONFLICT (route) DO NOTHING"

LOCK: Final = "SELECT FROM outbox.pace WHERE route = $1 FOR UPDATE SKIP LOCKED"

# A statement of its own, after the lock: in one with it, the sum over the day would be older than the lock.
# A line that reaches further than any relay walks it was drawn before the server's clock was set back.
RESERVE: Final = f"""
WITH line AS (
    SELECT CASE WHEN next_at > now() + ({2 * HORIZON_S} + $2::integer * $3::float8) * interval '1 second' THEN now()
                ELSE greatest(next_at, now()) END AS from_at
      FROM outbox.pace WHERE route = $1
), day AS (
    SELECT $4::bigint + $5::bigint - coalesce(sum(emails), 0) AS left_over FROM outbox.allowance
     WHERE route = $1 AND since > now() - interval '24 hours 15 minutes' AND $4::bigint IS NOT NULL
), given AS (
    SELECT from_at, left_over <= 0 AS used_up,
           CASE WHEN from_at > now() + {HORIZON_S} * interval '1 second' THEN 0
                ELSE greatest(least($2::integer, left_over), 0) END AS emails
      FROM line, day
), walked AS (
    UPDATE outbox.pace SET next_at = given.from_at + given.emails * $3::float8 * interval '1 second'
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

STATEMENTS: Final = (ENSURE, LOCK, RESERVE)


async def reserve(
    connection: Any, route: str, emails: int, *, rate_per_s: float | None, daily_max: int | None, unused: int = 0
) -> Grant:
    """At most `emails` moments of the fleet's line, which no other relay has.

    No moments where another relay is at it right now, where the line reaches too far ahead already, or where the day's
    emails are used up. `daily_max` holds for any 24 hours, counted by the quarter of an hour. The rate is the caller's
    own: servers whose settings differ walk the same line in steps of their own. `unused` moments, which were given
    before and came to nothing, are taken off the day's count.
    """
    gap_s = 1 / rate_per_s if rate_per_s is not None else 0.0
    async with connection.transaction():
        if not await connection.fetch(LOCK, route):
            await connection.execute(ENSURE, route)
            return Grant(0, TAKEN_S)
        row = await connection.fetchrow(RESERVE, route, emails, gap_s, daily_max, unused)
    return Grant(row["emails"], max(row["wait_s"], 0.0), row["used_up"], unused)

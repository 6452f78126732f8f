"""Circuit breaker of a route: a pause while the server, not the message, is in trouble, here and in the whole fleet.

`Breaker` decides, without a clock or a database of its own; the functions below write the pause for the fleet, which
reads it with its ticks.
"""

import random
from dataclasses import dataclass
from typing import Final, Literal

from outbox.database.connection import CHANNEL, Connection
from outbox.database.values import storable
from outbox.smtp.login import LOGIN_PAUSE_FIRST_S, LOGIN_PAUSE_MAX_S, login_pause_s

PAUSE_FIRST_S: Final = 0.5
PAUSE_MAX_S: Final = 3.5  # with the jitter and a connect this finds a server within 5 s of its return
PROBE_LEASE_S: Final = 4.0  # then another relay may probe as well: one that hangs must not keep the fleet waiting
CUTS_IN_A_ROW_MAX: Final = 3
# A server that refuses the sender or this host needs a person, and asking it often can make it worse. With the jitter
# this stays below the minute for which `outbox status` shows a pause that no relay renews.
REFUSED_PAUSE_MAX_S: Final = 45.0
REFUSALS_MAX: Final = 5  # then `relay --until-empty` gives up: after about 8 s


@dataclass(slots=True)
class Breaker:
    """Circuit breaker of one relay, and its view of the fleet's. It decides only; `now` is any steady clock.

    Closed: connect at will. Open after trouble: no new connection until the pause is over, then one probe at a time
    (half-open), each failure doubling the pause up to `PAUSE_MAX_S`; the first success after it closes the breaker.
    Connections that stand go on all the while: a server that takes no more connections is not a server in trouble.

    `retry_at` ends this relay's own pause, `fleet_retry_at` everybody's, as the database says. While the fleet's is in
    force only the relay that is `probing` connects. `news` is to be reported to the fleet.
    """

    retry_at: float | None = None
    fleet_retry_at: float | None = None
    reason: str = ""
    cuts: int = 0
    probing: bool = False
    refusals: int = 0
    """Refusals of the sender or this host in a row; more than 0 is a pause that needs a person."""
    login_refused: bool = False
    """The server refused the login, here or to another relay: each try counts, so the pause lasts for minutes."""
    news: Literal["pause", "login", "resume"] | None = None
    insists: bool = False
    """The login was changed, so that the turn to probe is taken although a pause is in force."""
    _pause_s: float = PAUSE_FIRST_S

    @property
    def is_open(self) -> bool:
        """Return True if the server was in trouble when it was last heard of."""
        return self.retry_at is not None or self.fleet_retry_at is not None

    @property
    def next_at(self) -> float:
        """Return when the pauses that are known are over."""
        return max(self.retry_at or 0.0, self.fleet_retry_at or 0.0)

    def may_connect(self, now: float) -> bool:
        """Return True if no pause is in force for this relay."""
        return self._rested(now) and (self.fleet_retry_at is None or self.probing)

    def refuses_all(self, now: float) -> bool:
        """Return True while nothing may be begun on any connection, since the server refuses all of it."""
        return self.refusals > 0 and not self.may_connect(now)

    @property
    def is_refused(self) -> bool:
        """Return True if the server goes on refusing the sender, this host or the login, perhaps to another relay."""
        is_refused_for_all = (
            self.login_refused and self.fleet_retry_at is not None and not (self.insists or self.probing)
        )
        return self.refusals >= REFUSALS_MAX or is_refused_for_all

    def wants_probe(self, now: float) -> bool:
        """Return True if it is time to ask the database for the turn to probe."""
        return self.fleet_retry_at is not None and not self.probing and (self.insists or now >= self.next_at)

    def trip(self, reason: str, now: float, uniform: float | None = None) -> None:
        """Pause, for longer than the last time, since the server is in trouble."""
        self._open(reason, now, PAUSE_MAX_S, uniform)

    def refuse(self, reason: str, now: float, uniform: float | None = None) -> None:
        """Pause, since the server refuses the sender or this host; up to `REFUSED_PAUSE_MAX_S`."""
        self.refusals += 1
        self._open(reason, now, REFUSED_PAUSE_MAX_S, uniform)

    def refuse_login(self, reason: str, now: float, pause_s: float, *, is_new: bool) -> None:
        """Pause for so long, since the server refuses the login. A refusal that is not new is not reported."""
        self.refusals = max(self.refusals + 1, REFUSALS_MAX)  # a person must act, and waiting would change nothing
        self.login_refused = True
        if is_new:
            self.news = "login"
        self.probing = False
        self.retry_at = now + pause_s
        self.reason = reason

    def take_news(self) -> Literal["pause", "login", "resume"] | None:
        """Return the news for the fleet, once."""
        news, self.news = self.news, None
        return news

    def take_insistence(self) -> bool:
        """Return True, once, if the turn to probe is to be taken although a pause is in force."""
        insists, self.insists = self.insists, False
        return insists

    def begin_probe(self, now: float, *, is_granted: bool) -> None:
        """Probe the server if it is this relay's turn; in any case the turn is given for `PROBE_LEASE_S`."""
        self.probing = is_granted
        self.fleet_retry_at = now + PROBE_LEASE_S

    def leave_probe(self) -> None:
        """Leave the turn to probe to a later time."""
        self.probing = False

    def insist(self, now: float) -> None:
        """Let this relay try at once, since it has another login than the one that was refused."""
        self.retry_at = None if self.retry_at is None else min(self.retry_at, now)
        self.insists = self.fleet_retry_at is not None

    def cut(self, reason: str, now: float) -> None:
        """Note that a connection ended in the middle of a dialogue; a few in a row without a verdict are trouble."""
        self.cuts += 1
        if self.cuts >= CUTS_IN_A_ROW_MAX and self._rested(now):
            self.trip(reason, now)

    def succeed(self, now: float, *, took_mail: bool = True) -> None:
        """Note that the server works, since it has judged a message; a pause that was ordered is kept to its end.

        One that refused the sender or this host works again once it takes a message.
        """
        self.cuts = 0
        if not self.is_open or not self._rested(now) or (self.refusals and not took_mail):
            return
        self.retry_at = None
        self.refusals = 0
        self.login_refused = False
        self._pause_s = PAUSE_FIRST_S
        if self.fleet_retry_at is not None and (self.probing or now >= self.fleet_retry_at):
            self.fleet_retry_at = None
            self.probing = False
            self.news = "resume"

    def works_for_others(self) -> None:
        """End a pause that this relay began, since the server works for other relays."""
        if self.refusals or self.login_refused:
            return
        if self.news == "pause":
            self.news = None
        elif self.fleet_retry_at is not None:
            self.news = "resume"
        self.retry_at = self.fleet_retry_at = None
        self.probing = False
        self._pause_s = PAUSE_FIRST_S

    def adopt(self, reason: str | None, wait_s: float, now: float, logins: int = 0) -> None:
        """Take over what the fleet knows: a pause with its reason, or None. A server that works for others may still
        not work from here, so this relay's own pause stays. `logins` is how many were refused in a row.
        """
        if self.news is not None:
            return  # what was read is older than what is about to be reported
        if reason is None:
            if self.fleet_retry_at is not None and self.refusals and self.retry_at is not None:
                self.retry_at = min(self.retry_at, now)  # it takes mail of another relay: this one may try, too
            self.fleet_retry_at = None
            self.probing = False
            self.login_refused = self.login_refused and self.retry_at is not None
        else:
            longest_s = max(PROBE_LEASE_S, login_pause_s(logins)) if logins else PROBE_LEASE_S
            self.fleet_retry_at = now + (wait_s if wait_s <= longest_s else 0.0)  # see `IS_OVER`
            self.login_refused = self.login_refused or logins > 0
            if self.retry_at is None:
                self.reason = reason

    def _open(self, reason: str, now: float, pause_max_s: float, uniform: float | None) -> None:
        if not self.is_open or self.probing:
            self.news = "pause"
        self.probing = False
        jitter = 0.8 + 0.4 * (random.random() if uniform is None else uniform)  # noqa: S311 - jitter, not a secret
        pause_s = min(self._pause_s, pause_max_s)
        self.retry_at = now + pause_s * jitter
        self.reason = reason
        self._pause_s = min(2 * pause_s, pause_max_s)

    def _rested(self, now: float) -> bool:
        return self.retry_at is None or now >= self.retry_at


# The fleet's pause of a route. Only its author prolongs a pause in force: relays that find out at the same moment would
# otherwise lengthen it N times. None is longer than the lease of a probe, or than refused logins make it: what ends
# later than that was written before the server's clock was set back.
_LOGIN_PAUSE: Final = f"least({LOGIN_PAUSE_FIRST_S} * 2::float8 ^ least({{logins}} - 1, 30), {LOGIN_PAUSE_MAX_S})"
_LONGEST: Final = (
    f"CASE WHEN r.logins > 0 THEN {_LOGIN_PAUSE.format(logins='r.logins')} ELSE {PROBE_LEASE_S}::float8 END"
)
IS_OVER: Final = f"(r.retry_at <= now() OR r.retry_at > now() + {_LONGEST} * interval '1 second')"

PAUSE: Final = f"""
INSERT INTO outbox.route AS r (name, reason, relay, retry_at)
VALUES ($1, $2, $3, now() + {PAUSE_FIRST_S} * interval '1 second')
ON CONFLICT (name) DO UPDATE
   SET reason = excluded.reason, relay = excluded.relay, failures = r.failures + 1,
       retry_at = now()
                + least({PAUSE_FIRST_S} * 2::float8 ^ least(r.failures, 30), {PAUSE_MAX_S}) * interval '1 second'
 WHERE r.relay = excluded.relay OR {IS_OVER}
"""

# A pause for other trouble, which is short, gives way to the first one for a refused login.
PAUSE_LOGIN: Final = f"""
INSERT INTO outbox.route AS r (name, reason, relay, logins, retry_at)
VALUES ($1, $2, $3, 1, now() + {LOGIN_PAUSE_FIRST_S} * interval '1 second')
ON CONFLICT (name) DO UPDATE
   SET reason = excluded.reason, relay = excluded.relay, failures = r.failures + 1, logins = r.logins + 1,
       retry_at = now() + {_LOGIN_PAUSE.format(logins="(r.logins + 1)")} * interval '1 second'
 WHERE r.relay = excluded.relay OR r.logins = 0 OR {IS_OVER}
"""

PROBE: Final = f"""
UPDATE outbox.route r SET relay = $2, retry_at = now() + {PROBE_LEASE_S} * interval '1 second'
 WHERE r.name = $1 AND ($3 OR {IS_OVER})
"""

RESUME: Final = f"DELETE FROM outbox.route r WHERE r.name = $1 AND (r.relay = $2 OR {IS_OVER})"

STATEMENTS: Final = (PAUSE, PAUSE_LOGIN, PROBE, RESUME)


async def pause_route(connection: Connection, relay: int, route: str, reason: str) -> None:
    """Tell the fleet that a server is in trouble: no relay connects for a while, longer with every failed probe."""
    await connection.execute(PAUSE, route, storable(reason), relay)


async def pause_login(connection: Connection, relay: int, route: str, reason: str) -> None:
    """Tell the fleet that a server refused the login: no relay tries it for minutes, longer with every refusal."""
    await connection.execute(PAUSE_LOGIN, route, storable(reason), relay)


async def probe_route(connection: Connection, relay: int, route: str, *, insists: bool = False) -> bool:
    """Return True if this relay is the one to try the server now; one that `insists` does not wait for a pause to end.

    A relay that does not report for `PROBE_LEASE_S` has lost its turn.
    """
    return str(await connection.execute(PROBE, route, relay, insists)).endswith(" 1")


async def resume_route(connection: Connection, relay: int, route: str) -> None:
    """Tell the fleet that a server works again, and wake all relays. This is rare, so its NOTIFY costs little."""
    if (await connection.execute(RESUME, route, relay)).endswith(" 1"):
        await connection.execute(f"NOTIFY {CHANNEL}")

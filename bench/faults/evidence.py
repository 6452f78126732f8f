"""Record of a run: facts for the checker, what each kill cost, and the lanes of the picture."""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from bench.faults.checker import Acceptance, Attempt, Delivery, Facts
from bench.faults.environment import LOST, Environment
from bench.faults.registry import FAULTS, Struck
from bench.faults.schedule import ON_A_SERVER
from bench.faults.server import ServerProcess
from bench.faults.timeline import Band, Lane

SAMPLE_S: Final = 0.1
KILLS: Final = frozenset({"kill"})
JUDGED: Final = frozenset({"accepted", "deferred", "refused"})

CLAIMS: Final = """
SELECT d.relay, count(*) AS claims FROM outbox.delivery d
 WHERE d.settled_at IS NULL AND d.relay IS NOT NULL AND d.state <> 'in_doubt' GROUP BY d.relay
"""
EMAILS: Final = """
SELECT m.recipient, m.message_id, d.state FROM outbox.email m JOIN outbox.delivery d ON d.email = m.id
"""
TRAIL: Final = """
SELECT m.recipient, a.attempt, a.verdict, a.relay, a.marked_at, a.settled_at, a.reply
  FROM outbox.attempt a JOIN outbox.email m ON m.id = a.email ORDER BY a.settled_at, a.email, a.attempt
"""
REPORTS: Final = """
SELECT p.email, count(*) AS reports FROM outbox.report r JOIN people p ON p.id::text = r.recipient_key GROUP BY p.email
"""


@dataclass(eq=False)
class Samples:
    """Numbers of claims that each relay holds, ten times a second while Postgres answers."""

    environment: Environment
    taken: list[tuple[float, dict[int, int]]] = field(default_factory=list)

    async def take(self) -> None:
        """Sample until cancelled."""
        while True:
            at = time.time()
            try:
                rows = await self.environment.sql(CLAIMS, deadline_s=1.0)
                self.taken.append((at, {row["relay"]: row["claims"] for row in rows}))
            except LOST:
                self.taken.append((at, {}))
            await asyncio.sleep(SAMPLE_S)


@dataclass(eq=False)
class Record:
    """Finished run. `processes` maps a relay's session to the process that it belonged to."""

    facts: Facts
    processes: dict[int, ServerProcess]
    environment: Environment
    strikes: Sequence[Struck]
    samples: Samples
    began_at: float
    over_at: float
    settled_at: float

    def doubts(self) -> list[Attempt]:
        """Return all tries that ended in doubt, including those that were resolved later."""
        return [attempt for attempt in self.facts.attempts if attempt.verdict == "in_doubt"]

    def kills(self) -> dict[str, Any]:
        """Return what SIGKILLs of relays cost.

        `stood_between_dot_and_settle` counts connections whose dot had reached the mail server and whose verdict had
        not reached the database. A mark that was committed at the kill without its dot being there yet is in doubt,
        too, and not in it.
        """
        killed = {
            process.number
            for process in self.environment.processes
            if process.what == "relay" and process.ended_by in KILLS
        }
        of_life = {relay: process.number for relay, process in self.processes.items()}
        doubts = [one for one in self.doubts() if one.relay is not None and of_life.get(one.relay) in killed]
        judged = {
            (of_life[one.relay], one.address)
            for one in self.facts.attempts
            if one.relay in of_life and one.verdict in JUDGED
        }
        last: dict[int, tuple[int, str]] = {}
        for dot in self.environment.mail.dots:
            if (process := self.environment.mail.visitors.get(dot.visit, -1)) in killed:
                last[dot.visit] = (process, dot.address)
        standing = {one for one in last.values() if one not in judged}
        dotted = {
            (self.environment.mail.visitors.get(dot.visit, -1), dot.address) for dot in self.environment.mail.dots
        }
        per_kill = Counter(of_life[one.relay] for one in doubts if one.relay is not None)
        return {
            "kills": len(killed),
            "in_doubt_after_kills": len(doubts),
            "in_doubt_per_kill": round(len(doubts) / len(killed), 3) if killed else 0.0,
            "in_doubt_per_kill_max": max(per_kill.values(), default=0),
            "stood_between_dot_and_settle": len(standing),
            "in_doubt_without_a_dot": sum((of_life.get(one.relay or 0), one.address) not in dotted for one in doubts),
        }

    def doubts_by_fault(self) -> dict[str, int]:
        """Count tries that ended in doubt while a fault of the kind affected their server or a shared part."""
        found: Counter[str] = Counter()
        for one in self.doubts():
            process = self.processes.get(one.relay) if one.relay is not None else None
            kinds = {
                struck.strike.kind
                for struck in self.strikes
                if (FAULTS[struck.strike.kind].shape.target not in ON_A_SERVER
                    or process is None or struck.strike.host == process.host)
                and struck.began_at <= one.settled_at and (one.marked_at or 0) <= struck.ended_at + SAMPLE_S
            }  # fmt: skip
            found.update(kinds or {"none"})
        return dict(found)

    def story(self, address: str) -> list[str]:
        """Return everything about one address, in the order of time, in seconds from the first message."""
        told = [(one.at, f"accepted on server {one.server}") for one in self.facts.accepted if one.address == address]
        visitors = self.environment.mail.visitors
        told += [
            (dot.at, f"dot on visit {dot.visit} of process {visitors.get(dot.visit, -1)}")
            for dot in self.environment.mail.dots
            if dot.address == address
        ]
        for one in self.facts.attempts:
            if one.address == address:
                marked = f", marked {one.marked_at - self.began_at:.3f}" if one.marked_at else ""
                told.append(
                    (one.settled_at, f"attempt {one.attempt} of relay {one.relay}: {one.verdict}{marked}; {one.reply}")
                )
        told.sort()
        states = [delivery.state for delivery in self.facts.deliveries if delivery.address == address]
        return [
            *(f"{at - self.began_at:.3f} {what}" for at, what in told),
            f"at the end: {', '.join(states) or 'nothing'}",
        ]

    def lanes(self) -> list[Lane]:
        """Return the picture's lanes."""
        servers = [Lane(f"server {host.number}") for host in self.environment.hosts]
        lanes = [*servers, Lane("Postgres"), Lane("mail server")]
        for struck in self.strikes:
            lane = self._lane_of(struck, lanes)
            ends_at = struck.ended_at or time.time()
            target = FAULTS[struck.strike.kind].shape.target
            lane.bands.append(Band(struck.strike.kind, target, self._s(struck.began_at), self._s(ends_at), struck.note))
        self._fill_tries(servers)
        self._fill_sends(servers)
        for at, claims in self.samples.taken:
            by_server: Counter[int] = Counter()
            for relay, count in claims.items():
                if relay in self.processes:
                    by_server[self.processes[relay].host] += count
            for number, lane in enumerate(servers):
                lane.claims.append((self._s(at), by_server[number]))
        return lanes

    def _s(self, at: float) -> float:
        return max(at - self.began_at, 0.0)

    def _lane_of(self, struck: Struck, lanes: Sequence[Lane]) -> Lane:
        target = FAULTS[struck.strike.kind].shape.target
        if target in ON_A_SERVER:
            return lanes[struck.strike.host]
        return lanes[-2] if target == "postgres" else lanes[-1]

    def _fill_tries(self, servers: Sequence[Lane]) -> None:
        for one in self.facts.attempts:
            if one.relay not in self.processes:
                continue
            lane = servers[self.processes[one.relay].host]
            if one.marked_at is not None:
                lane.marks.append(self._s(one.marked_at))
            (lane.doubts if one.verdict == "in_doubt" else lane.settles).append(self._s(one.settled_at))

    def _fill_sends(self, servers: Sequence[Lane]) -> None:
        seen: dict[str, int] = defaultdict(int)
        for one in self.facts.accepted:
            seen[one.address] += 1
            if one.server >= 0:
                lane = servers[one.server]
                (lane.sends if seen[one.address] == 1 else lane.twice).append(self._s(one.at))


async def gather(
    environment: Environment,
    strikes: Sequence[Struck],
    samples: Samples,
    *,
    times: tuple[float, float, float],
    policy: str,
) -> Record:
    """Ask the database and the mail server how it ended; `times` are began, over and settled."""
    relays = await environment.sql("SELECT id, pid, started_at FROM outbox.relay")
    servers = {process.number: process.host for process in environment.processes}
    facts = Facts(
        recipients={row["email"] for row in await environment.sql("SELECT email FROM people")},
        accepted=[
            Acceptance(one.at, address, one.message_id, servers.get(environment.mail.visitors.get(one.visit, -1), -1))
            for one in environment.sink.accepted
            for address in one.recipients
        ],
        deliveries=[Delivery(*row) for row in await environment.sql(EMAILS)],
        attempts=[_attempt(row) for row in await environment.sql(TRAIL)],
        reports={row["email"]: row["reports"] for row in await environment.sql(REPORTS)},
        refused=environment.mail.refused,
        policy=policy,
    )
    processes = {
        row["id"]: process
        for row in relays
        if (process := _life_of(environment, row["pid"], row["started_at"].timestamp()))
    }
    return Record(facts, processes, environment, strikes, samples, *times)


def _life_of(environment: Environment, pid: int, at: float) -> ServerProcess | None:
    """Return the process that had this pid then: the system uses pids again."""
    fitting = [process for process in environment.processes if process.child.pid == pid and process.began_at <= at]
    return fitting[-1] if fitting else None


def _attempt(row: Any) -> Attempt:
    return Attempt(
        address=row["recipient"],
        attempt=row["attempt"],
        verdict=row["verdict"],
        settled_at=row["settled_at"].timestamp(),
        relay=row["relay"],
        marked_at=row["marked_at"].timestamp() if row["marked_at"] else None,
        reply=row["reply"],
    )

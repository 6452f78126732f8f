"""Any fleet, any order of events: the ledger on real Postgres against a model in memory.

The relays are real sessions with real advisory locks; what a relay would do by itself (claim, mark, settle, die at
any moment, bring late news through another session) is drawn by hypothesis. The model says what each row must be.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from outbox.database.locks import RELAY_LOCKS
from outbox.operations.pause import begin_pause, end_pause
from outbox.operations.resolve import Decision, resolve
from outbox.operations.retry_cancel import Act, operate
from outbox.relay import in_doubt, pauses
from outbox.relay.claims import release
from outbox.relay.quarantine import QUARANTINE_AFTER, SUSPECT_AFTER, Quarantine
from outbox.relay.registration import register
from outbox.relay.settlement import Settlement
from outbox.relay.sweep import judge, sweep
from outbox.relay.tick import TickRequest, tick
from outbox.smtp.outgoing import OutgoingEmail
from outbox.smtp.verdict import Accepted, Deferred, InDoubt, Outcome, Refused, Verdict, Withdrawn, outcome_of

RELAYS_MAX = 4
OPEN_MAX = 5  # few emails, so that the same ones are met again and again
TRIES_MAX = 3
LATER_S = 3600.0

VERDICTS: list[Verdict] = [
    Accepted("250 queued"),
    Deferred("451 later"),
    Refused("550 nobody"),
    InDoubt("silence"),
    Withdrawn("taken back"),
]
BEFORE_THE_MARK = [verdict for verdict in VERDICTS if not isinstance(verdict, Accepted | InDoubt)]
NEVER_SENT = (Deferred, Withdrawn)

# The picture of the states in schema.sql, by who draws the arrow. A 250 that comes late may also find its delivery
# pending or cancelled, when doubt was resolved as "send again" in the meantime; a person may also take a dead letter up
# again, or what was cancelled.
ARROWS = {
    "tick": {
        *[("pending", "sending"), ("pending", "pending"), ("pending", "dead"), ("pending", "sent")],
        ("cancelled", "sent"),
        *[("sending", state) for state in ("sent", "pending", "dead", "in_doubt")],
        *[("in_doubt", state) for state in ("sent", "pending", "dead", "in_doubt")],
    },
    "judge": {("sending", "in_doubt"), ("pending", "pending"), ("pending", "dead")},
    "resolve": {
        *[("in_doubt", state) for state in ("sent", "pending", "dead")],
        *[("dead", state) for state in ("pending", "dead")],
    },
    "resend": {("in_doubt", "pending")},
    "release": {("pending", "pending")},
    "cancel": {("pending", "cancelled")},
    "retry": {(state, "pending") for state in ("dead", "cancelled", "pending")},
    "hold": {("pending", "pending")},
    "put": set(),
    "nothing": set(),
}


@dataclass(frozen=True)
class Row:
    """A delivery as the model has it, and as the database must."""

    state: str = "pending"
    attempt: int = 0
    withdrawn: int = 0
    relay: int | None = None
    orphaned: int = 0
    is_held: bool = False

    @property
    def is_suspect(self) -> bool:
        return self.orphaned >= SUSPECT_AFTER

    @property
    def is_settled(self) -> bool:
        return self.state in ("sent", "dead", "cancelled")


@dataclass(eq=False)
class Try:
    """A try that a relay once began: its fence, and in the end the one verdict that the world gave it."""

    relay: int
    email: int
    attempt: int
    tries: int
    marked: bool
    delay_s: float
    verdict: Verdict | None = None
    is_told: bool = False
    may_have_arrived: bool = False

    @property
    def outcome(self) -> Outcome:
        assert self.verdict is not None
        return outcome_of(
            self.verdict,
            tries=self.tries,
            tries_max=TRIES_MAX,
            backoff_s=self.delay_s,
            again_s=self.delay_s,
            doubt_s=None,
        )

    @property
    def settlement(self) -> Settlement:
        return Settlement(self.relay, self.email, f"mail{self.email}", self.attempt, self.marked, self.outcome)

    def matches(self, row: Row) -> bool:
        """Whether the fence lets this news change the row."""
        if row.state in ("sent", "dead"):
            return False
        mine = row.relay == self.relay
        if not self.marked:
            return row.state == "pending" and mine and row.attempt == self.attempt - 1
        if row.attempt != self.attempt:
            return False
        return (row.state in ("sending", "in_doubt") and mine) or (
            row.state in ("pending", "cancelled") and self.outcome.state == "sent"
        )


@dataclass
class Living:
    """A relay whose session lives, and what it believes to hold."""

    connection: Any
    relay: int
    claims: dict[int, OutgoingEmail] = field(default_factory=dict)
    marks: dict[int, Try] = field(default_factory=dict)


# All that the database knows, in one snapshot.
LOOK = """
SELECT (SELECT coalesce(json_agg(d), '[]') FROM outbox.delivery d),
       (SELECT coalesce(json_agg(json_build_array(email, attempt, relay, verdict)), '[]') FROM outbox.attempt),
       ARRAY (SELECT objid::int FROM pg_locks WHERE locktype = 'advisory' AND classid = $1),
       ARRAY (SELECT id FROM outbox.relay WHERE ended_at IS NOT NULL)
"""

picks = st.lists(st.integers(0, 999), max_size=3)
one = st.integers(0, 999)
delays_s = st.sampled_from([0.0, 0.0, 0.0, LATER_S])
verdicts = st.sampled_from(VERDICTS)


def choose(population: list[Any], drawn: list[int]) -> list[Any]:
    """What the drawn numbers pick, each once."""
    return list(
        {id(chosen): chosen for n in drawn if population for chosen in [population[n % len(population)]]}.values()
    )


class Fleet(RuleBasedStateMachine):
    """Relays come, work, die and are judged; people decide; after every step the database is what the model says."""

    def __init__(self, runner: asyncio.Runner, url: str, admin: Any) -> None:
        super().__init__()
        self.runner, self.url, self.admin = runner, url, admin
        self.living: dict[int, Living] = {}
        self.dead: set[int] = set()  # sessions that are gone and not judged yet
        self.rows: dict[int, Row] = {}
        self.due: dict[int, Any] = {}
        self.trail: Counter[tuple[int, int, int | None, str]] = Counter()
        self.tries: list[Try] = []
        self.marked_ever: set[tuple[int, int]] = set()
        self.is_paused = False
        self.do(admin.execute("TRUNCATE outbox.attempt, outbox.delivery, outbox.email, outbox.relay, outbox.pause"))

    def do(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        for relay in list(self.living):
            self._end_session(relay)

    # ── the rules ────────────────────────────────────────────────────────────────────────────────────────────

    @initialize(relays=st.integers(1, 3), emails=st.integers(1, 5))
    def begin(self, relays: int, emails: int) -> None:
        """A fleet and its first mail."""
        for _ in range(relays):
            self._open_session()
        self.put(emails)

    @precondition(lambda self: sum(not row.is_settled for row in self.rows.values()) < OPEN_MAX)
    @rule(count=st.integers(1, 3))
    def put(self, count: int) -> None:
        """Emails come in, due at once."""
        made = self.do(
            self.admin.fetch(
                """
                WITH made AS (
                    INSERT INTO outbox.email (id, key, report, sender, recipient, message_id, message)
                    SELECT n, 'mail' || n, 1, 'a@x', 'b@x', '<1@x>', 'x' FROM (
                        SELECT nextval(pg_get_serial_sequence('outbox.email', 'id')) AS n FROM generate_series(1, $1)) t
                    RETURNING id)
                INSERT INTO outbox.delivery (email) SELECT id FROM made RETURNING email
                """,
                count,
            )
        )
        self.rows.update({row["email"]: Row() for row in made})
        self.check("put")

    @precondition(lambda self: len(self.living) < RELAYS_MAX)
    @rule()
    def open_relay(self) -> None:
        """One more relay."""
        self._open_session()
        self.check("nothing")

    @rule(who=one, room=st.integers(1, 4))
    def claim(self, who: int, room: int) -> None:
        """A relay claims."""
        self._tick(self._relay(who), [], [], room)

    @rule(who=one, room=st.integers(1, 3))
    def claim_and_mark(self, who: int, room: int) -> None:
        """A relay claims, and marks all that it has claimed."""
        relay = self._relay(who)
        self._tick(relay, [], [], room)
        self._tick(relay, [], list(relay.claims), 0)

    @precondition(lambda self: self.claims)
    @rule(who=one, own=picks)
    def mark(self, who: int, own: list[int]) -> None:
        """A relay marks some of its claims."""
        claims = self.claims
        relay, _ = claims[who % len(claims)]
        self._tick(relay, [], choose(list(relay.claims), own or [who]), 0)

    @precondition(lambda self: self.marks)
    @rule(which=one, verdict=verdicts, delay_s=delays_s)
    def settle(self, which: int, verdict: Verdict, delay_s: float) -> None:
        """A relay settles what it has marked itself: the ordinary end of a try."""
        relay, begun = self.marks[which % len(self.marks)]
        self._tick(relay, [self._news(begun, verdict, delay_s)], [], 0)

    @precondition(lambda self: self.tries)
    @rule(who=one, which=one, verdict=verdicts, delay_s=delays_s)
    def bring_old_news(self, who: int, which: int, verdict: Verdict, delay_s: float) -> None:
        """News of any try, for the first time or again, by its own session or another."""
        begun = self.tries[which % len(self.tries)]
        self._tick(self._relay(who), [self._news(begun, verdict, delay_s)], [], 0)

    @precondition(lambda self: self.late)
    @rule(who=one, which=one, verdict=st.sampled_from([VERDICTS[0], *VERDICTS]), room=st.integers(0, 2))
    def bring_late_news(self, who: int, which: int, verdict: Verdict, room: int) -> None:
        """News that outlived its session, in the tick in which its bearer may claim the same email again."""
        begun = self.late[which % len(self.late)]
        relay = self._relay(who)
        self._tick(relay, [self._news(begun, verdict, 0.0)], list(relay.claims), room)

    @rule(who=one, old=picks, own=picks, foreign=picks, room=st.integers(0, 3), verdict=verdicts, twice=st.booleans())
    def turn(
        self, who: int, old: list[int], own: list[int], foreign: list[int], room: int, verdict: Verdict, *, twice: bool
    ) -> None:
        """All at once in one commit, with marks that are not the relay's to make and news that is told twice."""
        relay = self._relay(who)
        begun = [*choose(list(relay.marks.values()), own), *choose(self.tries, old)]
        news = [self._news(each, verdict, 0.0) for each in begun]
        marks = choose(list(relay.claims), own) + choose(list(self.rows), foreign)
        self._tick(relay, news * 2 if twice else news, marks, room)

    @precondition(lambda self: self.claims)
    @rule(which=one, verdict=st.sampled_from(BEFORE_THE_MARK), delay_s=delays_s)
    def refuse_before_the_mark(self, which: int, verdict: Verdict, delay_s: float) -> None:
        """A server refuses the envelope; the news is settled now and may be told again later."""
        relay, claim = self.claims[which % len(self.claims)]
        begun = self._begin(claim, marked=False)
        self._tick(relay, [self._news(begun, verdict, delay_s)], [], 0)

    @precondition(lambda self: self.claims)
    @rule(which=one, committed=st.booleans(), swept=st.booleans())
    def mark_without_an_answer(self, which: int, *, committed: bool, swept: bool) -> None:
        """The mark's commit ended in an error: made or not, its dot is not written, and that is told later."""
        relay, claim = self.claims[which % len(self.claims)]
        if committed:
            self._tick(relay, [], [claim.email], 0)
            begun = relay.marks.get(claim.email)
        else:
            begun = self._begin(claim, marked=True)
        if begun is not None:
            begun.verdict = Withdrawn("its mark was not confirmed")
            begun.may_have_arrived = False
        self._end_session(relay.relay)
        self.check("nothing")
        if swept:
            self.sweep(which)

    @precondition(lambda self: self.claims)
    @rule(who=one, own=picks, foreign=picks)
    def release(self, who: int, own: list[int], foreign: list[int]) -> None:
        """A relay gives claims back; what is not its unmarked claim stays as it is."""
        relay = self._relay(who)
        given = choose(list(relay.claims), own) + choose(list(self.rows), foreign)
        self.do(release(relay.connection, relay.relay, given, quarantine=Quarantine()))
        for email in given:
            relay.claims.pop(email, None)
            row = self.rows[email]
            if row.state == "pending" and row.relay == relay.relay:
                self.rows[email] = replace(row, relay=None)
        self.check("release")

    @rule()
    def pause_or_resume(self) -> None:
        """A person pauses the report that all mail is of, or lets it go on; each is idempotent."""
        change = end_pause if self.is_paused else begin_pause
        assert [self.do(change(self.admin, "r", who="ann", why="")) for _ in range(2)] == [True, False]
        self.is_paused = not self.is_paused
        self.check("nothing")

    @precondition(lambda self: self.is_paused and self.claims)
    @rule(who=one, own=picks, foreign=picks)
    def set_aside(self, who: int, own: list[int], foreign: list[int]) -> None:
        """A relay sets aside what it may not send; what is not its unmarked claim stays as it is."""
        relay, claim = self.claims[who % len(self.claims)]
        given = [claim.email, *choose(list(relay.claims), own), *choose(list(self.rows), foreign)]
        aside = self.do(pauses.set_aside(relay.connection, relay.relay, given, Quarantine()))
        mine = {e for e in given if self.rows[e].state == "pending" and self.rows[e].relay == relay.relay}
        assert aside == mine
        for email in mine:
            relay.claims.pop(email, None)
            self.rows[email] = replace(self.rows[email], relay=None, is_held=True)
        self.check("hold")

    @rule(who=one)
    def take_up(self, who: int) -> None:
        """A relay takes up what is set aside under a pause that is over."""
        held = [] if self.is_paused else [email for email, row in self.rows.items() if row.is_held]
        assert self.do(pauses.take_up(self._relay(who).connection, Quarantine())) == len(held)
        for email in held:
            self.rows[email] = replace(self.rows[email], is_held=False)
        self.check("hold")

    @rule(which=one, other=picks)
    def cancel(self, which: int, other: list[int]) -> None:
        """A person cancels; only what is pending is, whoever has claimed it."""
        emails = sorted({list(self.rows)[which % len(self.rows)], *choose(list(self.rows), other)})
        done = self._operate(Act.CANCEL, emails)
        assert done == [e for e in emails if self.rows[e].state == "pending"]
        for email in done:
            row = self.rows[email]
            self.rows[email] = replace(row, state="cancelled", relay=None, is_held=False)
            self.trail[email, row.attempt, None, "cancelled"] += 1
        self.check("cancel")

    @rule(which=picks, other=picks)
    def retry(self, which: list[int], other: list[int]) -> None:
        """A person has sent again what is dead or cancelled, and hastens what waits."""
        later = self.do(
            self.admin.fetch("SELECT email FROM outbox.delivery WHERE due_at > now() AND due_at < 'infinity'")
        )
        waits = {row["email"] for row in later}
        emails = choose([e for e, row in self.rows.items() if row.state in ("dead", "cancelled")], which)
        emails = sorted({*emails, *choose(list(self.rows), other)})
        for email in self._operate(Act.RETRY, emails):
            row = self.rows[email]
            assert row.state in ("dead", "cancelled") or (row.state == "pending" and email in waits)
            self.trail[email, row.attempt, None, "retried"] += 1
            if row.state != "pending":
                self._send_again(email, row.attempt, 0)
            emails.remove(email)
        assert not [e for e in emails if self.rows[e].state in ("dead", "cancelled")]
        self.check("retry")

    def _operate(self, act: Act, emails: list[int]) -> list[int]:
        return list(self.do(operate(self.admin, act, emails, who="ann", why="", target="some")))

    @rule(who=one, how=st.sampled_from(["kill", "close", "evict"]))
    def lose_a_session(self, who: int, how: str) -> None:
        """A relay is killed, ends, or is ended by the server."""
        self._end_session(self._relay(who).relay, how)
        self.check("nothing")

    @precondition(lambda self: self.marks)
    @rule(which=one, then=st.sampled_from(["nothing", "it is swept", "it is swept and sent again"]))
    def lose_a_session_that_is_sending(self, which: int, then: str) -> None:
        """A relay is killed between its mark and its settle, and judged at once or later."""
        relay, begun = self.marks[which % len(self.marks)]
        self._end_session(relay.relay)
        self.check("nothing")
        if then != "nothing":
            self.sweep(which)
        if then.endswith("sent again"):
            self._resolve([begun.email], Decision.RESEND)

    @precondition(lambda self: self.dead)
    @rule(who=one)
    def sweep(self, who: int) -> None:
        """A living relay judges the dead."""
        relay = self._relay(who)
        found = self.do(sweep(relay.connection, relay.relay, doubt_s=None, quarantine=Quarantine()))
        assert set(found.dead) == self.dead
        assert (found.freed, found.doubted) == self._judge(self.dead, died=1)
        assert found.alive == len(self.living) - 1
        self.dead.clear()
        self.check("judge")

    @precondition(lambda self: len(self.living) > 1)
    @rule(who=one)
    def stop(self, who: int) -> None:
        """A relay ends in order: it judges itself under its own lock."""
        relay = self._relay(who)
        judged = self.do(judge(relay.connection, [relay.relay], doubt_s=None, died=False, quarantine=Quarantine()))
        assert judged == self._judge({relay.relay}, died=0)
        self._end_session(relay.relay, "close")
        self.dead.discard(relay.relay)
        self.check("judge")

    @precondition(lambda self: any(row.state in ("in_doubt", "dead") for row in self.rows.values()))
    @rule(which=picks, other=picks, decision=st.sampled_from([Decision.RESEND, *Decision]))
    def decide(self, which: list[int], other: list[int], decision: Decision) -> None:
        """A person decides about what is in doubt or dead, and names others by mistake."""
        emails = choose([e for e, row in self.rows.items() if row.state in ("in_doubt", "dead")], which)
        emails += choose(list(self.rows), other)
        self._resolve(emails, decision)

    @precondition(lambda self: any(row.state == "in_doubt" for row in self.rows.values()))
    @rule(who=one, which=picks)
    def send_doubt_again(self, who: int, which: list[int]) -> None:
        """The grace of some doubt is over, and a relay follows the policy `resend`."""
        emails = choose([email for email, row in self.rows.items() if row.state == "in_doubt"], which)
        self.do(
            self.admin.execute("UPDATE outbox.delivery SET due_at = now() WHERE email = ANY ($1::bigint[])", emails)
        )
        assert self.do(in_doubt.resend_doubtful(self._relay(who).connection, Quarantine())) == len(emails)
        for email in emails:
            self.trail[email, self.rows[email].attempt, None, "resolved"] += 1
            self._send_again(email, self.rows[email].withdrawn, self.rows[email].orphaned)
        self.check("resend")

    def _resolve(self, emails: list[int], decision: Decision) -> None:
        decided = self.do(resolve(self.admin, [f"mail{email}" for email in emails], decision))
        assert set(decided) == {f"mail{email}" for email in set(emails) if self._decide(email, decision)}
        self.check("resolve")

    @precondition(lambda self: any(begun.delay_s for begun in self.tries))
    @rule()
    def time_passes(self) -> None:
        """All that was put off is due."""
        self.do(
            self.admin.execute(
                "UPDATE outbox.delivery SET due_at = now()"
                " WHERE state = 'pending' AND due_at > now() AND paused IS NULL"
            )
        )
        self.check("nothing")

    def _open_session(self) -> None:
        connection = self.do(asyncpg.connect(self.url))
        relay = self.do(register(connection, 1))
        assert relay not in self.living
        self.living[relay] = Living(connection, relay)

    # ── the model ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def claims(self) -> list[tuple[Living, OutgoingEmail]]:
        """What living relays have claimed and not marked."""
        return [(relay, claim) for relay in self.living.values() for claim in relay.claims.values()]

    @property
    def marks(self) -> list[tuple[Living, Try]]:
        """What living relays have marked and not settled."""
        return [(relay, begun) for relay in self.living.values() for begun in relay.marks.values()]

    @property
    def late(self) -> list[Try]:
        """Tries whose session is gone and whose news could still matter; best those that nobody has told of."""
        late = [begun for begun in self.tries if begun.relay not in self.living]
        late = [begun for begun in late if begun.attempt == self.rows[begun.email].attempt]
        late = [begun for begun in late if self.rows[begun.email].state not in ("sent", "dead")]
        return [begun for begun in late if not begun.is_told] or late

    def _relay(self, who: int) -> Living:
        """One that lives; the fleet never dies out."""
        if not self.living:
            self._open_session()
        return list(self.living.values())[who % len(self.living)]

    def _begin(self, claim: OutgoingEmail, *, marked: bool) -> Try:
        relay = self.living[claim.relay]
        relay.claims.pop(claim.email, None)
        attempt = claim.attempt + 1
        begun = Try(claim.relay, claim.email, attempt, attempt - claim.withdrawn, marked, 0.0)
        self.tries.append(begun)
        return begun

    def _news(self, begun: Try, verdict: Verdict, delay_s: float) -> Try:
        """The try with its verdict: the first that is drawn is what happened, for ever."""
        if begun.verdict is None:
            begun.verdict, begun.delay_s = verdict, delay_s
        begun.is_told = True
        for relay in self.living.values():
            if relay.marks.get(begun.email) is begun:
                del relay.marks[begun.email]
        return begun

    def _tick(self, relay: Living, news: list[Try], marks: list[int], room: int) -> None:
        before = dict(self.rows)
        due = self._due() if room else []
        done = self.do(
            tick(
                relay.connection,
                relay.relay,
                TickRequest(
                    settlements=[begun.settlement for begun in news],
                    marks=marks,
                    claims_max=room,
                    suspects_max=min(room, 1),
                ),
            )
        )
        assert done.held == ({"r"} if self.is_paused else set())
        touched = self._settle(news, done.settled, before)
        assert set(done.marked) == {
            email
            for email in marks
            if email not in touched and before[email].state == "pending" and before[email].relay == relay.relay
        }
        for email, attempt in done.marked.items():
            self._mark(relay, email, attempt)
        free = [email for email in due if email not in touched]
        suspects = [email for email in free if before[email].is_suspect][:1]
        unsuspected = [email for email in free if not before[email].is_suspect][:room]
        assert sorted(claim.email for claim in done.claims) == sorted(suspects + unsuspected)
        for claim in done.claims:
            row = self.rows[claim.email]
            assert (claim.relay, claim.attempt, claim.withdrawn) == (relay.relay, row.attempt, row.withdrawn)
            assert claim.suspect == row.is_suspect
            self.rows[claim.email] = replace(row, relay=relay.relay)
            relay.claims[claim.email] = claim
        self.check("tick")

    def _due(self) -> list[int]:
        """What may be claimed, in the order in which it must be."""
        found = self.do(
            self.admin.fetch("SELECT email FROM outbox.delivery WHERE due_at <= now() ORDER BY due_at, email")
        )
        emails = [row["email"] for row in found]
        return [e for e in emails if self.rows[e].state == "pending" and self.rows[e].relay is None]

    def _settle(self, news: list[Try], settled: frozenset[tuple[int, int]], before: dict[int, Row]) -> set[int]:
        """Let the news change its rows; gives the emails that it changed."""
        changed: set[int] = set()
        for begun in news:
            row = before[begun.email]
            fits = begun.matches(row)
            rivals = {other.attempt for other in news if other.email == begun.email and other.matches(row)}
            if begun.email in changed or not fits:
                # A mark that was never made leaves its number to the next: the answer may be about that one.
                assert fits or (begun.email, begun.attempt) not in settled or begun.attempt in rivals
                continue
            again = row.state == begun.outcome.state == "in_doubt"  # doubt that is told of doubt may say so or not
            if (begun.email, begun.attempt) not in settled:
                assert again or len(rivals) > 1
                continue
            self._apply(begun, row)
            changed.add(begun.email)
        assert {email for email, _ in settled} == changed
        return changed

    def _apply(self, begun: Try, row: Row) -> None:
        outcome = begun.outcome
        self.rows[begun.email] = Row(
            outcome.state,
            begun.attempt,
            row.withdrawn + 1 if outcome.verdict == "withdrawn" else min(row.withdrawn, begun.attempt - 1),
            None if outcome.state == "pending" else begun.relay,
            0 if outcome.verdict in ("accepted", "deferred", "refused") else row.orphaned,
        )
        self.trail[begun.email, begun.attempt, begun.relay, outcome.verdict] += 1
        if isinstance(begun.verdict, NEVER_SENT):
            begun.may_have_arrived = False

    def _mark(self, relay: Living, email: int, attempt: int) -> None:
        """The promise itself: no dot while an earlier one of the email may have brought it, unless a person said so."""
        row = self.rows[email]
        assert attempt == row.attempt + 1
        assert (email, attempt) not in self.marked_ever, "an attempt is marked once"
        self.marked_ever.add((email, attempt))
        assert not any(begun.may_have_arrived for begun in self.tries if begun.email == email)
        claim = relay.claims.pop(email, None)
        tries = attempt - row.withdrawn
        begun = Try(relay.relay, email, attempt, tries, marked=True, delay_s=0.0, may_have_arrived=True)
        assert claim is None or claim.attempt + 1 == attempt
        self.tries.append(begun)
        relay.marks[email] = begun
        self.rows[email] = replace(row, state="sending", attempt=attempt)

    def _judge(self, relays: set[int], *, died: int) -> tuple[int, int]:
        freed = [e for e, row in self.rows.items() if row.relay in relays and row.state == "pending"]
        doubted = [e for e, row in self.rows.items() if row.relay in relays and row.state == "sending"]
        for email in freed:
            row = self.rows[email] = replace(self.rows[email], relay=None, orphaned=self.rows[email].orphaned + died)
            if row.orphaned >= QUARANTINE_AFTER:
                self.rows[email] = replace(row, state="dead", attempt=row.attempt + 1)
                self.trail[email, row.attempt + 1, None, "quarantined"] += 1
        for email in doubted:
            was = self.rows[email]
            row = self.rows[email] = replace(was, state="in_doubt", orphaned=was.orphaned + died)
            self.trail[email, row.attempt, row.relay, "in_doubt"] += 1
        return len(freed), len(doubted)

    def _is_decided(self, email: int) -> bool:
        attempt = self.rows[email].attempt
        return any(count and key[:2] == (email, attempt) and key[3] == "resolved" for key, count in self.trail.items())

    def _decide(self, email: int, decision: Decision) -> bool:
        row = self.rows[email]
        if row.state not in ("in_doubt", "dead") or (row.state == "dead" and decision is Decision.SENT):
            return False
        if row.state == "dead" and decision is Decision.DISCARD and self._is_decided(email):
            return False
        self.trail[email, row.attempt, row.relay, "resolved"] += 1
        match decision:
            case Decision.SENT:
                self.rows[email] = replace(row, state="sent")
            case Decision.DISCARD:
                self.rows[email] = replace(row, state="dead")
            case Decision.RESEND:
                self._send_again(email, row.attempt if row.state == "dead" else row.withdrawn, 0)
        return True

    def _send_again(self, email: int, withdrawn: int, orphaned: int) -> None:
        """Somebody decided: what earlier tries may have brought counts no more."""
        self.rows[email] = Row("pending", self.rows[email].attempt, withdrawn, None, orphaned)
        for begun in self.tries:
            if begun.email == email:
                begun.may_have_arrived = False

    def _end_session(self, relay: int, how: str = "kill") -> None:
        """End a session one way or another; its lock is free then."""
        ended = self.living.pop(relay).connection
        if how == "close":
            self.do(ended.close())
        elif how == "evict":
            self.do(self.admin.fetchval("SELECT pg_terminate_backend($1)", ended.get_server_pid()))
        self.do(self._wait_for_its_end(ended, relay))
        self.dead.add(relay)

    async def _wait_for_its_end(self, ended: Any, relay: int) -> None:
        ended.terminate()
        await self.admin.execute("SELECT pg_advisory_xact_lock($1, $2)", RELAY_LOCKS, relay)

    # ── what is true after every step ────────────────────────────────────────────────────────────────────────

    def check(self, action: str) -> None:
        """The database is what the model says, and came there by a lawful way."""
        rows, trail, locks, ended = self.do(self.admin.fetchrow(LOOK, RELAY_LOCKS))
        found = {row["email"]: row for row in json.loads(rows)}
        assert {
            email: Row(
                r["state"], r["attempt"], r["withdrawn"], r["relay"], r["orphaned"], is_held=r["paused"] is not None
            )
            for email, r in found.items()
        } == self.rows
        for email, row in found.items():
            assert (row["settled_at"] is not None) == self.rows[email].is_settled
            self._check_arrow(action, email)
        assert Counter(tuple(said) for said in json.loads(trail)) == self.trail
        assert set(locks) == set(self.living)
        assert not set(ended) & (set(self.living) | self.dead)
        self._check_beliefs()
        self.before = dict(self.rows)

    before: dict[int, Row] = {}  # noqa: RUF012 - replaced, never changed

    def _check_arrow(self, action: str, email: int) -> None:
        if email not in self.before:
            assert action == "put"
            return
        was, now = self.before[email], self.rows[email]
        assert was == now or (was.state, now.state) in ARROWS[action], f"{was} became {now} by {action}"
        assert now.attempt >= was.attempt
        assert now.withdrawn >= was.withdrawn or now.state == "sent"
        assert was.state != "sent" or now == was

    def _check_beliefs(self) -> None:
        """No email is believed to be held by two relays that live."""
        marks = Counter(email for relay in self.living.values() for email in relay.marks)
        assert all(count == 1 for count in marks.values())
        claims = Counter(
            email
            for relay in self.living.values()
            for email in relay.claims
            if self.rows[email].state == "pending" and self.rows[email].relay == relay.relay
        )
        assert all(count == 1 for count in claims.values())


@pytest.fixture
def url(postgres_server: Any) -> Iterator[str]:
    async def administer(statement: str) -> None:
        admin = await asyncpg.connect(postgres_server.url)
        await admin.execute(statement)
        await admin.close()

    async def give_all_mail_one_report(url: str) -> None:
        admin = await asyncpg.connect(url)
        await admin.execute(
            "INSERT INTO outbox.edition (report, period, starts_at, ends_at) VALUES ('r', 'now', now(), 'infinity');"
            "INSERT INTO outbox.report (edition, recipient_key, token, title, html) VALUES (1, 'k', 't', 't', 'h')"
        )
        await admin.close()

    asyncio.run(administer("CREATE DATABASE ledger_machine TEMPLATE outbox_template"))
    asyncio.run(give_all_mail_one_report(postgres_server.database_url("ledger_machine")))
    yield postgres_server.database_url("ledger_machine")
    asyncio.run(administer("DROP DATABASE ledger_machine WITH (FORCE)"))


def test_whatever_happens_the_ledger_is_what_the_model_says(url: str) -> None:
    with asyncio.Runner() as runner:
        admin = runner.run(asyncpg.connect(url))
        try:
            run_state_machine_as_test(
                lambda: Fleet(runner, url, admin),
                settings=settings(
                    max_examples=40,
                    stateful_step_count=40,
                    deadline=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
                ),
            )
        finally:
            runner.run(admin.close())

"""Model of failovers, failbacks and what relays remember: no email is accepted twice.

The servers and the way to them are a model; what is decided is decided by the product's own functions: when a relay
raises the barrier, for whom it waits, when it lifts, what it does about another's, what it remembers and tells.

A key is excused where the promise ends: the relay that had it accepted is gone, had not come back when the time of a
barrier was over, or was unknown to all who waited.
"""

import copy
import os
from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outbox.database.failover_rules import (
    Answer,
    Here,
    Kind,
    Other,
    Presence,
    Row,
    answer_of,
    awaited_by,
    blind_s,
    may_lift,
    met_here,
    raised,
    reason_to_raise,
)
from outbox.mail.delivery_state import DeliveryState
from outbox.relay.settlement import Settlement
from outbox.relay.verdict_history import VerdictHistory
from outbox.smtp.outgoing import OutgoingEmail, Try
from outbox.smtp.verdict import Outcome

GUARD_S, LEASE_S, GRACE_S = 5.0, 10.0, 6.0  # a short grace, so that it is over now and then
BLIND_S = blind_s(GUARD_S, LEASE_S)  # a shorter freeze may go unnoticed by relays whose session outlives it
SENT = Outcome(DeliveryState.SENT, "accepted", "250 ok")
LAG_S = 40.0  # how far a standby may be behind: less than relays remember
HOW = ["sent", "sent", "sent", "deferred", "withdrawn", "unanswered", "unwritten", "not yet"]


@dataclass
class Delivery:
    state: str = "pending"
    attempt: int = 0
    relay: int | None = None
    doubts: set = field(default_factory=set)


@dataclass
class Registered:
    sid: int
    instance: str
    timeline: int
    told_epoch: int | None = None
    is_ended: bool = False


@dataclass
class Server:
    """One server: a history of rows, and whether it answers."""

    id: tuple
    rows: dict = field(default_factory=dict)
    relays: list = field(default_factory=list)
    sids: int = 0
    barrier: Row = field(default_factory=Row)
    until: float = 0.0
    lift_at: float = 0.0
    moved_at: float | None = None
    is_up: bool = True
    frozen_at: float = 0.0

    def read(self, now):
        moved_s = None if self.moved_at is None else now - self.moved_at
        return replace(self.barrier, until_s=self.until - now, lift_in_s=self.lift_at - now, moved_s=moved_s)

    def write(self, row, now):
        self.barrier, self.until, self.lift_at = row, now + row.until_s, now + row.lift_in_s
        if row.moved_epoch == row.epoch:
            self.moved_at = now

    def lift(self):
        self.barrier = replace(self.barrier, is_lifted=True)


class Relay:
    """A relay process: what it knows, and its session if it has one."""

    def __init__(self, world, name):
        self.world, self.name = world, name
        self.presence = Presence(name, BLIND_S)
        self.history = VerdictHistory()
        self.server = self.sid = None
        self.last = None  # the server and the id of the last session
        self.told = None
        self.epoch, self.is_up, self.waits_since = 0, False, None
        self.claims, self.awaiting_reply, self.unsettled = [], [], []
        self.is_asleep, self.slept_at = False, 0.0
        self.met = set()

    # the session

    def lose(self):
        if self.server is not None:
            self.history.note_lost(self.world.now)
            self.last = (self.server, self.sid)
            self.server = self.sid = None
            self.claims = []

    def lives_on(self, server, sid):
        """Whether the server sees its session: its connection is whole, and it is not silent for a lease."""
        is_silent = self.is_asleep and self.world.now - self.slept_at > LEASE_S
        return self.server is server and self.sid == sid and server is self.world.lead and not is_silent

    def look_around(self, last):
        server = self.world.lead
        others = [
            Other(one.instance, one.timeline) for one in server.relays if not one.is_ended and one.instance != self.name
        ]
        return Here(
            server.id,
            others,
            has_last=last is not None
            and any((r.sid, r.instance, r.timeline) == (self.last[1], self.name, server.id[0]) for r in server.relays),
            is_first=bool(server.relays) and server.relays[-1].timeline != server.id[0],
        )

    def raise_barrier(self, kind, here, standing):
        server, now = self.world.lead, self.world.now
        server.write(raised(server.read(now), kind, awaited_by(kind, here, standing), GRACE_S), now)

    def open(self):
        world, server, now = self.world, self.world.lead, self.world.now
        last = self.last[0] if self.last else None
        standing = self.presence.standing(last.id if last else None, grace_s=GRACE_S)
        here = self.look_around(last)
        kind = reason_to_raise(here, standing, now)
        if kind is not None:
            self.raise_barrier(kind, here, standing)
        row = server.read(now)
        server.sids += 1
        self.server, self.sid = server, server.sids
        server.relays.append(Registered(self.sid, self.name, server.id[0]))
        world.tell_joined(self)
        self.epoch, self.is_up, self.waits_since = row.epoch, not row.is_lifted, None
        is_move = last is not None and last.id != server.id
        if is_move:
            self.history.note_move(0.0, now)
        if row.moved_s is not None:
            self.history.note_move(row.moved_s, now)
        self.presence.arrive(server.id, now, met_here(here))
        if self.told != server.id and self.told is not None:
            news = self.history.recall(self.unsettled, self.awaiting_reply, now, doubt_s=None)
            for one in news:
                attempt = tell(server, one, self.name)
                for tried in self.awaiting_reply:
                    if tried.outgoing.key == one.key and attempt is not None:
                        tried.renumber(0, attempt)
            self.unsettled = []
        self.told = server.id
        self.history.note_known()
        self._end_formers()

    def _end_formers(self):
        for one in self.server.relays:
            if one.instance == self.name and one.sid != self.sid and not one.is_ended:
                end(self.server, one)

    # a turn

    def turn(self):
        """What a relay does all the time, but claim and send. Gives whether it may do that now."""
        if self.server is not None and self.server is not self.world.lead:
            self.lose()
        if not self.world.lead.is_up:
            return False  # no answer: a session that it has may come to its end by that
        if self.server is None:
            self.open()
        self.presence.note_answer(self.world.now)
        if self.presence.has_gap:
            self._sweep()  # one that was under way when the server froze ends first
            self.raise_barrier(
                Kind.GAP, self.look_around(None), self.presence.standing(self.server.id, grace_s=GRACE_S)
            )
            self.presence.arrive(self.server.id, self.world.now)
            row = self.server.read(self.world.now)
            self.epoch, self.is_up = row.epoch, not row.is_lifted
        for settlement in self.unsettled:
            settle(self.server, settlement)
        self.unsettled = []
        self._meet_barrier()
        if not self.is_up:
            self._sweep()
        return not self.is_up

    def _meet_barrier(self):
        row = self.server.read(self.world.now)
        if self.is_up:
            self._wait(row)
        elif row.epoch != self.epoch:
            answer = answer_of(row, self.epoch, has_gap=self.presence.has_gap)
            if row.moved_s is not None:
                self.history.note_move(row.moved_s, self.world.now)
            if answer is Answer.VOUCH:
                self.server.lift()
            self.epoch, self.is_up = row.epoch, answer is Answer.WAIT
            if self.is_up:
                self._wait(row)

    def _wait(self, row):
        now = self.world.now
        self.waits_since = now if self.waits_since is None else self.waits_since
        self.epoch, self.is_up = row.epoch, not row.is_lifted
        if not self.is_up:
            return
        next(one for one in self.server.relays if one.sid == self.sid).told_epoch = row.epoch
        told = {one.instance for one in self.server.relays if one.told_epoch == row.epoch}
        waited_s = now - self.waits_since
        if may_lift(row, told, waited_s=waited_s, grace_s=GRACE_S):
            self.world.note_lift(self.server, row, told, is_time_over=row.until_s <= 0 or waited_s >= GRACE_S)
            self.server.lift()
            self.is_up = False

    def _sweep(self):
        others = [one for one in self.server.relays if not one.is_ended and one.sid != self.sid]
        alive = {one.instance for one in others if self.world.lives(self.server, one)}
        for one in others:
            if one.instance not in alive:
                end(self.server, one)
        self.presence.see(alive, self.world.now)
        self.met |= alive

    # mail

    def claim(self):
        for key, row in self.server.rows.items():
            if row.state == "pending" and row.relay is None:
                row.relay = self.sid
                self.claims.append(key)
                return

    def send(self, key, how):
        """Mark and send what it claimed; the gate is open, since its turn said so."""
        row, now = self.server.rows[key], self.world.now
        self.claims.remove(key)
        if row.state != "pending" or row.relay != self.sid:
            return
        row.attempt += 1
        tried = Try(OutgoingEmail(self.sid, 0, key, row.attempt - 1, 0, "a", "b", "<m>", b""))
        tried.mark(row.attempt)
        row.state = "sending"
        if how == "deferred":
            row.state, row.relay = "pending", None
        elif how == "withdrawn":
            row.state, row.relay = "pending", None
            self.history.note(tried, row.attempt, Outcome("pending", "withdrawn", "", 0.0), now)
        else:
            self.world.accept(key, self.name)
            if how == "unanswered":
                self.awaiting_reply.append(tried)
                return
            self.history.note(tried, row.attempt, SENT, now)
            if how == "unwritten":
                self.unsettled.append(settlement_of(tried))
            else:
                row.state = "sent"

    def hear_reply(self):
        tried = self.awaiting_reply.pop(0)
        self.history.note(tried, tried.attempt, SENT, self.world.now)
        self.unsettled.append(settlement_of(tried))


def settlement_of(tried):
    return Settlement(tried.outgoing.relay, 0, tried.outgoing.key, tried.attempt, marked=True, outcome=SENT)


def settle(server, settlement):
    """As TICK does it with an acceptance."""
    row = server.rows.get(settlement.key)
    if row is None or row.attempt != settlement.attempt:
        return
    is_own = row.relay == settlement.relay and row.state in ("sending", "in_doubt")
    if is_own or row.state in ("pending", "in_doubt"):
        row.state = "sent"


def tell(server, news, instance):
    """As REASSERT does it; gives the attempt of the row if it became what is told."""
    row = server.rows.get(news.key)
    state = news.outcome.state
    if row is None:
        if state != "pending":
            server.rows[news.key] = Delivery(state, news.attempt, news.relay)
        return None
    if row.state not in ("pending", "sending", "in_doubt"):
        return None
    is_own = row.attempt == news.attempt and row.relay == news.relay
    is_own = is_own and all(one.instance == instance for one in server.relays if one.sid == row.relay)
    if not (
        state == "sent"
        or (state == "in_doubt" and row.attempt < news.attempt)
        or (state == "in_doubt" and row.state == "pending" and (news.relay, news.attempt) not in row.doubts)
        or (is_own and state == "pending" and row.state in ("sending", "in_doubt"))
        or (is_own and state == "in_doubt" and row.state == "sending")
    ):
        return None
    row.state, row.attempt = state, max(row.attempt, news.attempt)
    row.relay = None if state == "pending" else news.relay
    if state == "in_doubt":
        row.doubts.add((news.relay, news.attempt))
    return row.attempt


def end(server, registered):
    """As JUDGE does it: unmarked claims become free, marked ones in doubt."""
    registered.is_ended = True
    for row in server.rows.values():
        if row.relay == registered.sid and row.state == "pending":
            row.relay = None
        elif row.relay == registered.sid and row.state == "sending":
            row.state = "in_doubt"
            row.doubts.add((row.relay, row.attempt))


class Failback(RuleBasedStateMachine):
    """Relays, servers, and the address that leads to one of these."""

    @initialize(relays=st.integers(1, 3), emails=st.integers(1, 6))
    def begin(self, relays, emails):
        self.now, self.keys, self.names, self.starts = 1000.0, 0, 0, 0
        self.accepted, self.excused = {}, set()
        self.relays = []
        self.lead = Server((1, 0))
        self.old = []
        self.standby, self.replicated_at = copy.deepcopy(self.lead), self.now
        self.put(emails)
        for _ in range(relays):
            self.join()
        self.replicate()

    def lives(self, server, registered):
        return any(relay.lives_on(server, registered.sid) for relay in self.relays)

    def tell_joined(self, joined):
        for relay in self.relays:
            if relay is not joined and relay.server is self.lead and not relay.is_asleep:
                relay.presence.see([joined.name], self.now)
                relay.met.add(joined.name)

    def accept(self, key, name):
        self.accepted.setdefault(key, []).append(name)

    def note_lift(self, server, row, told, *, is_time_over):
        """Excuse what the relays know that are late, or that nobody who waits can know of."""
        known = set(row.awaited) | {one.instance for one in server.relays}
        known |= {name for relay in self.relays if relay.name in told for name in relay.met}
        for key, names in self.accepted.items():
            for name in names:
                if name not in told and (is_time_over or name not in known):
                    self.excused.add(key)

    @property
    def awake(self):
        return [relay for relay in self.relays if not relay.is_asleep]

    def chosen(self, some, data):
        return some[data.draw(st.integers(0, len(some) - 1))]

    # what happens

    @rule(what=st.sampled_from(["emails", "emails", "a relay"]))
    def grow(self, what):
        if what == "emails" and self.lead.is_up:
            self.put(3)
        elif what == "a relay" and len(self.relays) < 5:
            self.join()

    def put(self, count):
        for _ in range(count):
            self.keys += 1
            self.lead.rows[f"mail{self.keys}"] = Delivery()

    def join(self):
        self.names += 1
        self.relays.append(Relay(self, f"relay{self.names}"))
        self.relays[-1].turn()

    def replicate(self):
        """The standby has all that was committed up to now."""
        self.standby, self.replicated_at = copy.deepcopy(self.lead), self.now

    @rule(seconds=st.sampled_from([0.5, 2.0, 9.0]))
    def pass_time(self, seconds):
        """Relays that have a session on a server which answers have a turn every other second."""
        end_at = self.now + seconds
        while self.now < end_at:
            self.now = min(self.now + 2.0, end_at)
            if self.lead.is_up and self.now - self.replicated_at > LAG_S:
                self.replicate()
            for relay in self.awake:
                if relay.server is self.lead and self.lead.is_up:
                    relay.turn()
                elif self.now - relay.presence.answered_s > LEASE_S:
                    relay.lose()

    @precondition(lambda self: self.awake)
    @rule(data=st.data(), hows=st.lists(st.sampled_from(HOW), min_size=2, max_size=6), patient=st.booleans())
    def work(self, data, hows, patient):
        relay = self.chosen(self.awake, data)
        for how in hows:
            if not relay.turn() and patient:
                self.pass_time(2.0)
            if not relay.turn():
                return
            if not relay.claims:
                relay.claim()
            if how != "not yet" and relay.claims and relay.turn() and relay.claims:
                relay.send(relay.claims[0], how)

    @precondition(lambda self: any(relay.awaiting_reply for relay in self.awake))
    @rule(data=st.data())
    def reply(self, data):
        self.chosen([relay for relay in self.awake if relay.awaiting_reply], data).hear_reply()

    @precondition(lambda self: self.relays)
    @rule(data=st.data(), what=st.sampled_from(["sleep", "wake", "sleep", "wake", "die", "freeze", "replicate"]))
    def trouble(self, data, what):
        """Of one relay, or a server that freezes for a while, which nobody takes over from."""
        if what == "freeze":
            self.lead.is_up = False
            self.pass_time(data.draw(st.sampled_from([BLIND_S + 1, 20.0]), label="seconds"))
            self.lead.is_up = True
        elif what == "replicate":
            self.replicate()
        else:
            getattr(self, what)(self.chosen(self.relays, data))

    def sleep(self, relay):
        if not relay.is_asleep:
            relay.is_asleep, relay.slept_at = True, self.now

    def wake(self, relay):
        if relay.is_asleep and (self.now - relay.slept_at > LEASE_S or relay.server is not self.lead):
            relay.lose()
        relay.is_asleep = False

    def die(self, relay):
        self.relays.remove(relay)
        self.excused |= {key for key, names in self.accepted.items() if relay.name in names}

    @precondition(lambda self: len(self.old) < 3)
    @rule(data=st.data())
    def go_forward(self, data):
        """The primary freezes and its standby takes over, on a timeline of its own."""
        self.lead.is_up, self.lead.frozen_at = False, self.now
        self.old.append(self.lead)
        self.starts += 1
        timeline = 1 + max(server.id[0] for server in self.old)
        self.standby.id = (timeline, self.starts)
        self.lead, self.standby = self.standby, copy.deepcopy(self.standby)
        self.replicated_at = self.now
        self.lead.is_up = True
        self.come(data)

    @precondition(lambda self: self.old)
    @rule(data=st.data())
    def go_back(self, data):
        """The present primary is frozen, and an old one is in charge again, as it was."""
        back = self.chosen(self.old, data)
        if self.now - back.frozen_at <= BLIND_S:
            self.pass_time(BLIND_S)
        if self.lead.is_up:
            self.lead.is_up, self.lead.frozen_at = False, self.now
            self.old.append(self.lead)
        self.old.remove(back)
        self.lead = back
        self.lead.is_up = True
        self.standby, self.replicated_at = copy.deepcopy(self.lead), self.now
        self.come(data)

    @precondition(lambda self: self.relays and len(self.old) < 3)
    @rule(data=st.data())
    def excursion(self, data):
        """There and back: some relays are left out of it, others send there, and one is the first to work here again.

        Each part is a rule by itself; together they are rare.
        """
        some = st.sampled_from([False, False, True])
        if self.lead.is_up:
            self.put(4)
            self.replicate()
        for relay in self.awake:
            if len(self.awake) > 1 and data.draw(some, label=f"{relay.name} sleeps"):
                self.sleep(relay)
        self.go_forward(data)
        if data.draw(some, label="a new relay is first there"):
            self.join()
            self.work_at_once(self.relays[-1], data)
        if self.awake:
            worker = self.chosen(self.awake, data)
            worker.turn()
            self.pass_alone(worker, data.draw(st.sampled_from([7.0, 7.0, 2.0]), label="seconds alone"))
            self.work_at_once(worker, data)
        if data.draw(some, label="a relay joins there"):
            self.join()
            self.pass_alone(self.relays[-1], data.draw(st.sampled_from([0.0, 2.0]), label="seconds alone"))
            self.work_at_once(self.relays[-1], data)
        if data.draw(some, label="more time passes"):
            self.pass_time(data.draw(st.sampled_from([9.0, 70.0]), label="seconds"))
        self.go_back(data)
        if data.draw(some, label="a new relay is first here"):
            self.join()
            self.work_at_once(self.relays[-1], data)
        first = self.chosen(self.relays, data)
        self.wake(first)
        first.turn()
        self.pass_alone(first, data.draw(st.sampled_from([0.0, 2.0, 3.5]), label="seconds alone"))
        self.work_at_once(first, data)

    def work_at_once(self, relay, data):
        """Claim and send as long as it may."""
        for how in data.draw(st.lists(st.sampled_from(HOW), min_size=2, max_size=5), label=f"{relay.name} sends"):
            if not relay.turn():
                return
            if not relay.claims:
                relay.claim()
            if how != "not yet" and relay.claims:
                relay.send(relay.claims[0], how)

    def pass_alone(self, relay, seconds):
        """Let time pass in which no other relay has a turn."""
        end_at = self.now + seconds
        while self.now < end_at:
            self.now = min(self.now + 1.0, end_at)
            relay.turn()
        for other in self.awake:
            if self.now - other.presence.answered_s > LEASE_S:
                other.lose()

    def come(self, data):
        """Some relays come to where the address leads now, and some are at work there soon after."""
        for relay in self.awake:
            if data.draw(st.sampled_from([True, True, False]), label=f"{relay.name} comes at once"):
                relay.turn()
        self.pass_time(data.draw(st.sampled_from([3.0, 0.0]), label="seconds"))

    @invariant()
    def none_is_accepted_twice(self):
        twice = {k: v for k, v in getattr(self, "accepted", {}).items() if len(v) > 1 and k not in self.excused}
        assert twice == {}

    def teardown(self):
        """Once all are awake and the grace is over, nothing waits."""
        if not hasattr(self, "lead"):
            return
        self.lead.is_up = True
        if not self.relays:
            return
        for relay in self.relays:
            if relay.is_asleep:
                relay.lose()
                relay.is_asleep = False
            relay.turn()
        for _ in range(3):
            self.pass_time(GRACE_S + 1)
        for relay in self.relays:
            while relay.turn() and (relay.claims or self._is_free()):
                if not relay.claims:
                    relay.claim()
                relay.send(relay.claims[0], "sent")
        self.none_is_accepted_twice()
        left = {row.state for row in self.lead.rows.values()}
        assert left <= {"sent", "in_doubt", "sending"}, left

    def _is_free(self):
        return any(row.state == "pending" and row.relay is None for row in self.lead.rows.values())


# A night's run: FAILBACK_EXAMPLES=20000 scripts/test tests/property/test_failback_machine.py
EXAMPLES = int(os.environ.get("FAILBACK_EXAMPLES", "200"))
Failback.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=30, deadline=None)
TestFailback = Failback.TestCase

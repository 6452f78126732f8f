"""Mail server of a fault run: it has a pace, misbehaves when asked to, and records what reached it.

Misbehaviour comes from the seed, the visit and the message's number in it, so a message meets at most one kind.
It never lies: what it answers with 4xx or 5xx it has not accepted (RFC 5321 §4.2.1).
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from outbox.sandbox.smtp_sink import Accept, Accepted, Action, Cut, Hold, Reply, Reset, Stage, Stall, Trickle, Visit

PACE_MAX_S: Final = 1.0
ENDLESS: Final = b"2" * 2_000_000
SLOW_S: Final = 1.0
TOO_SLOW_S: Final = 5.0  # longer than the relays wait: accepted when the relay has gone

Misbehaviour = Callable[["Mail"], Action]


def _garbage(_: "Mail") -> Action:
    return Reply("what?")


ANYWHERE: Final[dict[str, Misbehaviour]] = {
    "FIN": lambda _: Cut(),
    "RST": lambda _: Reset(),
    "hang": lambda _: Stall(),
    "421": lambda _: Reply("421 4.3.2 closing", then_cut=True),
    "4xx": lambda _: Reply("451 4.3.0 not now"),
    "garbage": _garbage,
    "endless": lambda _: Reply(ENDLESS),
}
ARRIVING: Final = {**ANYWHERE, "split": lambda _: Trickle()}
SPEAKING: Final = {**ARRIVING, "slow": lambda mail: Hold(mail.after(SLOW_S))}
REFUSING: Final = {"5xx": lambda _: Reply("550 5.1.1 nobody here")}
MISBEHAVIOURS: Final[dict[Stage, dict[str, Misbehaviour]]] = {
    Stage.CONNECT: ARRIVING,
    Stage.EHLO: ARRIVING,
    Stage.MAIL: SPEAKING,
    Stage.RCPT: {**SPEAKING, **REFUSING, "double": lambda _: Reply("250 2.1.5 OK\r\n250 2.1.5 OK")},
    Stage.DATA: {**SPEAKING, **REFUSING, "double": lambda _: Reply("354 go on\r\n354 go on")},
    Stage.CONTENT: {name: ANYWHERE[name] for name in ("FIN", "RST", "hang", "421")},
    Stage.DOT: {
        **SPEAKING,
        **REFUSING,
        "double": lambda _: Reply("250 2.0.0 OK\r\n250 2.0.0 OK"),
        "too slow": lambda mail: Hold(mail.after(TOO_SLOW_S)),
        "accept, FIN": lambda _: Accept(Cut()),
        "accept, RST": lambda _: Accept(Reset()),
        "accept, hang": lambda _: Accept(Stall()),
        "accept, garbage": lambda _: Accept(Reply("what?")),
    },
}
TALK: Final = (Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.CONTENT, Stage.DOT, Stage.DOT)


@dataclass(frozen=True, slots=True)
class Dot:
    """Final dot that arrived, whatever the reply was."""

    at: float
    address: str
    visit: int


@dataclass(eq=False)
class Mail:
    """Script of the sink. `trouble` is the share of messages that it mistreats, `per_s` how many begin in a second."""

    seed: int | str
    trouble: float = 0.0
    per_s: float | None = None
    dot_s: float = 0.0
    """How long the server takes over a dot before it accepts, at most; at least 0.6 of it."""
    whose: Callable[[Visit], int] = lambda _: -1
    """The process that a visit comes from, asked once EHLO is there."""
    held: Callable[[Visit], bool] = lambda _: False
    """Visits whose next MAIL waits for ever."""
    visitors: dict[int, int] = field(default_factory=dict)
    dots: list[Dot] = field(default_factory=list)
    begun: Counter[int] = field(default_factory=Counter)
    """Messages begun by each process."""
    refused: set[str] = field(default_factory=set)
    met: Counter[str] = field(default_factory=Counter)
    """How often each kind was met, as `DOT FIN`."""
    waiting: int = 0
    """Answers that are still to come."""
    log: Path | None = None
    """A file with the Message-ID of each message accepted, for those who ask (`in_doubt = "ask"`)."""
    _slot_at: float = 0.0

    def __call__(self, stage: Stage, visit: Visit) -> Action | None:
        """Return the action at a stage of a visit; None for the usual reply."""
        self._witness(stage, visit)
        if self.trouble and (action := self._misbehave(stage, visit)):
            return action
        if stage is Stage.MAIL and self.held(visit):
            return Stall()
        if stage is Stage.MAIL and self.per_s:
            return self._paced(self.per_s)
        if stage is Stage.DOT and self.dot_s:
            draw = random.Random(f"{self.seed}/dot/{visit.number}/{visit.messages_begun}")
            return Hold(self.after(self.dot_s * draw.uniform(0.6, 1.0)))
        return None

    def calm(self) -> None:
        """Stop misbehaving and pacing."""
        self.trouble, self.per_s, self.dot_s = 0.0, None, 0.0

    def note(self, accepted: Accepted) -> None:
        """Log what was accepted."""
        if self.log is not None:
            with self.log.open("a") as log:
                log.write(f"{accepted.message_id}\n")

    def after(self, seconds: float) -> asyncio.Event:
        """Return an event that is set after so many seconds."""
        event = asyncio.Event()
        self.waiting += 1

        def come() -> None:
            self.waiting -= 1
            event.set()

        asyncio.get_running_loop().call_later(seconds, come)
        return event

    def _witness(self, stage: Stage, visit: Visit) -> None:
        if stage is Stage.EHLO:
            self.visitors[visit.number] = self.whose(visit)
        elif stage is Stage.MAIL:
            self.begun[self.visitors.get(visit.number, -1)] += 1
        elif stage is Stage.DOT:
            self.dots += [Dot(time.time(), address, visit.number) for address in visit.recipients]

    def _misbehave(self, stage: Stage, visit: Visit) -> Action | None:
        arriving = stage in (Stage.CONNECT, Stage.EHLO)
        draw = random.Random(f"{self.seed}/{visit.number}/{'' if arriving else visit.messages_begun}")
        if draw.random() >= self.trouble or draw.choice((Stage.CONNECT, Stage.EHLO) if arriving else TALK) is not stage:
            return None
        name = draw.choice(sorted(MISBEHAVIOURS[stage]))
        self.met[f"{stage} {name}"] += 1
        if name == "5xx":
            self.refused.update(visit.recipients)
        return MISBEHAVIOURS[stage][name](self)

    def _paced(self, per_s: float) -> Action | None:
        """Spread the messages, so that there is still something to send when a fault comes."""
        now = time.monotonic()
        self._slot_at = max(now, self._slot_at) + 1 / per_s
        wait_s = min(self._slot_at - now - 1 / per_s, PACE_MAX_S)
        return Hold(self.after(wait_s)) if wait_s > 0 else None

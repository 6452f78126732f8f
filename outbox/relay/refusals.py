"""Judgement of refusals that may be about the sender or this host rather than about an email, and how it is undone.

One reply seldom shows which: "relaying denied" may be about this recipient's domain or about all mail of this host, and
"550 go away" about anything. The evidence is what the server does with other mail at that time, and if different
recipients get the same. `RefusalJudge` decides, without a clock or a database of its own; `put_back` undoes dead
letters that turn out to be the route's.
"""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from outbox.database.connection import Connection
from outbox.database.values import storable
from outbox.smtp.refusal import About, Refusal

EVIDENCE_S: Final = 60.0  # so long an acceptance shows that the server takes mail of this sender
REPEATED_MIN: Final = 3  # different recipients in a row that hear the same
REMEMBERED_MAX: Final = 1000  # dead letters of the last EVIDENCE_S, and senders, that are remembered
READ_CHARACTERS_MAX: Final = 600  # of a reply; the patterns take the square of the length
COMPARED_CHARACTERS_MAX: Final = 200  # less than reasons of pauses keep of a reply

# What differs between replies that say the same: addresses, numbers, and what servers call a try.
_ADDRESS: Final = re.compile(r"<[^<>]*>|\S+@\S+")
_TOKEN: Final = re.compile(r"\b(?=\w*\d)[\w.:-]+")


class Ruling(Enum):
    """Consequence of a refusal that may be about the route."""

    EMAIL = auto()
    """It is about this email: its verdict stands."""
    SPARE = auto()
    """It is about something that this email brings out, but the server takes others: this email waits."""
    SENDER = auto()
    """The server takes other senders: the mail of this one waits."""
    ROUTE = auto()
    """The server takes no mail at all: the route waits."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Email that was made a dead letter by a reply which may turn out to be about the route."""

    at: float
    said: str
    email: int
    key: str
    attempt: int


@dataclass(slots=True)
class RefusalJudge:
    """Memory of one route: which senders the server takes, and what it refused in a row. `now` is a steady clock."""

    _accepted_at: dict[str, float] = field(default_factory=dict)
    _said: str = ""
    _recipients: set[str] = field(default_factory=set)
    _dead: deque[DeadLetter] = field(default_factory=lambda: deque(maxlen=REMEMBERED_MAX))
    _put_back: deque[int] = field(default_factory=lambda: deque(maxlen=REMEMBERED_MAX))

    def accepted(self, sender: str, now: float) -> None:
        """Note that the server took a message from this sender."""
        self._said = ""
        if len(self._accepted_at) >= REMEMBERED_MAX and sender not in self._accepted_at:
            self._accepted_at.clear()
        self._accepted_at[sender] = now

    def judged_otherwise(self) -> None:
        """Note that the server judged an email by itself, so that it does not say the same to all."""
        self._said = ""

    def rule(self, refusal: Refusal, sender: str, recipient: str, now: float) -> Ruling:
        """Return what follows from a refusal."""
        is_repeated = self._count(refusal, recipient) >= REPEATED_MIN
        takes_sender = self._takes(sender, now)
        takes_others = not takes_sender and any(now - at <= EVIDENCE_S for at in self._accepted_at.values())
        beyond = Ruling.SENDER if takes_others else Ruling.ROUTE
        match refusal.about:
            case About.ROUTE if refusal.is_syntax and takes_sender and not is_repeated:
                return Ruling.SPARE
            case About.RELAYING if takes_sender and not is_repeated:
                return Ruling.EMAIL
            case About.ROUTE | About.RELAYING:
                return beyond
            case _:
                return beyond if is_repeated else Ruling.EMAIL

    def note_dead(self, refusal: Refusal, email: int, key: str, attempt: int, now: float) -> None:
        """Remember a dead letter that would be put back if the same reply turned out to be about the route.

        None is put back twice, so that a server which contradicts itself cannot keep an email for ever.
        """
        if email not in self._put_back:
            self._dead.append(DeadLetter(now, _normalised(refusal), email, key, attempt))

    def dead_of_route(self, refusal: Refusal, now: float) -> list[DeadLetter]:
        """Return the dead letters of this reply, to be put back, and forget them."""
        said = _normalised(refusal)
        return self._forget_dead([one for one in self._dead if one.said == said and now - one.at <= EVIDENCE_S])

    def dead_of_pause(self, reason: str, now: float) -> list[DeadLetter]:
        """Return the same for a route that another relay found refused, with the reply in its reason."""
        text = _masked(reason)
        found = [one for one in self._dead if one.said.split(" ", 2)[2] in text and now - one.at <= EVIDENCE_S]
        return self._forget_dead(found)

    def _forget_dead(self, found: list[DeadLetter]) -> list[DeadLetter]:
        self._dead = deque((one for one in self._dead if one not in found), maxlen=REMEMBERED_MAX)
        self._put_back.extend(one.email for one in found)
        return found

    @property
    def accepted_at(self) -> float:
        """Return when the server last took a message; -inf for never."""
        return max(self._accepted_at.values(), default=float("-inf"))

    def _takes(self, sender: str, now: float) -> bool:
        at = self._accepted_at.get(sender)
        return at is not None and now - at <= EVIDENCE_S

    def _count(self, refusal: Refusal, recipient: str) -> int:
        """Return how many different recipients in a row have heard this."""
        said = _normalised(refusal)
        if said != self._said:
            self._said = said
            self._recipients = set()
        if len(self._recipients) < REPEATED_MIN:
            self._recipients.add(recipient.lower())
        return len(self._recipients)


def _normalised(refusal: Refusal) -> str:
    """Return a reply without what differs from one recipient to the next."""
    return f"{refusal.stage} {refusal.code} {_masked(refusal.text)[:COMPARED_CHARACTERS_MAX]}"


def _masked(text: str) -> str:
    return _TOKEN.sub("#", _ADDRESS.sub("@", text[:READ_CHARACTERS_MAX].lower()))


# $1 are the emails, $2 the attempts that made them dead letters, $3 the reason. Only while each still is that dead
# letter, and no person has let it be. The try that is undone counts as withdrawn.
PUT_BACK: Final = """
WITH undone AS (
    UPDATE outbox.delivery d
       SET state = 'pending', settled_at = NULL, relay = NULL, due_at = now(), withdrawn = d.withdrawn + 1
      FROM unnest($1::bigint[], $2::integer[]) AS n (email, attempt)
     WHERE d.email = n.email AND d.attempt = n.attempt AND d.state = 'dead' AND d.withdrawn < d.attempt
       AND NOT EXISTS (SELECT FROM outbox.attempt a
                        WHERE a.email = d.email AND a.attempt = d.attempt AND a.verdict IN ('resolved', 'bounced'))
    RETURNING d.email, d.attempt
), trail AS (
    INSERT INTO outbox.attempt (email, attempt, verdict, reply) SELECT email, attempt, 'retried', $3 FROM undone
)
SELECT email FROM undone
"""

STATEMENTS: Final = (PUT_BACK,)


async def put_back(connection: Connection, letters: Sequence[DeadLetter], why: str) -> list[int]:
    """Make dead letters pending again; return which of them were still dead of the same attempt."""
    rows = await connection.fetch(
        PUT_BACK, [one.email for one in letters], [one.attempt for one in letters], storable(why)
    )
    return [row["email"] for row in rows]

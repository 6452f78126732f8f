"""Latest replies of a mail server, by which a deferral is the route's or one recipient's own."""

import re
from collections import deque
from dataclasses import dataclass, field
from typing import Final

REMEMBERED_S: Final = 10.0
REPLIES_MAX: Final = 32
RECIPIENTS_MIN: Final = 3  # fewer that get the same reply may each have their own reason
LEARNED_S: Final = 600.0
EMAILS_MAX: Final = 10_000
STRIKES_MAX: Final = 3
GREYLISTED: Final = re.compile(r"gr[ea]y-?\s?list", re.IGNORECASE)
_VARIABLE: Final = re.compile(r"<[^>]*>|\S+@\S+|\b[0-9a-f]*\d[0-9a-f.:-]*\b|\b[A-Za-z0-9]*\d[A-Za-z0-9]*\b")


def sentence_of(reply: str) -> str:
    """Return a reply without what differs from one recipient or moment to the next: addresses, numbers, ids."""
    code, _, text = reply.partition(" ")
    return f"{code} {' '.join(_VARIABLE.sub('#', text).casefold().split())}"[:200]


@dataclass(slots=True)
class _Strike:
    """Memory of an email whose deferral was not counted: how far the route was then."""

    accepted: int
    deferred: int
    strikes: int = 0


@dataclass(frozen=True, slots=True)
class Judgement:
    """Judgement on a deferral."""

    is_own: bool
    """True if it is a try of this email."""
    is_of_the_rate: bool
    """True if less should be sent."""


@dataclass(slots=True)
class RecentReplies:
    """Latest results of one relay on its route, for telling whose fault a deferral is.

    A deferral is the route's if most of the different recipients that were tried in the last seconds got the same
    sentence; those whose deferral counted before are no witnesses, since theirs may be a full mailbox. A sentence that
    was the route's is remembered for a while. An email that gets it although the server has mostly accepted others
    since its last try is deferred for a reason of its own, in the end.
    """

    accepted: int = 0
    deferred: int = 0
    accepted_at: float | None = None
    _latest: deque[tuple[str, str, bool, float]] = field(default_factory=lambda: deque(maxlen=REPLIES_MAX))
    _learned: dict[str, float] = field(default_factory=dict)
    _uncounted: dict[int, _Strike] = field(default_factory=dict)
    _limited: dict[int, _Strike] = field(default_factory=dict)

    def note_accepted(self, recipient: str, now: float) -> None:
        """Count an email that the server took."""
        self.accepted += 1
        self.accepted_at = now
        self._latest.append((recipient, "", True, now))

    def accepts(self, now: float) -> bool:
        """Return True if the server took an email in the last seconds."""
        return self.accepted_at is not None and now - self.accepted_at < 3 * REMEMBERED_S

    def is_own_limit(self, email: int) -> bool:
        """Note that an email met a limit, of whatever; return True if others were accepted between several such.

        Without this a limit of one recipient would keep the email for ever, and slow down all others each time.
        """
        last = self._limited.pop(email, None)
        strikes = last.strikes + (self.accepted > last.accepted) if last is not None else 0
        self._limited[email] = _Strike(self.accepted, 0, strikes)
        if len(self._limited) > EMAILS_MAX:
            del self._limited[next(iter(self._limited))]
        return strikes >= STRIKES_MAX

    def note_deferred(self, recipient: str, reply: str, now: float, *, tries: int) -> None:
        """Note a deferral; `tries` counts this one."""
        self._latest.append((recipient, sentence_of(reply), tries <= 1, now))

    def judge(
        self,
        email: int,
        recipient: str,
        reply: str,
        now: float,
        *,
        tries: int,
        known: str = "",
        names_recipient: bool = False,
    ) -> Judgement:
        """Judge a deferral that is noted. A recipient that is greylisted by name has a try of its own.

        `known` is a reply that the fleet has found to be the route's; it counts while this relay has sent nothing.
        `names_recipient`: the reply says that it is about the recipient, as a full mailbox does.
        """
        if GREYLISTED.search(reply):
            return Judgement(is_own=True, is_of_the_rate=False)
        sentence = sentence_of(reply)
        is_common = self.is_common(recipient, reply, now)
        if is_common:
            self._learned[sentence] = now
        is_learned = tries <= 1 and now - self._learned.get(sentence, -LEARNED_S) < LEARNED_S
        # Tries get rare as their pauses grow, so that few are near each other. While the server has taken nothing since
        # the sentence was learned, it still says the same to all.
        is_learned = is_learned or (not names_recipient and self._says_only(sentence, known))
        is_own = not (is_common or is_learned) or self._is_its_own(email, is_learned=is_learned and not is_common)
        if not is_own:
            self._remember(email)
            self.deferred += 1
        return Judgement(is_own, is_of_the_rate=not is_own)

    def _says_only(self, sentence: str, known: str) -> bool:
        """Return True if the server has taken nothing since most recipients got this sentence."""
        learned_at = self._learned.get(sentence)
        if learned_at is None:
            return self.accepted_at is None and bool(known) and sentence_of(known) == sentence
        return self.accepted_at is None or self.accepted_at < learned_at

    def is_common(self, recipient: str, reply: str, now: float) -> bool:
        """Return True if most of the other recipients that were tried in the last seconds got the same reply."""
        sentence = sentence_of(reply)
        latest = {who: (said, is_witness) for who, said, is_witness, at in self._latest if now - at < REMEMBERED_S}
        latest.pop(recipient, None)
        witnesses = [said for said, is_witness in latest.values() if is_witness]
        same = sum(said == sentence for said in witnesses) + 1
        return same >= RECIPIENTS_MIN and 2 * same > len(witnesses) + 1

    def _is_its_own(self, email: int, *, is_learned: bool) -> bool:
        """Return True if since its last try, which was not counted, the server has mostly accepted others."""
        last = self._uncounted.get(email)
        if last is None or self.accepted - last.accepted <= self.deferred - last.deferred:
            return False
        last.strikes += 1
        return last.strikes >= (STRIKES_MAX if is_learned else 1)

    def _remember(self, email: int) -> None:
        last = self._uncounted.pop(email, None)
        self._uncounted[email] = _Strike(self.accepted, self.deferred, last.strikes if last else 0)
        if len(self._uncounted) > EMAILS_MAX:
            del self._uncounted[next(iter(self._uncounted))]

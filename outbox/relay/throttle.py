"""Rate and connections that a mail server takes, found from what it refuses. Pure: no clock, no socket, no database.

`slow_down` decides about the rate that the fleet shares in `outbox.pace`: it is cut once for each round of refusals and
grows again while nothing is refused (additive increase, multiplicative decrease). `ConnectionLimit` does the same for
the connections of one relay. `RecentReplies` tells a deferral that most recipients get from one recipient's own.
"""

import re
from collections import deque
from dataclasses import dataclass, field
from typing import Final

CUT: Final = 0.85  # of the rate is left after a round of refusals
SHORT_ROUND_S: Final = 5.0  # in a round that lasts less, too few emails were sent to tell what the server takes,
CUT_MAX: Final = 0.7  # so that at least this part of the rate is left
GROWTH_PER_S: Final = 0.02  # of the found rate is added in a second,
GROWTH_PER_EMAIL: Final = 0.003  # but not more than this for each email that is sent meanwhile
CAUTIOUS: Final = 0.25  # growth up to which the rate is near the one that was refused; beyond, the server takes more,
DOUBLES: Final = 4.0  # and the rate doubles so many times for each unit of growth
FORGOTTEN: Final = 2.5  # growth at which there is no limit any more: some 500 times the rate that was refused
FORGOTTEN_S: Final = 6 * 3600.0  # without a refusal, after which there is none either
RATE_MIN: Final = 1 / 60  # a second; the rate that is left if a server refuses by rate whatever is tried
RATE_MAX: Final = 1e6
SUPPOSED_RATE_MIN: Final = 5.0  # the same if only the pattern of refusals suggests that the rate is to blame
FIRST_RATE_MIN: Final = 5.0  # the first rate after a server that accepted nothing: nothing is known of its own
SILENCE_MIN_S: Final = 0.25
SILENCE_MAX_S: Final = 60.0  # so a server that counts by the minute is asked at most seven times in one
SUPPOSED_SILENCE_MAX_S: Final = 2.0
EDGE_S: Final = 0.05  # what starts just when the silence ends starts after it, whatever the clocks' last digits say
SAME_ROUND_S: Final = 0.5  # after a silence, a refusal of what starts within this time belongs to the round before


@dataclass(frozen=True, slots=True)
class Found:
    """Rate that the server of a route takes, in emails a second of the whole fleet, as of the end of the silence.

    A round begins with a refusal. Nothing is sent during the silence after it, and again, for twice as long, if the
    server still refuses then.
    """

    rate: float
    begun_s: float
    """Seconds since the round began."""
    silent_s: float
    """Seconds until the silence is over; negative: since it is over."""
    silence_s: float
    """Length of the latest silence."""
    sending_s: float = 0.0
    """Seconds since the silence in which the fleet has sent at this rate: without mail nothing is learned."""
    said: str = ""
    """Reply that showed it."""

    @property
    def rate_now(self) -> float | None:
        """Rate at this moment; None once it has grown so far that there is no limit any more."""
        growth = max(self.sending_s, 0.0) * min(GROWTH_PER_S, GROWTH_PER_EMAIL * self.rate)
        if growth >= FORGOTTEN or self.begun_s >= FORGOTTEN_S:
            return None
        return self.rate * (1 + growth if growth <= CAUTIOUS else (1 + CAUTIOUS) * 2 ** (DOUBLES * (growth - CAUTIOUS)))


@dataclass(frozen=True, slots=True)
class Refusal:
    """A refusal because of the rate, as one relay saw it. Ages are in seconds."""

    said: str
    age_s: float
    """Age of the try that was refused, since its start."""
    accepted_age_s: float | None = None
    """Age of the latest try that was accepted, since its start."""
    fleet_rate: float = 0.0
    """Estimate of how many emails a second the server has just taken from all relays."""
    is_supposed: bool = False
    """True if only the pattern of refusals suggests that the rate is to blame, not the reply."""
    accepts: bool = True
    """False if the server has accepted nothing for a while."""


def slow_down(found: Found | None, refusal: Refusal) -> Found | None:
    """Return the rate after a refusal; None if that is news of a refusal that is known already.

    All refusals of one round cut the rate once, whichever relays hear them: those of what started before the silence
    ended, and those right after it without anything accepted in between.
    """
    floor = SUPPOSED_RATE_MIN if refusal.is_supposed else RATE_MIN
    rate = found.rate_now if found is not None else None
    if found is None or rate is None:
        rate = max(min(CUT * refusal.fleet_rate, RATE_MAX), FIRST_RATE_MIN)
        silence_s = _first_silence_s(rate, refusal)
        return Found(rate, 0.0, silence_s, silence_s, said=refusal.said)
    since_silence_s = -found.silent_s
    if refusal.age_s > since_silence_s + EDGE_S:
        return None
    accepted_since = refusal.accepted_age_s is not None and refusal.accepted_age_s <= since_silence_s + EDGE_S
    started_after_s = since_silence_s - refusal.age_s
    if not accepted_since and started_after_s < max(SAME_ROUND_S, 1.5 / rate):
        silence_s = min(2 * found.silence_s, _silence_max_s(refusal))
        silence_s = max(silence_s, min(found.silence_s, SILENCE_MIN_S))
        return Found(found.rate, found.begun_s, silence_s, silence_s, said=refusal.said)
    # Of the round that ends the fleet has sent for a part only: what the server takes all the time is as much less.
    sending_s = min(max(since_silence_s, 0.0), found.begun_s)
    steady = rate * sending_s / found.begun_s if found.begun_s > 0 else rate
    if found.begun_s < SHORT_ROUND_S:
        steady = max(steady, CUT_MAX * rate)
    rate = max(min(CUT * rate, steady), min(floor, rate))
    silence_s = _first_silence_s(rate, refusal)
    return Found(rate, 0.0, silence_s, silence_s, said=refusal.said)


def _first_silence_s(rate: float, refusal: Refusal) -> float:
    return min(max(SILENCE_MIN_S, 1 / rate), _silence_max_s(refusal))


def _silence_max_s(refusal: Refusal) -> float:
    """Longest silence. Where the rate is only supposed to be the reason, waiting may not help: greylisting wants
    each recipient to be tried, whatever the pace.
    """
    if not refusal.is_supposed:
        return SILENCE_MAX_S
    return SUPPOSED_SILENCE_MAX_S if refusal.accepts else SILENCE_MIN_S


@dataclass(slots=True)
class Meter:
    """Counts what happens, by the second; for estimates of a rate only."""

    _second: float = 0.0
    _now: int = 0
    _before: int = 0

    def note(self, now: float) -> None:
        """Count one."""
        if now - self._second >= 1.0:
            self._move(now)
        self._now += 1

    def per_s(self, now: float) -> float:
        """Return how many there were in the busier one of the latest two seconds."""
        if now - self._second >= 1.0:
            self._move(now)
        return float(max(self._now, self._before))

    def _move(self, now: float) -> None:
        self._before = self._now if now - self._second < 2.0 else 0  # noqa: PLR2004 - the second before this one
        self._second, self._now = now, 0


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


LIMIT_SEEN_MIN: Final = 3  # so many connections in a row ended after the same number of messages: that is a limit
LIMIT_KEPT_S: Final = 3600.0


@dataclass(slots=True)
class SessionLimit:
    """Number of messages that the server takes on one connection, found from those that ended."""

    found: int | None = None
    _until: float = 0.0
    _seen: deque[int] = field(default_factory=lambda: deque(maxlen=LIMIT_SEEN_MIN))

    def note(self, messages: int, now: float) -> bool:
        """Note after how many messages a connection ended; return True if that shows a limit that was not known."""
        self._seen.append(messages)
        if len(self._seen) < LIMIT_SEEN_MIN or len(set(self._seen)) > 1:
            return False
        self._until = now + LIMIT_KEPT_S
        is_new = messages != self.found
        self.found = messages
        return is_new

    def at(self, now: float) -> int | None:
        """Return the limit for a new connection; None if there is none, or if it was found too long ago."""
        return self.found if now < self._until else None


OPEN_PAUSE_MIN_S: Final = 0.5
OPEN_PAUSE_MAX_S: Final = 30.0
MORE_AFTER_S: Final = 60.0
MORE_AFTER_MAX_S: Final = 960.0


@dataclass(slots=True)
class ConnectionLimit:
    """Number of connections that a server grants this relay, found from the ones that it refuses.

    It is what was open when one more was refused. One more is tried now and then, ever more rarely while it is refused.
    `now` is any steady clock.
    """

    found: int | None = None
    said: str = ""
    retry_at: float = 0.0
    _more_at: float = 0.0
    _more_after_s: float = MORE_AFTER_S
    _pause_s: float = OPEN_PAUSE_MIN_S

    def refuse(self, working: int, said: str, now: float) -> None:
        """Note that the server refused one more connection than these."""
        if now >= self.retry_at:  # else it was opened before the last one was refused
            is_probe = self.found is not None and working >= self.found
            self._more_after_s = min(2 * self._more_after_s, MORE_AFTER_MAX_S) if is_probe else MORE_AFTER_S
            self.retry_at = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, OPEN_PAUSE_MAX_S)
        self.found = max(working, 1)
        self.said = said
        self._more_at = now + self._more_after_s

    def note_working(self, working: int, now: float) -> None:
        """Note that the server took an email while these connections were open."""
        self._pause_s = OPEN_PAUSE_MIN_S
        if self.found is not None and working > self.found:
            self.found = working
            self._more_at = now + self._more_after_s

    def hurry(self, now: float) -> None:
        """Let one be tried at once."""
        self.retry_at = min(self.retry_at, now)

    def may_open(self, open_now: int, now: float) -> bool:
        """Return True if one more than these may be tried."""
        if self.found is None:
            return True
        return now >= self.retry_at and open_now < self.found + (now >= self._more_at)

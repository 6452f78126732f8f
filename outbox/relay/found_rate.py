"""Rate that a mail server takes, found from what it refuses. Pure: no clock, no socket, no database.

`slow_down` decides about the rate that the fleet shares in `outbox.pace`: it is cut once for each round of refusals and
grows again while nothing is refused (additive increase, multiplicative decrease).
"""

from dataclasses import dataclass
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
class RateRefusal:
    """Refusal because of the rate, as one relay saw it. Ages are in seconds."""

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


def slow_down(found: Found | None, refusal: RateRefusal) -> Found | None:
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


def _first_silence_s(rate: float, refusal: RateRefusal) -> float:
    return min(max(SILENCE_MIN_S, 1 / rate), _silence_max_s(refusal))


def _silence_max_s(refusal: RateRefusal) -> float:
    """Longest silence. Where the rate is only supposed to be the reason, waiting may not help: greylisting wants
    each recipient to be tried, whatever the pace.
    """
    if not refusal.is_supposed:
        return SILENCE_MAX_S
    return SUPPOSED_SILENCE_MAX_S if refusal.accepts else SILENCE_MIN_S

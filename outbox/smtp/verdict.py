"""Verdicts: the results of a try of SMTP, and the outcome that each has for its delivery. Pure."""

from dataclasses import dataclass
from typing import Final, NamedTuple, assert_never

from outbox.mail.delivery_state import DeliveryState

REPLY_CHARACTERS_MAX: Final = 500


@dataclass(frozen=True, slots=True)
class Accepted:
    """The server answered the final dot with 2xx and is responsible now (RFC 5321 §6.1)."""

    reply: str


@dataclass(frozen=True, slots=True)
class Deferred:
    """The server replied 4xx: it does not have the mail, and a later try may succeed."""

    reply: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The server replied 5xx: it does not have the mail, and another try would get the same reply."""

    reply: str


@dataclass(frozen=True, slots=True)
class InDoubt:
    """The final dot was written and no usable reply came: the mail may or may not be in a mailbox."""

    reply: str


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """Nothing was sent and the try does not count: its dot was surely not written, or the server takes no mail."""

    reply: str


Verdict = Accepted | Deferred | Refused | InDoubt | Withdrawn


def judge_silence(reason: str, *, dot_sent: bool) -> Verdict:
    """Return the verdict for a try that ended without a reply: a timeout, a lost connection, garbage.

    Before the final dot the server must discard what it has (RFC 5321 §4.1.1.10), so another try is safe.
    After it the message may be in a mailbox already: only evidence or a person may decide.
    """
    return InDoubt(reason) if dot_sent else Withdrawn(reason)


class Outcome(NamedTuple):
    """Verdict as the database keeps it: the state it leads to, and verdict and reply as in the attempt's trail.

    The delivery is due again after `delay_s`; None is never by itself.
    """

    state: DeliveryState
    verdict: str
    reply: str
    delay_s: float | None = None


def outcome_of(  # noqa: PLR0911 - a table
    verdict: Verdict,
    *,
    tries: int,
    tries_max: int,
    backoff_s: float,
    again_s: float,
    doubt_s: float | None,
    withdrawals: int = 0,
    withdrawals_max: int | None = None,
) -> Outcome:
    """Return the outcome of a verdict for its delivery. `tries` counts this one; the last deferral makes a dead letter.

    A deferred try waits for `backoff_s`, a withdrawn one for `again_s`; doubt is looked at again after `doubt_s`.
    `withdrawals` counts those before this one: a message that a working server drops `withdrawals_max` times is
    quarantined.
    """
    match verdict:
        case Accepted(reply):
            return Outcome(DeliveryState.SENT, "accepted", reply)
        case Refused(reply):
            return Outcome(DeliveryState.DEAD, "refused", reply)
        case Deferred(reply) if tries >= tries_max:
            return Outcome(DeliveryState.DEAD, "deferred", reply)
        case Deferred(reply):
            return Outcome(DeliveryState.PENDING, "deferred", reply, backoff_s)
        case InDoubt(reply):
            return Outcome(DeliveryState.IN_DOUBT, "in_doubt", reply, doubt_s)
        case Withdrawn(reply) if withdrawals_max is not None and withdrawals + 1 >= withdrawals_max:
            return Outcome(DeliveryState.DEAD, "quarantined", reply)
        case Withdrawn(reply):
            return Outcome(DeliveryState.PENDING, "withdrawn", reply, again_s)
        case _:
            assert_never(verdict)

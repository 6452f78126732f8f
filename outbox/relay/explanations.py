"""Explanations of what a tick did not write: marks that were not granted, and verdicts that changed nothing."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from outbox.log import Events
from outbox.relay.session import Session
from outbox.relay.settlement import Settlement, contradicts, states_of
from outbox.smtp.outgoing import Claim

log = Events("outbox.relay")


async def explain_lost_claims(session: Session, lost: Sequence[Claim], counts: Counter[str]) -> None:
    """Log why claims were not marked: they were cancelled by a person, or something is wrong."""
    if not lost:
        return
    states = await states_of(session.connection, [claim.email for claim in lost])
    for claim in lost:
        of = fields_of(claim, claim.attempt)
        state, _ = states.get(claim.email, (None, None))
        if state == "cancelled":
            log.info("claim_cancelled", "{key} was cancelled at the last moment; it was not sent", **of)
            counts["cancelled"] += 1
        elif state in ("sent", "in_doubt"):
            log.info(
                "claim_told", "{key} is not sent: a relay on another Postgres server has sent it, or may have", **of
            )
        else:
            log.error("claim_lost", "{key} is no longer this relay's; it was not sent", **of)
            counts["lost claims"] += 1


async def explain_missed_settlements(session: Session, missed: Sequence[Settlement], counts: Counter[str]) -> None:
    """Log each settlement that changed nothing, unless it was already true."""
    if not missed:
        return
    states = await states_of(session.connection, [one.email for one in missed])
    for settlement in missed:
        state, attempt = states.get(settlement.email, (None, None))
        if contradicts(settlement, state, attempt):
            counts["stale settlements"] += 1
            log.error(
                "verdict_stale",
                "{key}, attempt {attempt}: the verdict {verdict!r} came too late, "
                "the delivery is {state} at attempt {at_attempt}",
                key=settlement.key,
                email=settlement.email,
                attempt=settlement.attempt,
                relay=settlement.relay,
                verdict=settlement.outcome.verdict,
                state=state,
                at_attempt=attempt,
            )


def fields_of(claim: Claim, attempt: int) -> dict[str, Any]:
    """Return the fields of a log line about a try."""
    return {"key": claim.key, "email": claim.email, "attempt": attempt, "relay": claim.relay}

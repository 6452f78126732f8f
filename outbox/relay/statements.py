"""All statements that a relay runs while it holds its lock; a session prepares them before (`session.Session.open`)."""

from typing import Final

from outbox.database import failover_barrier
from outbox.relay import circuit_breaker, failover, in_doubt, ledger, pauses, rate_limit, refusals, suppression

STATEMENTS: Final = (
    *ledger.STATEMENTS,
    *circuit_breaker.STATEMENTS,
    *rate_limit.STATEMENTS,
    *refusals.STATEMENTS,
    *failover.STATEMENTS,
    *failover_barrier.STATEMENTS,
    *in_doubt.STATEMENTS,
    *pauses.STATEMENTS,
    *suppression.STATEMENTS,
)

"""Statements that a relay prepares when its session opens, so that none of them is planned while emails wait."""

from typing import Final

from outbox.database import failover_barrier, pause_list
from outbox.relay import (
    circuit_breaker,
    claims,
    expiry,
    failover,
    in_doubt,
    isolate,
    message_fetch,
    pauses,
    progress_note,
    quarantine,
    rate_limit,
    refusals,
    remaining,
    settlement,
    suppression,
    sweep,
    tick,
)

MODULES: Final = (
    tick,
    claims,
    isolate,
    message_fetch,
    settlement,
    sweep,
    expiry,
    remaining,
    progress_note,
    quarantine,
    circuit_breaker,
    rate_limit,
    refusals,
    failover,
    failover_barrier,
    in_doubt,
    pauses,
    pause_list,
    suppression,
)
STATEMENTS: Final[tuple[str, ...]] = tuple(statement for module in MODULES for statement in module.STATEMENTS)

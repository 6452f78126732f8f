"""Sessions as relays open them, without a relay."""

from collections.abc import Sequence

from outbox.database.failover_rules import Presence
from outbox.relay.session import Session, SessionEvents
from outbox.settings.urls import DatabaseUrl

GUARD_S, GRACE_S = 5.0, 30.0


async def open_session(
    url: str,
    *,
    lease_s: float,
    events: SessionEvents | None = None,
    former: Session | None = None,
    statements: Sequence[str] = (),
) -> Session:
    """A session of a relay that had the `former` one before, and none else."""
    presence = Presence.new(GUARD_S, lease_s)
    return await Session.open(
        DatabaseUrl.parse(url),
        lease_s=lease_s,
        events=events or SessionEvents(),
        former=former,
        statements=statements,
        standing=presence.standing(former.server if former is not None else None, grace_s=GRACE_S),
    )

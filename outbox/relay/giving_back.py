"""What a relay gives back: claims that it cannot send soon, and dead letters that were not the email's problem."""

from collections import Counter
from collections.abc import Collection
from typing import Final

from outbox.log import Events
from outbox.relay.circuit_breaker import PAUSE_MAX_S
from outbox.relay.claims import release
from outbox.relay.pool import Pool
from outbox.relay.refusals import put_back
from outbox.relay.session import Session

log = Events("outbox.relay")

PUT_BACK_WHY: Final = "the server said the same of other recipients: it refuses the sender or this host"


async def release_claims(session: Session, pool: Pool) -> None:
    """Release the claims that the pool has given back: at once, or for later if they are to rest."""
    releases = [claim.email for claim in pool.releases]
    resting = [(claim.email, claim.rest_s) for claim in pool.put_off]
    pool.releases.clear()
    pool.put_off.clear()
    await release(session.connection, session.relay, releases, quarantine=session.quarantine)
    longest_s = max((rest_s for _, rest_s in resting), default=0.0)
    rests = (
        (PAUSE_MAX_S, [email for email, rest_s in resting if not rest_s]),
        (longest_s, [email for email, rest_s in resting if rest_s]),
    )
    for after_s, emails in rests:
        if emails:
            await release(session.connection, session.relay, emails, after_s=after_s, quarantine=session.quarantine)


async def put_back_dead_letters(session: Session, pool: Pool, unsettled: Collection[int], counts: Counter[str]) -> None:
    """Make dead letters pending again that turned out to be the route's, once their verdicts are written.

    `unsettled` are the emails whose verdicts are not.
    """
    letters = [one for one in pool.undone if one.email not in unsettled]
    if not letters:
        return
    pool.undone[:] = [one for one in pool.undone if one.email in unsettled]
    undone = await put_back(session.connection, letters, PUT_BACK_WHY)
    if undone:
        counts["put back"] += len(undone)
        log.warning(
            "dead_letters_put_back",
            "{emails} dead letters are pending again, since the refusal was not about them: {named}",
            emails=len(undone),
            named=", ".join(one.key for one in letters if one.email in undone),
        )

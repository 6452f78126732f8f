"""Tick in parts, after a row made a whole tick fail: finds that row and does the rest.

`ledger.tick` is one statement. If it fails because of a row, nothing was committed, or the commit is unknown. So

- an empty tick comes first. If that fails too, no row is to blame, and its error is raised;
- settlements and marks are written together and, if that fails, one by one;
- the emails to claim are read as ids only, then claimed one by one.

What fails by itself is quarantined. A row that another session has locked is neither waited for nor quarantined: its
verdict stays with the relay until the lock is gone. A relay stays with ticks in parts until one of them finds nothing
wrong.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from outbox.database.connection import Connection
from outbox.relay import ledger
from outbox.relay.ledger import SMALL_BYTES, Settlement, Tick
from outbox.relay.quarantine import Quarantine, is_of_a_row
from outbox.smtp.outgoing import Claim


async def tick_in_parts(
    connection: Connection,
    relay: int,
    quarantine: Quarantine,
    *,
    settlements: Sequence[Settlement],
    marks: Iterable[int],
    room: int,
    suspects: int,
    route: str,
    server: str,
    budget: int,
    bytes_max: int,
    epoch: int | None = None,
) -> Tick:
    """Do what `ledger.tick` does; a row that cannot be read or written does not stop the others.

    Raises:
        Exception: the error is of the database, not of a row. It is unknown what was committed.

    """
    done = await ledger.tick(connection, relay, route=route, server=server, epoch=epoch)
    done = replace(done, reached=None, urgent_reached=None)
    marks = list(marks) if done.is_open else []
    locked = await ledger.locked(connection, [*marks, *(one.email for one in settlements)])
    settled = await _settle(connection, relay, quarantine, [one for one in settlements if one.email not in locked])
    done = replace(done, settled=settled, locked=locked)
    marks = [email for email in marks if email not in locked]
    done = await _mark(connection, relay, quarantine, marks, done, epoch=epoch)
    if room <= 0 or not done.is_open:
        return done
    emails = await ledger.candidates(connection, route, room=room, suspects=suspects, left_out=quarantine.left_out)
    return await _claim(connection, relay, quarantine, emails, done, budget=budget, bytes_max=bytes_max, epoch=epoch)


async def _settle(
    connection: Connection, relay: int, quarantine: Quarantine, settlements: Sequence[Settlement]
) -> frozenset[tuple[int, int]]:
    if not settlements:
        return frozenset()
    try:
        return (await ledger.tick(connection, relay, settlements=settlements)).settled
    except Exception as error:
        if not is_of_a_row(error):
            raise
    settled: set[tuple[int, int]] = set()
    for one in settlements:
        try:
            settled |= (await ledger.tick(connection, relay, settlements=[one])).settled
        except Exception as error:
            if not is_of_a_row(error):
                raise
            outcome = one.outcome
            marked = outcome.state if outcome.state in ("sent", "in_doubt") else "dead"
            reason = f"{error}; the verdict on attempt {one.attempt} was {outcome.verdict}: {outcome.reply}"
            await quarantine.put(connection, one.email, reason, marked=marked, relays=[one.relay])
            settled.add(one.identity)
    return frozenset(settled)


async def _mark(
    connection: Connection, relay: int, quarantine: Quarantine, marks: list[int], done: Tick, *, epoch: int | None
) -> Tick:
    parts = [marks] if marks else []
    marked, expired, quarantined = dict(done.marked), set(done.expired), set()
    for part in parts:
        try:
            found = await ledger.tick(connection, relay, marks=part, epoch=epoch)
        except Exception as error:
            if not is_of_a_row(error):
                raise
            if len(part) > 1:
                parts += [[email] for email in part]
            else:
                await quarantine.put(connection, part[0], error)
                quarantined.add(part[0])
        else:
            marked |= found.marked
            expired |= found.expired
            if not found.is_open:  # the barrier was raised just now
                done = replace(done, is_open=False, epoch=found.epoch)
                break
    return replace(done, marked=marked, expired=frozenset(expired), quarantined=frozenset(quarantined))


async def _claim(
    connection: Connection,
    relay: int,
    quarantine: Quarantine,
    emails: Sequence[int],
    done: Tick,
    *,
    budget: int,
    bytes_max: int,
    epoch: int | None,
) -> Tick:
    claims: list[Claim] = []
    unfit: dict[int, str] = {}
    listed: set[int] = set()
    is_over = False

    async def one(email: int) -> tuple[list[Claim], dict[int, str], bool]:
        nonlocal budget, is_over
        found = await ledger.claim_one(
            connection, relay, email, budget=max(budget, 0), bytes_max=bytes_max, epoch=epoch
        )
        budget -= sum(claim.size for claim in found[0] if not claim.fetched)
        is_over = is_over or not (found[0] or found[1])  # or another relay was faster: then the next look finds nothing
        return found

    for found, wrong, is_listed in await quarantine.sift(connection, emails, one):
        claims += found
        unfit |= wrong
        if is_listed:
            listed |= {claim.email for claim in found}
    return replace(
        done, claims=claims, unfit=unfit, listed=frozenset(listed), bytes_wanted=SMALL_BYTES if is_over else 0
    )

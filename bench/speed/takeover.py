"""Takeover: the time until others have sent what a lost relay held: killed, stopped, or cut off without a FIN."""

import asyncio
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench.faults.environment import Environment, open_environment
from bench.faults.server import Host, ServerProcess
from bench.faults.workload import prepare
from bench.harness.environment import percentile, save
from bench.speed.one_relay import message_of
from outbox.sandbox.postgres import Server, postgres
from outbox.sandbox.smtp_sink import Visit

SERVERS: Final = 3
BATCH: Final = 60
START_S: Final = 60.0
REPLY_S: Final = 120.0  # the victim's connections wait for the mail server, and must not give up before the fault

PUT: Final = """
WITH made AS (
    INSERT INTO outbox.email (key, sender, recipient, message_id, message)
    SELECT $2 || n, 'reports@example.com', $2 || n || '@example.com', '<' || $2 || n || '@example.com>', $3
      FROM generate_series(1, $1::int) n RETURNING id
), due AS (
    INSERT INTO outbox.delivery (email) SELECT id FROM made
)
SELECT pg_notify('outbox', '')
"""
IN_HAND: Final = """
SELECT m.recipient, r.pid FROM outbox.delivery d
  JOIN outbox.email m ON m.id = d.email LEFT JOIN outbox.relay r ON r.id = d.relay
 WHERE d.settled_at IS NULL
"""


@dataclass(frozen=True)
class Loss:
    """Way to lose a relay."""

    name: str
    strike: Callable[[Host, ServerProcess], None]
    bound: Callable[[float], float]
    """In seconds, from lease_s, on a machine that has nothing else to do."""


def _kill(_: Host, relay: ServerProcess) -> None:
    relay.end("kill", signal.SIGKILL)


def _stop(_: Host, relay: ServerProcess) -> None:
    relay.send(signal.SIGSTOP)


def _cut_off(host: Host, _: ServerProcess) -> None:
    host.database.black_hole = host.smtp.black_hole = True


SWEEP_S: Final = 1.5
LOSSES: Final = (
    Loss("SIGKILL", _kill, lambda _: SWEEP_S),
    Loss("SIGSTOP", _stop, lambda lease_s: lease_s + SWEEP_S),
    Loss("black hole", _cut_off, lambda lease_s: lease_s + SWEEP_S),
)


def measure(*, rounds: int, lost_rounds: int, lease_s: float) -> None:
    """Measure all three ways; a table and bench/results/takeover.json."""
    with postgres(settings={"max_connections": "100"}) as server, tempfile.TemporaryDirectory() as directory:
        found = asyncio.run(_measure(server, Path(directory), rounds, lost_rounds, lease_s))
    console = Console()
    table = Table(title=f"Until others have sent what it held ({SERVERS} relays, lease_s {lease_s:g})", box=None)
    for column in ("the relay meets", "rounds", "p50 s", "p90 s", "p99 s", "max s", "bound s"):
        table.add_column(column, justify="left" if column == "the relay meets" else "right")
    for row in found:
        figures = (f"{row[name]:.2f}" for name in ("p50_s", "p90_s", "p99_s", "max_s", "bound_s"))
        table.add_row(str(row["loss"]), str(row["rounds"]), *figures)
    console.print(table)
    path = save("takeover", {"lease_s": lease_s, "servers": SERVERS, "losses": found})
    console.print(f"[dim]{path}[/dim]", soft_wrap=True)


async def _measure(
    server: Server, directory: Path, rounds: int, lost_rounds: int, lease_s: float
) -> list[dict[str, Any]]:
    found = []
    async with open_environment(
        server, directory, seed=1, servers=SERVERS, lease_s=lease_s, connections=8, reply_s=REPLY_S
    ) as environment:
        await prepare(server.url, 0, environment.hosts[0].directory / "outbox.toml", waves=1, routes=1)
        for host in environment.hosts:
            await environment.keep_relay(host)
        for loss in LOSSES:
            count = rounds if loss.name == "SIGKILL" else lost_rounds
            taken = [
                await _round(environment, loss, environment.hosts[n % SERVERS], f"{loss.name[-4:]}{n}-")
                for n in range(count)
            ]
            found.append(_row(loss, taken, lease_s))
        await environment.stop_relays()
    return found


def _row(loss: Loss, taken: Sequence[float], lease_s: float) -> dict[str, Any]:
    return {
        "loss": loss.name,
        "rounds": len(taken),
        "p50_s": percentile(taken, 0.5),
        "p90_s": percentile(taken, 0.9),
        "p99_s": percentile(taken, 0.99),
        "max_s": max(taken, default=0.0),
        "bound_s": loss.bound(lease_s),
        "seconds": [round(one, 4) for one in taken],
    }


async def _round(environment: Environment, loss: Loss, host: Host, prefix: str) -> float:
    """Stall the victim before its marks until it holds everything that is open, then strike it; return the seconds."""
    if not await environment.all_stand(START_S):
        raise SystemExit("bench: a relay did not come back; its log is gone with its directory.")
    assert host.relay is not None
    victim = host.relay
    environment.mail.held = lambda visit: environment.mail.visitors.get(visit.number) == victim.number
    held = await _only_in_hand(environment, victim, prefix)
    struck_at = time.time()
    loss.strike(host, victim)
    end = time.monotonic() + 10 * START_S
    while not all(address in environment.sink.addresses for address in held):
        if time.monotonic() > end:
            raise SystemExit(f"bench: no relay has sent what relay {victim.number} held.")
        await asyncio.sleep(0.002)
    environment.mail.held = _nobody
    host.database.heal()
    host.smtp.heal()
    host.smtp.cut(reset=True)
    victim.send(signal.SIGCONT)
    return max(one.at for one in environment.sink.accepted if held.intersection(one.recipients)) - struck_at


def _nobody(_: Visit) -> bool:
    return False


async def _only_in_hand(environment: Environment, victim: ServerProcess, prefix: str) -> set[str]:
    """Put emails in until the victim holds some and all others are sent; return the recipients of those."""
    body = message_of(500)
    for batch in range(100):
        await environment.sql(PUT, BATCH, f"{prefix.replace(' ', '')}{batch}-", body)
        rows = await environment.sql(IN_HAND)
        while not all(row["pid"] == victim.child.pid for row in rows):
            await asyncio.sleep(0.02)
            rows = await environment.sql(IN_HAND)
        if rows:
            return {row["recipient"] for row in rows}
    raise SystemExit("bench: the victim never claimed anything.")

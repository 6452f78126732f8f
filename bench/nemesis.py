"""The faults, by name: each takes hold of the arena from outside, for as long as its strike says, and lets go.

A new one is one function under `@fault`. What it returns is a note for the verdict; "" says that all went as planned.
"""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import asyncpg

from bench.arena import LOST, Arena, Life
from bench.plan import Shape, Strike, Target
from bench.proxy import Link, Proxy

NOBODY: Final = "nobody was there"
TROUBLE: Final = 0.15


@dataclass(eq=False)
class Struck:
    """A strike with its real times."""

    strike: Strike
    began_at: float = 0.0
    ended_at: float = 0.0
    note: str = ""
    victim: Life | None = None

    def now(self) -> None:
        """It happens now, after what it waited for."""
        self.began_at = time.time()

    def as_row(self) -> dict[str, Any]:
        """As a verdict keeps it."""
        life = self.victim
        return {
            **self.strike.as_row(),
            "began_at": self.began_at,
            "ended_at": self.ended_at,
            "victim": f"{life.what} {life.number}, pid {life.process.pid}" if life else "",
            "note": self.note,
        }


Act = Callable[[Arena, Struck], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Fault:
    """What a name in --faults stands for."""

    act: Act
    shape: Shape
    says: str


FAULTS: dict[str, Fault] = {}


def fault(name: str, target: Target, least: float = 0.0, most: float = 0.0) -> Callable[[Act], Act]:
    """Enter a fault under its name; it lasts from `least` to `most` leases."""

    def enter(act: Act) -> Act:
        FAULTS[name] = Fault(act, Shape(target, least, most), (act.__doc__ or "").split("\n", 1)[0].rstrip("."))
        return act

    return enter


@dataclass(eq=False)
class Nemesis:
    """Carries out a schedule; `done` says how it went."""

    arena: Arena
    strikes: list[Strike]
    done: list[Struck] = field(default_factory=list)

    async def run(self) -> None:
        """All strikes at their times, from now; returns when the last one has let go."""
        begins = time.monotonic()
        self.done = [Struck(strike) for strike in self.strikes]
        await asyncio.gather(*(self._strike(struck, begins) for struck in self.done))

    async def _strike(self, struck: Struck, begins: float) -> None:
        await asyncio.sleep(max(begins + struck.strike.at_s - time.monotonic(), 0))
        planned = FAULTS[struck.strike.kind]
        turn = self.arena.postgres_turn if planned.shape.target == "postgres" else nullcontext()
        try:
            async with turn:  # one that takes longer than planned holds up the next
                struck.now()
                struck.note = await planned.act(self.arena, struck)
        except LOST as error:  # another fault has taken from this one what it needs
            struck.note = f"came to nothing: {error or type(error).__name__}"
        struck.ended_at = time.time()


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────


async def _relay(arena: Arena, struck: Struck) -> Life | None:
    struck.victim = await arena.busy_relay(struck.strike.host)
    struck.now()
    return struck.victim


async def _either(arena: Arena, struck: Struck) -> Life | None:
    """The server's generate for every third coin, if it runs; else its relay."""
    cron = arena.hosts[struck.strike.host].cron
    if struck.strike.coin < 1 / 3 and cron is not None and cron.is_alive:
        struck.victim = cron
        return cron
    return await _relay(arena, struck)


@fault("kill", "relay")
async def _kill(arena: Arena, struck: Struck) -> str:
    """SIGKILL of a relay."""
    async with arena.hosts[struck.strike.host].turn:
        relay = await _relay(arena, struck)
        if relay is None:
            return NOBODY
        relay.end("kill", signal.SIGKILL)
        return ""


@fault("kill-generate", "cron")
async def _kill_generate(arena: Arena, struck: Struck) -> str:
    """SIGKILL of a generate; the next cron fires soon."""
    host = arena.hosts[struck.strike.host]
    if host.cron is None or not host.cron.is_alive:
        await arena.fire_cron(host)
        await asyncio.sleep(0.2 + struck.strike.coin)
        struck.now()
    struck.victim = host.cron
    if host.cron is None or not host.cron.is_alive:
        return NOBODY
    host.cron.end("kill-generate", signal.SIGKILL)
    return ""


async def _pause(arena: Arena, struck: Struck) -> str:
    life = await _either(arena, struck)
    if life is None:
        return NOBODY
    life.send(signal.SIGSTOP)
    await asyncio.sleep(struck.strike.length_s)
    life.send(signal.SIGCONT)
    return ""


@fault("pause-short", "relay", 0.2, 0.8)
async def _pause_short(arena: Arena, struck: Struck) -> str:
    """SIGSTOP, and SIGCONT within the lease, of a relay or a generate."""
    return await _pause(arena, struck)


@fault("pause-long", "relay", 1.3, 2.5)
async def _pause_long(arena: Arena, struck: Struck) -> str:
    """SIGSTOP, and SIGCONT after the lease, of a relay or a generate."""
    return await _pause(arena, struck)


@fault("term", "relay")
async def _term(arena: Arena, struck: Struck) -> str:
    """SIGTERM of a relay or a generate."""
    life = await _either(arena, struck)
    if life is None:
        return NOBODY
    life.end("term", signal.SIGTERM)
    return ""


@fault("double-term", "relay")
async def _double_term(arena: Arena, struck: Struck) -> str:
    """SIGTERM twice within half a second."""
    life = await _either(arena, struck)
    if life is None:
        return NOBODY
    life.end("double-term", signal.SIGTERM)
    await asyncio.sleep(struck.strike.coin / 2)
    life.send(signal.SIGTERM)
    return ""


# ── Postgres ─────────────────────────────────────────────────────────────────────────────────────────────────

SESSIONS: Final = "FROM pg_stat_activity WHERE application_name LIKE 'outbox %'"


@fault("terminate", "postgres")
async def _terminate(arena: Arena, _: Struck) -> str:
    """pg_terminate_backend of all relays and generates."""
    await arena.sql(f"SELECT pg_terminate_backend(pid) {SESSIONS}")
    return ""


@fault("cancel", "postgres", 0.2, 0.5)
async def _cancel(arena: Arena, struck: Struck) -> str:
    """pg_cancel_backend of whatever runs a statement, again and again, so that it hits marks."""
    end, hits = time.monotonic() + struck.strike.length_s, 0
    while time.monotonic() < end:
        hits += len(await arena.sql(f"SELECT pg_cancel_backend(pid) {SESSIONS} AND state = 'active'"))
        await asyncio.sleep(0.003)
    return f"{hits} statements"


@fault("crash", "postgres")
async def _crash(arena: Arena, struck: Struck) -> str:
    """SIGKILL of one backend: Postgres ends all sessions and recovers."""
    end = time.monotonic() + arena.patience_s
    while not (rows := await arena.sql(f"SELECT pid {SESSIONS} ORDER BY pid")):
        if time.monotonic() > end:
            return NOBODY
        await asyncio.sleep(0.02)
    struck.now()
    with suppress(ProcessLookupError):
        os.kill(rows[int(struck.strike.coin * len(rows))]["pid"], signal.SIGKILL)
    return ""


@fault("restart-immediate", "postgres")
async def _restart_immediate(arena: Arena, _: Struck) -> str:
    """Immediate shutdown and start of Postgres."""
    await arena.stop_postgres("immediate")
    await arena.start_postgres()
    return ""


@fault("restart-fast", "postgres")
async def _restart_fast(arena: Arena, _: Struck) -> str:
    """Fast shutdown and start of Postgres."""
    await arena.stop_postgres("fast")
    await arena.start_postgres()
    return ""


@fault("down", "postgres", 0.5, 2.0)
async def _down(arena: Arena, struck: Struck) -> str:
    """Postgres stopped for a while."""
    await arena.stop_postgres("fast" if struck.strike.coin < 0.5 else "immediate")
    await asyncio.sleep(struck.strike.length_s)
    await arena.start_postgres()
    return ""


RAISE: Final = """
CREATE OR REPLACE FUNCTION public.disk_full() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full';
END $$"""
FULL: Final = (
    "CREATE OR REPLACE TRIGGER disk_full BEFORE INSERT OR UPDATE ON outbox.delivery"
    " FOR EACH STATEMENT EXECUTE FUNCTION public.disk_full()"
)
NOT_FULL: Final = "DROP TRIGGER IF EXISTS disk_full ON outbox.delivery"


@fault("raise", "postgres", 0.2, 1.0)
async def _raise(arena: Arena, struck: Struck) -> str:
    """Every write to outbox.delivery fails like a full disk."""
    await arena.sql(RAISE)
    await arena.sql(FULL)
    try:
        await asyncio.sleep(struck.strike.length_s)
    finally:
        await arena.sql(NOT_FULL)
    return ""


@fault("connections", "postgres", 0.5, 1.5)
async def _connections(arena: Arena, struck: Struck) -> str:
    """max_connections is reached, and every session that ends is replaced by one of somebody else."""
    held: list[Any] = []
    end = time.monotonic() + struck.strike.length_s
    asked = False
    try:
        while time.monotonic() < end:
            try:
                held.append(await asyncpg.connect(arena.postgres.url, timeout=1))
            except asyncpg.TooManyConnectionsError:
                if not asked:
                    asked = True
                    await arena.sql(f"SELECT pg_terminate_backend(pid) {SESSIONS}")
                await asyncio.sleep(0.005)
    finally:
        for connection in held:
            connection.terminate()
    return f"{len(held)} held" if asked else "never reached"


@fault("slow-commits", "postgres", 0.5, 2.0)
async def _slow_commits(arena: Arena, struck: Struck) -> str:
    """Every commit takes 100 ms longer (commit_delay)."""
    for setting in ("commit_delay = 100000", "commit_siblings = 0"):
        await arena.sql(f"ALTER SYSTEM SET {setting}")
    await arena.sql("SELECT pg_reload_conf()")
    try:
        await asyncio.sleep(struck.strike.length_s)
    finally:
        await arena.sql("ALTER SYSTEM RESET ALL")
        await arena.sql("SELECT pg_reload_conf()")
    return ""


# ── networks ─────────────────────────────────────────────────────────────────────────────────────────────────


async def _black_hole(proxy: Proxy, struck: Struck) -> str:
    proxy.black_hole = True
    await asyncio.sleep(struck.strike.length_s)
    proxy.heal()
    return ""


async def _cut(proxy: Proxy, struck: Struck) -> str:
    proxy.refuse = struck.strike.length_s > 0
    proxy.cut(reset=struck.strike.coin < 0.5)
    await asyncio.sleep(struck.strike.length_s)
    proxy.heal()
    return ""


async def _delay(proxy: Proxy, struck: Struck) -> str:
    proxy.delay_s = 0.02 + 0.4 * struck.strike.coin
    note = f"{1000 * proxy.delay_s:.0f} ms each way"
    await asyncio.sleep(struck.strike.length_s)
    proxy.heal()
    return note


def _silence(_: Link) -> None:
    """Nothing more comes through, and no end is told."""


async def _bytes(proxy: Proxy, struck: Struck, most: int) -> str:
    """The first k bytes of each connection, then its end: FIN, RST or silence."""
    coin = struck.strike.coin
    count = int(most * (coin * 7 % 1) ** 2)
    proxy.at_limit = (Link.cut, lambda link: link.cut(reset=True), _silence)[int(3 * coin)]
    setattr(proxy, "up_max" if int(coin * 1000) % 2 else "down_max", count)
    await asyncio.sleep(struck.strike.length_s)
    proxy.heal()
    proxy.cut()
    return f"{count} bytes"


@fault("partition-db", "db", 0.5, 2.0)
async def _partition_db(arena: Arena, struck: Struck) -> str:
    """A black hole between a server and Postgres."""
    return await _black_hole(arena.hosts[struck.strike.host].database, struck)


@fault("cut-db", "db", 0.0, 0.5)
async def _cut_db(arena: Arena, struck: Struck) -> str:
    """A server's connections to Postgres are cut, and new ones refused for a while."""
    return await _cut(arena.hosts[struck.strike.host].database, struck)


@fault("delay-db", "db", 0.5, 2.0)
async def _delay_db(arena: Arena, struck: Struck) -> str:
    """A slow network between a server and Postgres."""
    return await _delay(arena.hosts[struck.strike.host].database, struck)


@fault("bytes-db", "db", 0.3, 1.0)
async def _bytes_db(arena: Arena, struck: Struck) -> str:
    """Only the first k bytes of a server's connections to Postgres arrive."""
    return await _bytes(arena.hosts[struck.strike.host].database, struck, 12_000)


@fault("partition-smtp", "smtp", 0.5, 2.0)
async def _partition_smtp(arena: Arena, struck: Struck) -> str:
    """A black hole between a server and the mail server."""
    return await _black_hole(arena.hosts[struck.strike.host].smtp, struck)


@fault("cut-smtp", "smtp", 0.0, 0.5)
async def _cut_smtp(arena: Arena, struck: Struck) -> str:
    """A server's connections to the mail server are cut, and new ones refused for a while."""
    return await _cut(arena.hosts[struck.strike.host].smtp, struck)


@fault("delay-smtp", "smtp", 0.5, 2.0)
async def _delay_smtp(arena: Arena, struck: Struck) -> str:
    """A slow network between a server and the mail server."""
    return await _delay(arena.hosts[struck.strike.host].smtp, struck)


@fault("bytes-smtp", "smtp", 0.3, 1.0)
async def _bytes_smtp(arena: Arena, struck: Struck) -> str:
    """Only the first k bytes of a server's connections to the mail server arrive."""
    return await _bytes(arena.hosts[struck.strike.host].smtp, struck, 15_000)


@fault("smtp", "mail", 0.5, 2.0)
async def _smtp(arena: Arena, struck: Struck) -> str:
    """The mail server has moods at every stage: ends, hangs, 421, 4xx, 5xx, garbage, split and late replies."""
    before = sum(arena.mail.met.values())
    arena.mail.trouble = TROUBLE
    await asyncio.sleep(struck.strike.length_s)
    arena.mail.trouble = 0.0
    return f"{sum(arena.mail.met.values()) - before} met"

"""One relay process with all its commits, against two loops without a database: same server, same bytes.

The stronger baseline is a loop written by hand (bench/harness/smtp_by_hand.py) that sends to Postfix' smtp-sink, a
server in C that leaves the cores to the client. The other one is `aiosmtplib.SMTP.sendmail`
(bench/harness/smtp_baseline.py) with the sink of outbox.
"""

import asyncio
import os
import pwd
import resource
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from bench.harness.environment import Environment, median, open_environment, process_env
from bench.harness.figures import Spread, Target, keep, show

COUNTERS: Final = (
    "SELECT xact_commit AS commits, pg_current_wal_flush_lsn() AS lsn"
    " FROM pg_stat_database WHERE datname = current_database()"
)
# Page images come with the first change of a page after a checkpoint: a matter of how often there is one.
WAL: Final = "SELECT sum(record_size)::float8 AS records, sum(fpi_size)::float8 AS images FROM pg_get_wal_stats($1, $2)"
SHOWN: Final = ("cpu_us", "wal", "images", "commits")
RELAY, SENDMAIL = "outbox relay", "aiosmtplib"
RELAY_TO_C, BY_HAND = "outbox relay to smtp-sink", "loop by hand to smtp-sink"
SMTP_SINK: Final = shutil.which("smtp-sink") or shutil.which("/usr/sbin/smtp-sink")
# smtp-sink keeps no journal: from the first mark to the last settlement, as Postgres has them.
SETTLED: Final = (
    "SELECT count(*) AS sent, extract(epoch FROM max(settled_at) - min(marked_at))::float8 AS took_s"
    "  FROM outbox.attempt WHERE verdict = 'accepted'"
)


def message_of(size: int) -> bytes:
    """Return a plain message of about `size` bytes."""
    head = b"From: reports@example.com\r\nTo: you@example.com\r\nSubject: Progress\r\n\r\n"
    return head + (b"y" * 70 + b"\r\n") * max((size - len(head)) // 72, 1)


async def measure(url: str, *, emails: int, size: int, connections: list[int], runs: int) -> None:
    """Alternate the two, several times at each number of connections; a table and bench/results/relay.json."""
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(runs):
        for count in connections:
            async with open_environment(url, connections=count) as environment:
                for kind, one in (await _round(environment, emails, count, size)).items():
                    found.setdefault(f"{kind}, {count} connections", []).append(one)
        print(f"run {number + 1} of {runs}")
    rates = {who: Spread.of([one["per_s"] for one in measured]) for who, measured in found.items()}
    show(
        f"{emails} emails of {size} bytes, one process: median, least and most of {runs} runs",
        ("who", "sent/s", "CPU µs/msg", "WAL B/msg", "page images B/msg", "commits/msg"),
        [
            (who, rates[who].text(",.0f"),
             *(f"{median([one.get(what, 0.0) for one in measured]):,.3g}" for what in SHOWN))
            for who, measured in found.items()
        ],
    )  # fmt: skip
    best = {
        kind: max((who for who in rates if who.startswith(f"{kind}, ")), key=lambda who: rates[who].median)
        for kind in {who.rpartition(", ")[0] for who in rates}
    }
    ours = found[best[RELAY]]
    by_hand = [
        Target(
            "one relay against a loop by hand, both to smtp-sink",
            rates[best[RELAY_TO_C]].median / rates[best[BY_HAND]].median, 0.6, "times", at_least=True,
        )
    ] if BY_HAND in best else []  # fmt: skip
    ratio = rates[best[RELAY]].median / rates[best[SENDMAIL]].median
    targets = [
        *by_hand,
        Target("one relay against a loop of aiosmtplib's sendmail", ratio, 1.5, "times", at_least=True),
        Target("WAL of a message, without page images", median([one["wal"] for one in ours]), 700, "B"),
        Target("commits of a message", median([one["commits"] for one in ours]), 0.1, ""),
    ]  # fmt: skip
    keep("relay", {"emails": emails, "size": size, "found": found}, targets)


async def _round(environment: Environment, emails: int, count: int, size: int) -> dict[str, dict[str, float]]:
    """Measure each kind once, one after the other."""
    found = {
        RELAY: await _relay(environment, emails, size),
        SENDMAIL: await _baseline(environment, emails, count, size),
    }
    if SMTP_SINK is None:
        print("smtp-sink is not installed (Debian: postfix), so the stronger baseline is left out")
        return found
    own = environment.smtp
    async with _smtp_sink() as port:
        try:
            environment.smtp = f"smtp://127.0.0.1:{port}"
            found[RELAY_TO_C] = await _relay_to_c(environment, emails, size)
        finally:
            environment.smtp = own
        found[BY_HAND] = await _by_hand(environment, port, emails, count, size)
    return found


@asynccontextmanager
async def _smtp_sink() -> AsyncIterator[int]:
    """Run smtp-sink and yield its port."""
    assert SMTP_SINK is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    user = ["-u", pwd.getpwnam("nobody").pw_name] if os.geteuid() == 0 else []
    process = await asyncio.create_subprocess_exec(SMTP_SINK, *user, f"127.0.0.1:{port}", "1024")
    try:
        while not _answers(port):
            if process.returncode is not None:
                raise SystemExit(f"bench: smtp-sink ended with {process.returncode}")
            await asyncio.sleep(0.02)
        yield port
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def _relay_to_c(environment: Environment, emails: int, size: int) -> dict[str, float]:
    await environment.reset(0)
    await environment.put_emails(emails, message_of(size))
    process = await environment.start("outbox", "relay", "--until-empty")
    await process.communicate()
    assert process.returncode == 0, environment.log_tail()
    row = await environment.connection.fetchrow(SETTLED)
    assert row["sent"] == emails, f"{row['sent']} of {emails} accepted"
    return {"per_s": emails / row["took_s"]}


async def _by_hand(environment: Environment, port: int, emails: int, connections: int, size: int) -> dict[str, float]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.harness.smtp_by_hand",
        "127.0.0.1", str(port), str(emails), str(connections), str(size),
        cwd=environment.directory, env=process_env(), stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0
    return {"per_s": float(out)}


async def _relay(environment: Environment, emails: int, size: int) -> dict[str, float]:
    await environment.reset(0)
    await environment.put_emails(emails, message_of(size))
    await environment.connection.execute("CREATE EXTENSION IF NOT EXISTS pg_walinspect")
    before = await environment.connection.fetchrow(COUNTERS)
    found = await _timed(environment, emails, "outbox", "relay", "--until-empty")
    after = await environment.connection.fetchrow(COUNTERS)
    wal = await environment.connection.fetchrow(WAL, before["lsn"], after["lsn"])
    return {
        **found,
        "wal": wal["records"] / emails,
        "images": wal["images"] / emails,
        "commits": (after["commits"] - before["commits"]) / emails,
    }


async def _baseline(environment: Environment, emails: int, connections: int, size: int) -> dict[str, float]:
    host, port = environment.smtp.removeprefix("smtp://").rsplit(":", 1)
    return await _timed(
        environment, emails, "bench.harness.smtp_baseline", host, port, str(emails), str(connections), str(size)
    )


async def _timed(environment: Environment, emails: int, *command: str) -> dict[str, Any]:
    """Measure from the first acceptance to the last, so that start-up does not count."""
    since = environment.mark()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = await environment.start(*command)
    await process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, f"{command} exited {process.returncode}: {environment.log_tail()}"
    lines = await environment.accepted(emails, since, deadline_s=5)
    assert len(lines) == emails, f"{command}: {len(lines)} of {emails} accepted"
    ats = [line.at for line in lines]
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"per_s": emails / (max(ats) - min(ats)), "cpu_us": 1e6 * cpu_s / emails}

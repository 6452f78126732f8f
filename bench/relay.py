"""One relay process with all its commits, against a bare aiosmtplib loop without a database: same sink, same bytes."""

import resource
from typing import Any, Final

from bench.figures import Spread, Target, keep, show
from bench.world import World, median, world

COUNTERS: Final = (
    "SELECT xact_commit AS commits, pg_current_wal_flush_lsn() AS lsn"
    " FROM pg_stat_database WHERE datname = current_database()"
)
# Page images come with the first change of a page after a checkpoint: a matter of how often there is one.
WAL: Final = "SELECT sum(record_size)::float8 AS records, sum(fpi_size)::float8 AS images FROM pg_get_wal_stats($1, $2)"
SHOWN: Final = ("cpu_us", "wal", "images", "commits")


def message_of(size: int) -> bytes:
    """A plain message of about `size` bytes."""
    head = b"From: reports@example.com\r\nTo: you@example.com\r\nSubject: Progress\r\n\r\n"
    return head + (b"y" * 70 + b"\r\n") * max((size - len(head)) // 72, 1)


async def measure(url: str, *, emails: int, size: int, connections: list[int], runs: int) -> None:
    """Alternate the two, several times at each number of connections; a table and bench/results/relay.json."""
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(runs):
        for count in connections:
            async with world(url, connections=count) as place:
                found.setdefault(f"outbox relay, {count} connections", []).append(await _relay(place, emails, size))
                found.setdefault(f"aiosmtplib, {count} connections", []).append(
                    await _baseline(place, emails, count, size)
                )
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
    best = {kind: max((who for who in rates if who.startswith(kind)), key=lambda who: rates[who].median)
            for kind in ("outbox", "aiosmtplib")}  # fmt: skip
    ours = found[best["outbox"]]
    ratio = rates[best["outbox"]].median / rates[best["aiosmtplib"]].median
    targets = [
        Target("one relay against a bare aiosmtplib loop", ratio, 1.5, "times", at_least=True),
        Target("WAL of a message, without page images", median([one["wal"] for one in ours]), 700, "B"),
        Target("commits of a message", median([one["commits"] for one in ours]), 0.1, ""),
    ]  # fmt: skip
    keep("relay", {"emails": emails, "size": size, "found": found}, targets)


async def _relay(place: World, emails: int, size: int) -> dict[str, float]:
    await place.reset(0)
    await place.put_emails(emails, message_of(size))
    await place.connection.execute("CREATE EXTENSION IF NOT EXISTS pg_walinspect")
    before = await place.connection.fetchrow(COUNTERS)
    found = await _timed(place, emails, "outbox", "relay", "--until-empty")
    after = await place.connection.fetchrow(COUNTERS)
    wal = await place.connection.fetchrow(WAL, before["lsn"], after["lsn"])
    return {
        **found,
        "wal": wal["records"] / emails,
        "images": wal["images"] / emails,
        "commits": (after["commits"] - before["commits"]) / emails,
    }


async def _baseline(place: World, emails: int, connections: int, size: int) -> dict[str, float]:
    host, port = place.smtp.removeprefix("smtp://").rsplit(":", 1)
    return await _timed(place, emails, "bench.baseline", host, port, str(emails), str(connections), str(size))


async def _timed(place: World, emails: int, *command: str) -> dict[str, Any]:
    """From the first acceptance to the last, so that start-up does not count."""
    since = place.mark()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = await place.start(*command)
    await process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, f"{command} exited {process.returncode}: {place.said()}"
    lines = await place.accepted(emails, since, deadline_s=5)
    assert len(lines) == emails, f"{command}: {len(lines)} of {emails} accepted"
    ats = [line.at for line in lines]
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"per_s": emails / (max(ats) - min(ats)), "cpu_us": 1e6 * cpu_s / emails}

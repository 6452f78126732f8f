"""Mail over a slow network: how near one connection comes to what round trips allow, and how many a relay opens."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.harness.environment import Environment, median, open_environment
from bench.harness.figures import Spread, Target, keep, show
from bench.harness.latency_proxy import opened, round_trip_s, slowed
from bench.speed.one_relay import message_of

PINGS: Final = 50
SIZE: Final = 2000
FEW: Final = 5
SENT_MAX: Final = 20_000
PIPELINED_MIN: Final = 0.9
PATIENCE: Final = 10.0  # a run may take so many times as long as it would at the limit


@dataclass(frozen=True, slots=True)
class Mode:
    """Protocol that the mail server offers; `trips` is the cost of a message on one connection, in round trips.

    Pipelined, the envelope is one trip and content and dot another; step by step MAIL, RCPT, DATA and the dot are each
    waited for.
    """

    name: str
    sink: tuple[str, ...]
    trips: int


MODES: Final = tuple(
    Mode(f"{name}{', STARTTLS' if tls else ''}", ("bench.harness.starttls_sink", *options, *tls), trips)
    for tls in ((), ("--starttls",))
    for name, options, trips in (("PIPELINING", (), 2), ("step by step", ("--no-pipelining",), 4))
)


async def measure(url: str, *, round_trips_ms: Sequence[float], seconds: float, connections: int, runs: int) -> None:
    """Measure all networks and modes in turns; two tables and bench/results/roundtrip.json."""
    found: dict[tuple[float, str], dict[str, list[dict[str, Any]]]] = {}
    for number in range(runs):
        for network, mode in itertools.product(round_trips_ms, MODES):
            cell = found.setdefault((network, mode.name), {"one": [], "many": [], "few": []})
            cell["one"].append(await _once(url, network, mode, 1, _count(network, mode, 1, seconds)))
            if mode in MODES[:2]:
                many = _count(network, mode, connections, seconds)
                cell["many"].append(await _once(url, network, mode, connections, many))
                cell["few"].append(await _once(url, network, mode, connections, FEW))
        print(f"run {number + 1} of {runs}")
    _show_one(found, runs)
    _show_many(found, connections, runs)
    rows = [{"round_trip_ms": network, "mode": mode, **cell} for (network, mode), cell in found.items()]
    keep(
        "roundtrip", {"runs": runs, "connections": connections, "few": FEW, "found": rows}, _targets(rows, connections)
    )


def _count(network_ms: float, mode: Mode, connections: int, seconds: float) -> int:
    """Return how many emails go in so many seconds; a fast network is not the limit of many connections."""
    return min(round(seconds * connections / (mode.trips * network_ms / 1000)), SENT_MAX)


async def _once(url: str, network_ms: float, mode: Mode, connections: int, emails: int) -> dict[str, Any]:
    """Measure from the first acceptance to the last, and the connections that it took."""
    async with open_environment(url, connections=connections, sink=mode.sink) as near:
        async with slowed(near, network_ms / 1000) as (environment, _):
            trip_s = median(await round_trip_s(environment.smtp, PINGS))
        async with slowed(near, network_ms / 1000) as (environment, journal):
            await environment.reset(0)
            await environment.put_emails(emails, message_of(SIZE))
            ats = await _sent(environment, emails, PATIENCE * (1 + emails * mode.trips * trip_s / connections))
        went = opened(journal)
    limit = connections / (mode.trips * trip_s)
    per_s = (emails - 1) / (ats[-1] - ats[0]) if emails > 1 else 0.0
    over_time = went.over_time()
    most = max(standing for _, standing in over_time)
    return {
        "round_trip_ms": 1000 * trip_s,
        "emails": emails,
        "per_s": per_s,
        "limit_per_s": limit,
        "share": per_s / limit,
        "opened": went.total,
        "most_at_once": most,
        "all_open_s": next(at for at, standing in over_time if standing == most),
        "over_time": over_time,
    }


async def _sent(environment: Environment, emails: int, deadline_s: float) -> list[float]:
    since = environment.mark()
    relay = await environment.start("outbox", "relay", "--until-empty")
    lines = await environment.accepted(emails, since, deadline_s)
    await relay.communicate()
    if relay.returncode or len(lines) != emails:
        raise SystemExit(f"bench: {len(lines)} of {emails} emails were accepted: {environment.log_tail()}")
    return sorted(line.at for line in lines)


Cells = dict[tuple[float, str], dict[str, list[dict[str, Any]]]]


def _show_one(found: Cells, runs: int) -> None:
    show(
        f"One connection, emails of {SIZE} bytes: median, least and most of {runs} runs",
        ("network", "mode", "round trip ms", "messages/s", "limit", "share of the limit"),
        [
            (f"{network:g} ms", mode, f"{_of(cell['one'], 'round_trip_ms').median:.2f}",
             _of(cell["one"], "per_s").text(",.1f"), f"{_of(cell['one'], 'limit_per_s').median:,.1f}",
             _of(cell["one"], "share").text(".2f"))
            for (network, mode), cell in found.items()
        ],
        words=2,
    )  # fmt: skip


def _show_many(found: Cells, connections: int, runs: int) -> None:
    show(
        f"connections_max = {connections}: a backlog, and {FEW} emails; median, least and most of {runs} runs",
        ("network", "mode", "messages/s", "limit", "connections", "all open after s", f"connections for {FEW}"),
        [
            (f"{network:g} ms", mode, _of(cell["many"], "per_s").text(",.0f"),
             f"{_of(cell['many'], 'limit_per_s').median:,.0f}", _of(cell["many"], "most_at_once").text(".0f"),
             f"{_of(cell['many'], 'all_open_s').median:.2f}", _of(cell["few"], "most_at_once").text(".0f"))
            for (network, mode), cell in found.items() if cell["many"]
        ],
        words=2,
    )  # fmt: skip


def _of(every: Sequence[dict[str, Any]], what: str) -> Spread:
    return Spread.of([one[what] for one in every])


def _targets(rows: Sequence[dict[str, Any]], connections: int) -> list[Target]:
    shares = [
        Target(f"one connection, {row['round_trip_ms']:g} ms, {row['mode']}: share of the limit",
               _of(row["one"], "share").median, PIPELINED_MIN, "", at_least=True)
        for row in rows if row["mode"].startswith(MODES[0].name)
    ]  # fmt: skip
    many = [row for row in rows if row["many"]]
    return [
        *shares,
        Target("a backlog: connections, the fewest in any run",
               min(_of(row["many"], "most_at_once").least for row in many), connections, "", at_least=True),
        Target(f"{FEW} emails due: connections, the most in any run",
               max(_of(row["few"], "most_at_once").most for row in many), FEW, ""),
    ]  # fmt: skip

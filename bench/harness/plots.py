"""Results as panels: what each benchmark's JSON says, in bars with their spread and their targets.

A panel whose results are missing is left out. `picture` draws what this room chooses.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.harness.environment import HOUSE, RESULTS
from bench.harness.figures import Spread

PAGE: Final = HOUSE / "docs" / "benchmarks.svg"
BUILDERS: Final = frozenset({"message.build", "EmailMessage", "MIMEText"})
FAR_APART: Final = 30.0  # a greatest and a least that differ more than so many times need a logarithmic scale

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bar:
    """Measurement; `ours` stands out, and `target` is the limit that it should reach or keep."""

    label: str
    spread: Spread
    ours: bool = True
    target: float | None = None


@dataclass(frozen=True, slots=True)
class Bars:
    """Panel of bars."""

    title: str
    unit: str
    bars: Sequence[Bar]

    @property
    def logarithmic(self) -> bool:
        """Return True if the figures are too far apart for a linear scale."""
        figures = [bar.spread.median for bar in self.bars if bar.spread.median > 0]
        return bool(figures) and max(figures) > FAR_APART * min(figures)


@dataclass(frozen=True, slots=True)
class Line:
    """Curve over time: seconds and value, each value holding until the next."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Lines:
    """Panel of lines."""

    title: str
    unit: str
    lines: Sequence[Line]
    target: float | None = None


Panel = Bars | Lines


def panels(results: Path = RESULTS) -> list[Panel]:
    """Return all panels of the results, in the order of the story."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    return [panel for name, draw in PANELS.items() if name in found for panel in draw(found[name])]


def _rates(title: str, unit: str) -> Callable[[Json], Iterator[Panel]]:
    """Return a function that draws results of the form {"found": {who: [{"per_s": …}]}}."""

    def draw(result: Json) -> Iterator[Panel]:
        found = result.get("found")
        if not isinstance(found, Mapping):
            return
        bars = [
            Bar(who, _of(every, "per_s"), ours=_is_ours(who))
            for who, every in found.items()
            if every and all("per_s" in one for one in every)
        ]
        if bars:
            yield Bars(title, unit, bars)

    return draw


def _generate(result: Json) -> Iterator[Panel]:
    """Draw the making of reports, and a part of it by itself: the bytes of a message."""
    parts = {who: every for who, every in result["found"].items() if who in BUILDERS}
    whole = {who: every for who, every in result["found"].items() if who not in BUILDERS}
    yield from _rates("Making reports", "reports/s")({"found": whole})
    yield from _rates("Building a message", "messages/s")({"found": parts})


def _is_ours(who: str) -> bool:
    return who.startswith(("outbox", "trivial", "message.build")) or who == "relay"


def _startup(result: Json) -> Iterator[Panel]:
    found = {who: _of(every, "wall_s", 1000) for who, every in result["found"].items()}
    names = list(found)  # a command, and what it is measured against, in pairs
    limits = {one["what"].partition(":")[0]: one["limit"] for one in reversed(result["targets"])}
    yield Bars("Start to exit", "ms", [
        Bar(who if index % 2 == 0 else _imports(who), found[who], ours=index % 2 == 0,
            target=limits[who] * found[names[index + 1]].median if who in limits else None)
        for index, who in enumerate(names)
    ])  # fmt: skip


def _imports(statement: str) -> str:
    """Shorten an import statement."""
    return statement.replace("sqlalchemy.ext.asyncio", "sqlalchemy")


def _latency(result: Json) -> Iterator[Panel]:
    limit = 1000 * next((one["limit"] for one in reversed(result["targets"])), 0.0)
    bars = []
    for row in result["found"]:
        name, runs = f"{row['relays']} relays, {row['name']}", row["runs"]
        bars.append(Bar(f"{name}: p50", _of(runs, "p50_ms")))
        if row["notified"]:
            bars.append(Bar(f"{name}: p99", _of(runs, "p99_ms"), ours=False))
        else:  # what polls promise is the longest wait
            bars.append(Bar(f"{name}: max", _of(runs, "max_ms"), ours=False, target=limit))
    yield Bars("Idle fleet: COMMIT to acceptance", "ms", bars)


def _relays(result: Json) -> Iterator[Panel]:
    yield Bars(f"Relays on one machine, {result['connections']} connections each", "emails/s", [
        Bar(f"{count} {'relay' if count == '1' else 'relays'}", _of(every, "per_s"))
        for count, every in result["found"].items()
    ])  # fmt: skip
    idle = result["idle"]
    if idle["found"]:
        limit = result["targets"][-1]["limit"]
        yield Bars(f"{idle['relays']} idle relays together", "% of a core", [
            Bar("Postgres", _of(idle["found"], "postgres"), target=limit),
            Bar("the relays", _of(idle["found"], "relays"), ours=False),
        ])  # fmt: skip


def _roundtrip(result: Json) -> Iterator[Panel]:
    pipelined = next(one["limit"] for one in result["targets"] if "share" in one["what"])
    yield Bars("One connection over a slow network", "share of the limit by round trips", [
        Bar(f"{row['round_trip_ms']:g} ms, {row['mode']}", _of(row["one"], "share"),
            target=pipelined if row["mode"].startswith("PIPELINING") else None)
        for row in result["found"]
    ])  # fmt: skip
    lines = [
        Line(f"{row['round_trip_ms']:g} ms, {what}", row[kind][0]["over_time"])
        for row in result["found"] if row["mode"] == "PIPELINING"
        for kind, what in (("many", "a backlog"), ("few", f"{result['few']} emails"))
    ]  # fmt: skip
    yield Lines(f"Connections opened, at most {result['connections']}", "connections", lines)


def _growth(result: Json) -> Iterator[Panel]:
    """Draw the CPU time of Postgres for claim, mark and settle together, by what lies in the tables."""
    bars = [
        Bar(f"{place['label']} {what}", _sum_of(place, "cpu_us"))
        for part, what in {"settled": "sent", "due": "due", "deferred": "deferred"}.items()
        for place in result.get(part, ())
    ]
    if bars:
        yield Bars("Postgres per email, as the tables grow", "CPU µs", bars)


def _sum_of(place: Json, kind: str) -> Spread:
    steps = [place[step][kind] for step in ("claim", "mark", "settle")]
    return Spread.of([sum(round_) for round_ in zip(*steps, strict=True)])


def _rate(result: Json) -> Iterator[Panel]:
    """Draw how far the emptiest and the fullest window are from what the rate allows."""
    yield Bars(f"Rate within any {result['window_s']:g} s, relays coming and going", "% of the rate", [
        Bar(f"{float(rate):g}/s: {what}", _of(every, name, 100))
        for rate, every in result["found"].items() for name, what in (("least", "least"), ("most", "most"))
    ])  # fmt: skip


def _of(every: Sequence[Json], what: str, times: float = 1.0) -> Spread:
    return Spread.of([times * one[what] for one in every])


PANELS: Final[Mapping[str, Callable[[Json], Iterator[Panel]]]] = {
    "relay": _rates("One relay process, 2 KB emails", "emails/s"),
    "peers": _rates("Against others", "emails/s"),
    "relays": _relays,
    "generate": _generate,
    "growth": _growth,
    "roundtrip": _roundtrip,
    "rate": _rate,
    "latency": _latency,
    "startup": _startup,
}

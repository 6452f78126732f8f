"""Result of a run from the sink's journal, and the table of all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness.environment import Line, median
from bench.peers.entrants import OUTBOX, RELAY, SMTP_SOURCE, Entrant


@dataclass(frozen=True, slots=True)
class Result:
    """Run of one entrant."""

    per_s: float
    """People with a mail, by the time from the first acceptance to the last."""
    middle_per_s: float
    """The same of the middle 80 %: without most of the time in which not all workers are at work yet or still."""
    too_many: int
    """Mails beyond the first to somebody."""
    lost: int
    """People without."""
    bad_exits: list[int]
    """Exit codes of workers that ended by themselves, but 0."""

    def as_json(self) -> dict[str, Any]:
        """Return the row for bench/results."""
        return asdict(self)


def result_of(lines: Sequence[Line], emails: int, bad_exits: list[int]) -> Result:
    """Judge what was accepted."""
    ats = sorted(line.at for line in lines)
    people = len({line.address for line in lines})
    return Result(
        per_s=_rate(people, ats),
        middle_per_s=_rate(round(0.8 * people), ats[len(ats) // 10 : len(ats) - len(ats) // 10]),
        too_many=len(lines) - people,
        lost=emails - people,
        bad_exits=bad_exits,
    )


def _rate(count: int, ats: list[float]) -> float:
    return count / max(ats[-1] - ats[0], 1e-3) if ats else 0.0


def report(
    found: dict[str, list[Result]], fields: list[Entrant], asked: Mapping[str, float], console: Console
) -> dict[str, float]:
    """Print the table and the ratios; return the ratios of medians."""
    console.print(_table(found, asked))
    rates = {title: median([one.per_s for one in results]) for title, results in found.items()}
    ratios: dict[str, float] = {}
    if OUTBOX in rates:
        for ready, what in ((False, "as documented"), (True, "pre-built")):
            if best := _best(found, fields, rates, ready=ready):
                ratios[f"outbox / best peer {what} ({best})"] = rates[OUTBOX] / rates[best]
    if RELAY in rates and rates.get(SMTP_SOURCE):
        ratios["one relay / smtp-source"] = rates[RELAY] / rates[SMTP_SOURCE]
    for what, ratio in ratios.items():
        console.print(f"{what}: {ratio:.2f}")
    return ratios


def _best(
    found: dict[str, list[Result]],
    fields: list[Entrant],
    rates: dict[str, float],
    *,
    ready: bool,
) -> str | None:
    """Return the fastest queue that neither lost nor doubled a mail in any run."""
    titles = [
        entrant.title for entrant in fields if entrant.peer.queue and entrant.ready == ready and entrant.title in found
    ]
    right = [title for title in titles if not any(one.too_many or one.lost for one in found[title])]
    return max(right, key=rates.__getitem__, default=None)


def _table(found: dict[str, list[Result]], asked: Mapping[str, float]) -> Table:
    title = (
        "about {seconds:g} s of emails of {size} bytes, {workers} workers, {connections} connections each ({runs} runs)"
    )
    table = Table(title=title.format(**asked), box=None)
    columns = ("who", "sent/s", "least", "most", "middle 80 %", "too many", "lost", "bad exits")
    for column in columns:
        table.add_column(column, justify="left" if column == "who" else "right", no_wrap=column == "who")
    for who, results in found.items():
        rates = [one.per_s for one in results]
        middle = median([one.middle_per_s for one in results])
        table.add_row(
            who,
            *(f"{rate:,.0f}" for rate in (median(rates), min(rates), max(rates), middle)),
            f"{max(one.too_many for one in results):,}",
            f"{max(one.lost for one in results):,}",
            f"{max(len(one.bad_exits) for one in results):,}",
        )
    return table

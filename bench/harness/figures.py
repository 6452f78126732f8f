"""Figures: median and spread, the targets of a benchmark, and the table that shows both."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from rich.console import Console
from rich.table import Table

from bench.harness.environment import median, save

WIDTH_MIN: Final = 150  # what is piped into a file is not folded at 80


@dataclass(frozen=True, slots=True)
class Target:
    """Target and its measurement; `at_least` says on which side of the limit it is met."""

    what: str
    measured: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Return True if the target was met."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    @property
    def wanted(self) -> str:
        """Return the limit in words."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g} {self.unit}".strip()

    def as_row(self) -> dict[str, Any]:
        """Return the row that is saved."""
        return asdict(self)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """Return the target of a saved row."""
        return cls(**row)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, minimum and maximum of several measurements."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the spread of at least one value."""
        return cls(median(values), min(values), max(values))

    def text(self, shape: str) -> str:
        """Return the text for a table, each figure in this shape (as for `format`)."""
        return f"{self.median:{shape}} ({self.least:{shape}}-{self.most:{shape}})"


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> None:
    """Print a table; the first `words` columns are words, the others figures."""
    console = Console()
    console.width = max(console.width, WIDTH_MIN)
    console.print(title, style="italic", highlight=False)
    table = Table(box=None)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < words else "right", no_wrap=number >= words)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_targets(targets: Iterable[Target], title: str = "Targets") -> None:
    """Print targets, measurements, and whether they were met."""
    rows = [(one.what, one.wanted, f"{one.measured:,.3g} {one.unit}".strip(), verdict(one)) for one in targets]
    show(title, ("what", "target", "measured", ""), rows)


def verdict(target: Target) -> str:
    """Return the result as a word, for a table."""
    return "[green]met[/green]" if target.met else "[red]missed[/red]"


def keep(name: str, result: dict[str, Any], targets: Sequence[Target]) -> None:
    """Print the targets, save everything as JSON and print the path."""
    if targets:
        show_targets(targets)
    path = save(name, {**result, "targets": [one.as_row() for one in targets]})
    Console().print(f"[dim]{path}[/dim]", soft_wrap=True)

"""Options by which emails are selected, their checks, the question before many are changed, and the outcome."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.output import NAMES_SHOWN, printable

if TYPE_CHECKING:
    from outbox.operations.email_filter import Chosen, Selection

KeysArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Keys, as `outbox list` and `outbox status` show them.", metavar="KEY", show_default=False),
]
EditionOption = Annotated[
    str | None,
    typer.Option(help='Instead of keys: all of an edition, such as "progress 2026-W48".', show_default=False),
]
ReportOption = Annotated[str | None, typer.Option(help="Only of this report.", show_default=False)]
PeriodOption = Annotated[str | None, typer.Option(help="Only of this period, such as 2026-W48.", show_default=False)]
ToOption = Annotated[
    str | None,
    typer.Option(
        help='Only to this address; * stands for anything, as in "*@example.com".',
        metavar="ADDRESS",
        show_default=False,
    ),
]
WhyOption = Annotated[
    str, typer.Option(help="Why; kept with the emails. Needed where they are not named.", show_default=False)
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def clashes(selection: "Selection") -> list[str]:
    """Return a sentence for each combination of options that makes no sense."""
    if selection.edition is None:
        return []
    twice = [option for option in selection.options if option in ("--report", "--period")]
    return [f"--edition says report and period already; take {option} out." for option in twice]


def problems_of(selection: "Selection", why: str, *, yes: bool) -> list[str]:
    """Return a sentence for each reason why these cannot be decided about; nothing is read for it."""
    keys, options = selection.keys, selection.options
    if not selection.is_by_filter:
        nothing = (
            'Name keys, as `outbox list` shows them, or say which: --edition "progress 2026-W48", --to ann@example.com.'
        )
        return [] if keys else [nothing]
    if keys and not options:
        return ["--state picks among emails that are not named; name keys or say --state, not both."]
    first = options[0] if options else "--state"
    problems = clashes(selection)
    if keys:
        what = "a whole edition" if first == "--edition" else "all that fit"
        problems.append(f"{first} decides about {what}; name keys or say {first}, not both.")
    if not why.strip():
        problems.append(
            '--why: say why, as in --why "the mail server\'s log has them all"; it is kept with the emails.'
        )
    if not yes and not sys.stdin.isatty():
        problems.append(f"{first} decides about many emails at once and nobody can be asked here; add --yes.")
    return problems


def ask(question: str, named: "Sequence[Chosen]", count: int) -> None:
    """Return if the user confirms at the terminal, or if it is one email, about which there is no question."""
    if count <= 1:
        return
    for one in named[:NAMES_SHOWN]:
        typer.echo(printable(f"  {one.key} <{one.address}> is {one.state.replace('_', ' ')}"), err=True)
    if count > NAMES_SHOWN:
        typer.echo(f"  \N{HORIZONTAL ELLIPSIS} and {count - NAMES_SHOWN:,} more", err=True)
    if not typer.confirm(question, err=True):
        typer.echo("outbox: Nothing was changed.", err=True)
        raise typer.Exit(1)


def print_outcome(keys: Sequence[str], count: int, done: str, others: Sequence[str]) -> int:
    """Print what was done to `count` emails, `keys` by name, and the sentences of `others`; return the exit code."""
    for key in keys:
        typer.echo(f"{printable(key)}: {done}")
    if count > len(keys):
        typer.echo(f"\N{HORIZONTAL ELLIPSIS} and {count - len(keys):,} more: {done}")
    for sentence in others:
        typer.echo(f"outbox: {printable(sentence)}", err=True)
    return 1 if others else 0


def twice(keys: Sequence[str]) -> list[str]:
    """Return a sentence for each key that was given more than once."""
    return [f"{key} was named twice; it counts once." for key in dict.fromkeys(keys) if keys.count(key) > 1]

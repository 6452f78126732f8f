"""`outbox retry` and `outbox cancel`: send emails again at once, or not at all."""

import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import ConfigOption, app, awaited, connected, settings_of
from outbox.cli.email_options import (
    EditionOption,
    KeysArgument,
    PeriodOption,
    ReportOption,
    ToOption,
    WhyOption,
    YesOption,
    ask,
    print_outcome,
    problems_of,
    twice,
)
from outbox.cli.output import NAMES_SHOWN, Bar
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from outbox.operations.email_filter import Chosen, Selection
    from outbox.operations.retry_cancel import Act
    from outbox.settings import Settings


class Retriable(StrEnum):
    """State from which an email can be retried."""

    DEAD = "dead"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    PENDING = "pending"


@app.command()
def retry(
    context: typer.Context,
    keys: KeysArgument = None,
    config: ConfigOption = None,
    *,
    edition: EditionOption = None,
    report: ReportOption = None,
    period: PeriodOption = None,
    to: ToOption = None,
    state: Annotated[
        list[Retriable] | None,
        typer.Option(
            help="Of those that are not named: dead, expired and pending by default; cancelled, too, where it is said.",
            metavar="STATE",
            show_default=False,
        ),
    ] = None,
    why: WhyOption = "",
    yes: YesOption = False,
) -> None:
    """Send again what is dead, expired or cancelled, at once.

    What waits for its next try has it now. What is in doubt is for `outbox resolve`.
    """
    from outbox.operations.email_filter import Selection
    from outbox.operations.retry_cancel import Act

    states = tuple(one.value for one in state or ())
    chosen = Selection(tuple(keys or ()), edition, report, period, to, states)
    raise typer.Exit(_act(context, config, Act.RETRY, chosen, why, yes=yes))


@app.command()
def cancel(
    context: typer.Context,
    keys: KeysArgument = None,
    config: ConfigOption = None,
    *,
    edition: EditionOption = None,
    report: ReportOption = None,
    period: PeriodOption = None,
    to: ToOption = None,
    why: WhyOption = "",
    yes: YesOption = False,
) -> None:
    """Do not send what is pending.

    Its report stays, and its key: generate does not make it again. `outbox retry` takes it back.
    """
    from outbox.operations.email_filter import Selection
    from outbox.operations.retry_cancel import Act

    chosen = Selection(tuple(keys or ()), edition, report, period, to)
    raise typer.Exit(_act(context, config, Act.CANCEL, chosen, why, yes=yes))


def _act(context: typer.Context, config: Path | None, act: "Act", chosen: "Selection", why: str, *, yes: bool) -> int:
    problems = problems_of(chosen, why, yes=yes)
    if problems:
        raise ConfigurationError(problems)
    settings = settings_of(context, config)
    settings.require("database_url")
    emails, named = awaited(_find(settings, act, chosen))
    if chosen.is_by_filter and not emails:
        typer.echo(f"Nothing that fits can be {act.past}.")
        return 0
    if not yes and sys.stdin.isatty():
        ask(f"{act.value.capitalize()} these {len(emails):,} emails?", named, len(emails))
    return awaited(_operate(settings, act, chosen, emails, why))


async def _find(settings: "Settings", act: "Act", chosen: "Selection") -> "tuple[list[int], list[Chosen]]":
    """Return the emails that the act would change, and the first of them by name."""
    from outbox.operations.email_filter import find, name
    from outbox.operations.retry_cancel import POSSIBLE, RETRIED_BY_DEFAULT, SWEEPING, Act

    condition = (SWEEPING if chosen.is_by_filter else POSSIBLE)[act]
    if chosen.is_by_filter and act is Act.RETRY and not chosen.states:
        chosen = replace(chosen, states=RETRIED_BY_DEFAULT)
    async with connected(settings, f"outbox {act}") as connection:
        emails = await find(connection, chosen, condition)
        return emails, await name(connection, emails[:NAMES_SHOWN])


async def _operate(settings: "Settings", act: "Act", chosen: "Selection", emails: list[int], why: str) -> int:
    from outbox.operations.email_filter import name
    from outbox.operations.operator import whoami
    from outbox.operations.retry_cancel import explain, operate

    async with connected(settings, f"outbox {act}") as connection:
        with Bar(act.value, counted=True) as bar:
            bar.show(total=len(emails))
            done = await operate(
                connection,
                act,
                emails,
                who=whoami(),
                why=why,
                target=chosen.target,
                progress=lambda count: bar.show(completed=count),
            )
        if chosen.is_by_filter:
            named = [one.key for one in await name(connection, done[:NAMES_SHOWN])]
            missed = len(emails) - len(done)
            others = [f"{missed:,} emails changed at this moment and were left; run it again."] if missed else []
            return print_outcome(named, len(done), act.past, others)
        wanted = list(dict.fromkeys(chosen.keys))
        there = {one.key for one in await name(connection, done)}
        others = await explain(connection, act, [key for key in wanted if key not in there])
    return print_outcome([key for key in wanted if key in there], len(done), act.past, others + twice(chosen.keys))

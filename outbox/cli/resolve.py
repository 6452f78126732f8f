"""`outbox resolve`: decide about emails that are in doubt, or dead letters."""

import sys
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

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
from outbox.cli.output import NAMES_SHOWN
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from outbox.operations.email_filter import Chosen, Selection
    from outbox.operations.resolve import Decision
    from outbox.settings import Settings


class State(StrEnum):
    """State of a delivery that a person can decide about."""

    IN_DOUBT = "in_doubt"
    DEAD = "dead"


@app.command()
def resolve(
    context: typer.Context,
    keys: KeysArgument = None,
    config: ConfigOption = None,
    *,
    sent: Annotated[bool, typer.Option("--sent", help="It arrived.")] = False,
    resend: Annotated[bool, typer.Option("--resend", help="Send it again, the same bytes.")] = False,
    discard: Annotated[bool, typer.Option("--discard", help="Do not send it.")] = False,
    edition: EditionOption = None,
    report: ReportOption = None,
    period: PeriodOption = None,
    to: ToOption = None,
    state: Annotated[
        State | None,
        typer.Option(
            help="Of those that are not named: what is in doubt (by default), or dead letters.", show_default=False
        ),
    ] = None,
    why: WhyOption = "",
    yes: YesOption = False,
) -> None:
    """Decide about emails that are in doubt, or dead letters.

    Who decided, when and why is kept.
    """
    from outbox.operations.email_filter import Selection
    from outbox.operations.resolve import Decision

    decisions = [d for d, given in zip(Decision, (sent, resend, discard), strict=True) if given]
    states = (state.value,) if state else ()
    chosen = Selection(tuple(keys or ()), edition, report, period, to, states)
    problems = problems_of(chosen, why, yes=yes)
    if len(decisions) != 1:
        problems.append("Say one of --sent, --resend and --discard.")
    if state is State.DEAD and sent:
        problems.append("--state dead: the server refused these, so they cannot be declared sent; say another.")
    if problems:
        raise ConfigurationError(problems)
    settings = settings_of(context, config)
    settings.require("database_url")
    if chosen.is_by_filter:
        raise typer.Exit(_resolve_all(settings, chosen, decisions[0], why, yes=yes))
    raise typer.Exit(_resolve_keys(settings, chosen, decisions[0], why, yes=yes))


def _resolve_keys(settings: "Settings", chosen: "Selection", decision: "Decision", why: str, *, yes: bool) -> int:
    wanted = list(dict.fromkeys(chosen.keys))
    if len(wanted) > 1 and not yes and sys.stdin.isatty():
        touched = awaited(_preview(settings, wanted, decision))
        ask(f"Decide --{decision} about these {len(touched):,} emails?", touched, len(touched))
    decided, others = awaited(_decide(settings, wanted, decision, why))
    return print_outcome(decided, len(decided), decision.value, others + twice(chosen.keys))


def _resolve_all(settings: "Settings", chosen: "Selection", decision: "Decision", why: str, *, yes: bool) -> int:
    state = chosen.states[0] if chosen.states else State.IN_DOUBT.value
    touched = awaited(_preview_all(settings, replace(chosen, states=(state,))))
    if not touched:
        of = replace(chosen, states=()).target or "all"
        typer.echo(f"Nothing of {of} is {state.replace('_', ' ')} and undecided.")
        return 0
    if not yes:
        ask(f"Decide --{decision} about these {len(touched):,} emails?", touched, len(touched))
    keys = [one.key for one in touched]
    decided, others = awaited(_decide(settings, keys, decision, why, target=chosen.target, states=[state]))
    return print_outcome(decided[:NAMES_SHOWN], len(decided), decision.value, others)


async def _preview(settings: "Settings", keys: list[str], decision: "Decision") -> "list[Chosen]":
    from outbox.operations.resolve import of_keys

    async with connected(settings, "outbox resolve") as connection:
        return await of_keys(connection, keys, decision)


async def _preview_all(settings: "Settings", chosen: "Selection") -> "list[Chosen]":
    from outbox.operations.email_filter import find, name
    from outbox.operations.resolve import UNDECIDED

    async with connected(settings, "outbox resolve") as connection:
        return await name(connection, await find(connection, chosen, UNDECIDED))


async def _decide(
    settings: "Settings", keys: list[str], decision: "Decision", why: str, **how: Any
) -> tuple[list[str], list[str]]:
    """Return the keys that are decided now, in the order of `keys`, and a sentence for each of the others."""
    from outbox.operations.resolve import explain
    from outbox.operations.resolve import resolve as decide

    async with connected(settings, "outbox resolve") as connection:
        decided = set(await decide(connection, keys, decision, why=why, **how))
        sentences = await explain(connection, [key for key in keys if key not in decided], decision)
    return [key for key in keys if key in decided], list(sentences.values())

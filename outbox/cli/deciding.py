"""The commands with which a person decides about emails. Who decided, when and why is kept."""

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outbox.cli.frame import NAMES_SHOWN, ConfigOption, app, awaited, connected, printable, settings_of
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from outbox.resolve import Chosen, Decision
    from outbox.settings import Settings


class State(StrEnum):
    """Of which deliveries of an edition a person decides."""

    IN_DOUBT = "in_doubt"
    DEAD = "dead"


@app.command()
def resolve(
    context: typer.Context,
    keys: Annotated[
        list[str] | None,
        typer.Argument(help="Keys as `outbox status` shows them.", metavar="KEY", show_default=False),
    ] = None,
    config: ConfigOption = None,
    *,
    sent: Annotated[bool, typer.Option("--sent", help="It arrived.")] = False,
    resend: Annotated[bool, typer.Option("--resend", help="Send it again, the same bytes.")] = False,
    discard: Annotated[bool, typer.Option("--discard", help="Do not send it.")] = False,
    edition: Annotated[
        str | None,
        typer.Option(help='Instead of keys: all of an edition, such as "progress 2026-W48".', show_default=False),
    ] = None,
    state: Annotated[
        State | None,
        typer.Option(help="Of an edition: what is in doubt (by default), or dead letters.", show_default=False),
    ] = None,
    why: Annotated[
        str, typer.Option(help="Why; kept with the emails. Needed for an edition.", show_default=False)
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Decide about emails that are in doubt, or dead letters.

    Who decided, when and why is kept.
    """
    from outbox.resolve import Decision

    chosen = [d for d, given in zip(Decision, (sent, resend, discard), strict=True) if given]
    faults = _resolve_faults(keys or [], edition, state, why, yes=yes)
    if len(chosen) != 1:
        faults.append("Say one of --sent, --resend and --discard.")
    if state is State.DEAD and sent:
        faults.append("--state dead: the server refused these, so they cannot be declared sent; say another.")
    if faults:
        raise ConfigurationError(faults)
    settings = settings_of(context, config)
    settings.require("database_url")
    if edition is not None:
        raise typer.Exit(_resolve_edition(settings, edition, state or State.IN_DOUBT, chosen[0], why, yes=yes))
    raise typer.Exit(_resolve_keys(settings, keys or [], chosen[0], why, yes=yes))


def _resolve_faults(keys: list[str], edition: str | None, state: State | None, why: str, *, yes: bool) -> list[str]:
    if edition is None:
        missing = [] if keys else ['Name keys, as `outbox status` shows them, or say --edition "progress 2026-W48".']
        return missing + (["--state goes with --edition; take it out."] if state else [])
    faults = ["--edition decides about a whole edition; name keys or say --edition, not both."] if keys else []
    if not why.strip():
        faults.append('--why: say why, as in --why "the mail server\'s log has them all"; it is kept with the emails.')
    if not yes and not sys.stdin.isatty():
        faults.append("--edition decides about many emails at once and nobody can be asked here; add --yes.")
    return faults


def _resolve_keys(settings: "Settings", keys: list[str], decision: "Decision", why: str, *, yes: bool) -> int:
    wanted = list(dict.fromkeys(keys))
    if len(wanted) > 1 and not yes and sys.stdin.isatty():
        touched = awaited(_preview(settings, wanted, decision))
        _ask(touched, decision)
    decided, others = awaited(_decide(settings, wanted, decision, why))
    for key in decided:
        typer.echo(f"{printable(key)}: {decision}")
    others += [f"{key} was named twice; it counts once." for key in wanted if keys.count(key) > 1]
    for sentence in others:
        typer.echo(f"outbox: {printable(sentence)}", err=True)
    return 1 if others else 0


def _resolve_edition(
    settings: "Settings", edition: str, state: State, decision: "Decision", why: str, *, yes: bool
) -> int:
    touched = awaited(_preview_edition(settings, edition, state))
    if not touched:
        typer.echo(f"Nothing of {printable(edition)} is {state.replace('_', ' ')} and undecided.")
        return 0
    if not yes:
        _ask(touched, decision)
    keys = [one.key for one in touched]
    decided, others = awaited(_decide(settings, keys, decision, why, target=edition.strip(), states=[state.value]))
    for key in decided[:NAMES_SHOWN]:
        typer.echo(f"{printable(key)}: {decision}")
    if len(decided) > NAMES_SHOWN:
        typer.echo(f"\N{HORIZONTAL ELLIPSIS} and {len(decided) - NAMES_SHOWN:,} more: {decision}")
    for sentence in others:
        typer.echo(f"outbox: {printable(sentence)}", err=True)
    return 1 if others else 0


def _ask(touched: "list[Chosen]", decision: "Decision") -> None:
    """Return if the person at the terminal agrees."""
    if len(touched) <= 1:
        return
    for one in touched[:NAMES_SHOWN]:
        typer.echo(printable(f"  {one.key} <{one.address}> is {one.state.replace('_', ' ')}"), err=True)
    if len(touched) > NAMES_SHOWN:
        typer.echo(f"  \N{HORIZONTAL ELLIPSIS} and {len(touched) - NAMES_SHOWN:,} more", err=True)
    if not typer.confirm(f"Decide --{decision} about these {len(touched):,} emails?", err=True):
        typer.echo("outbox: Nothing was changed.", err=True)
        raise typer.Exit(1)


async def _preview(settings: "Settings", keys: list[str], decision: "Decision") -> "list[Chosen]":
    from outbox.resolve import of_keys

    async with connected(settings, "outbox resolve") as connection:
        return await of_keys(connection, keys, decision)


async def _preview_edition(settings: "Settings", edition: str, state: State) -> "list[Chosen]":
    from outbox.resolve import of_edition

    async with connected(settings, "outbox resolve") as connection:
        return await of_edition(connection, edition, state.value)


async def _decide(
    settings: "Settings", keys: list[str], decision: "Decision", why: str, **how: Any
) -> tuple[list[str], list[str]]:
    """The keys that are decided now, in the order of `keys`, and a sentence for each of the others."""
    from outbox.resolve import explain
    from outbox.resolve import resolve as decide

    async with connected(settings, "outbox resolve") as connection:
        decided = set(await decide(connection, keys, decision, why=why, **how))
        sentences = await explain(connection, [key for key in keys if key not in decided], decision)
    return [key for key in keys if key in decided], list(sentences.values())

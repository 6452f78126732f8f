"""The commands with which a person decides about emails. Who decided, when and why is kept."""

import sys
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outbox.cli.app import NAMES_SHOWN, Bar, ConfigOption, app, awaited, connected, printable, settings_of
from outbox.cli.email_options import (
    EditionOption,
    KeysArgument,
    PeriodOption,
    ReportOption,
    ToOption,
    WhyOption,
    YesOption,
    ask,
    faults_of,
    tell,
    twice,
)
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from outbox.generate.waiver import Owed
    from outbox.operations.email_filter import Chosen, Selection
    from outbox.operations.resolve import Decision
    from outbox.operations.retry_cancel import Act
    from outbox.settings import Settings


class Retriable(StrEnum):
    """What can be retried, by its state."""

    DEAD = "dead"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    PENDING = "pending"


class State(StrEnum):
    """Of which deliveries a person decides."""

    IN_DOUBT = "in_doubt"
    DEAD = "dead"


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


def _act(context: typer.Context, config: Any, act: "Act", chosen: "Selection", why: str, *, yes: bool) -> int:
    faults = faults_of(chosen, why, yes=yes)
    if faults:
        raise ConfigurationError(faults)
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
    """What an act would touch, and the first of it by name."""
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
    from outbox.operations.resolve import whoami
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
            return tell(named, len(done), act.past, others)
        wanted = list(dict.fromkeys(chosen.keys))
        there = {one.key for one in await name(connection, done)}
        others = await explain(connection, act, [key for key in wanted if key not in there])
    return tell([key for key in wanted if key in there], len(done), act.past, others + twice(chosen.keys))


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
    faults = faults_of(chosen, why, yes=yes)
    if len(decisions) != 1:
        faults.append("Say one of --sent, --resend and --discard.")
    if state is State.DEAD and sent:
        faults.append("--state dead: the server refused these, so they cannot be declared sent; say another.")
    if faults:
        raise ConfigurationError(faults)
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
    return tell(decided, len(decided), decision.value, others + twice(chosen.keys))


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
    return tell(decided[:NAMES_SHOWN], len(decided), decision.value, others)


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
    """The keys that are decided now, in the order of `keys`, and a sentence for each of the others."""
    from outbox.operations.resolve import explain
    from outbox.operations.resolve import resolve as decide

    async with connected(settings, "outbox resolve") as connection:
        decided = set(await decide(connection, keys, decision, why=why, **how))
        sentences = await explain(connection, [key for key in keys if key not in decided], decision)
    return [key for key in keys if key in decided], list(sentences.values())


@app.command()
def waive(
    context: typer.Context,
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            help="REPORT/PERIOD/RECIPIENT, as `outbox status` shows them.", metavar="KEY", show_default=False
        ),
    ] = None,
    config: ConfigOption = None,
    *,
    edition: Annotated[
        str | None,
        typer.Option(
            help='Instead of keys: all without a report in an edition, such as "progress 2026-W48".',
            show_default=False,
        ),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take such a decision back.")] = False,
    why: WhyOption = "",
    yes: YesOption = False,
) -> None:
    """Decide that nothing is owed to a recipient for an edition.

    For recipients whose report cannot be made, or whose email failed: the edition is complete without them, and
    generate makes no report for them. To leave people out for good, correct the recipients query.
    """
    wanted = list(dict.fromkeys(keys or ()))
    faults = _faults_of_waive(wanted, edition, why, undo=undo, yes=yes)
    if faults:
        raise ConfigurationError(faults)
    settings = settings_of(context, config)
    settings.require("database_url")
    raise typer.Exit(awaited(_waive(settings, wanted, edition, why, undo=undo, yes=yes)))


def _faults_of_waive(keys: list[str], edition: str | None, why: str, *, undo: bool, yes: bool) -> list[str]:
    from outbox.generate.waiver import Owed

    if edition is None:
        nothing = 'Name keys, as `outbox status` shows them, or say --edition "progress 2026-W48".'
        wrong = [key for key in keys if Owed.parse(key) is None]
        return [f"{key}: is not REPORT/PERIOD/RECIPIENT, such as progress/2026-W48/42." for key in wrong] or (
            [] if keys else [nothing]
        )
    faults = ["--edition decides about a whole edition; name keys or say --edition, not both."] if keys else []
    if undo:
        faults.append("--undo takes keys; name them.")
    if not why.strip():
        faults.append('--why: say why, as in --why "no longer customers"; it is kept with the decision.')
    if not yes and not sys.stdin.isatty():
        faults.append("--edition decides about many recipients at once and cannot ask here; add --yes.")
    return faults


async def _waive(settings: "Settings", keys: list[str], edition: str | None, why: str, *, undo: bool, yes: bool) -> int:
    from outbox.generate.waiver import Owed, unreached_of
    from outbox.generate.waiver import waive as decide
    from outbox.operations.resolve import whoami

    async with connected(settings, "outbox waive") as connection:
        recipients = [one for one in map(Owed.parse, keys) if one is not None]
        if edition is not None:
            report, _, period = edition.strip().rpartition(" ")
            recipients = await unreached_of(connection, report, period)
            if not recipients:
                typer.echo(f"No recipient of {printable(edition)} is without a report and undecided.")
                return 0
            _confirm_waivers(recipients, yes=yes)
        done, left = await decide(connection, recipients, who=whoami(), why=why, undo=undo)
    keys_done = [one.key for one in done]
    past = "owed again; run `outbox generate` to make the report" if undo else "nothing is owed"
    return tell(keys_done[:NAMES_SHOWN] if edition is not None else keys_done, len(done), past, [
        *left.values(), *twice(keys),
    ])  # fmt: skip


def _confirm_waivers(recipients: "list[Owed]", *, yes: bool) -> None:

    if yes:
        return
    for one in recipients[:NAMES_SHOWN]:
        typer.echo(printable(f"  {one.key}"), err=True)
    if len(recipients) > NAMES_SHOWN:
        typer.echo(f"  \N{HORIZONTAL ELLIPSIS} and {len(recipients) - NAMES_SHOWN:,} more", err=True)
    if not typer.confirm(f"Decide that nothing is owed to these {len(recipients):,} recipients?", err=True):
        typer.echo("outbox: Nothing was changed.", err=True)
        raise typer.Exit(1)

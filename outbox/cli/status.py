"""The commands that show what is going on and change nothing."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from outbox.cli.app import (
    NAMES_SHOWN,
    ConfigOption,
    app,
    awaited,
    connected,
    console,
    printable,
    redirected,
    settings_of,
    to_json,
)
from outbox.cli.pause import said_of

if TYPE_CHECKING:
    from outbox.doctor.finding import Finding
    from outbox.operations.audit import Audit, Unsent
    from outbox.operations.status import Status
    from outbox.settings import Settings

WIDTH_OF_FILES = 1000  # columns: a table that goes to a file or a pipe is not folded
_SELDOM = {"cancelled", "expired"}
_TEXT_COLUMNS = {"host", "route", "report", "period", "version", "since (UTC)"}


@app.command()
def status(
    context: typer.Context,
    config: ConfigOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show what waits, who relays, and what needs a person."""
    settings = settings_of(context, config)
    settings.require("database_url")
    found = awaited(_read_status(settings))
    if as_json:
        typer.echo(to_json({**found.as_json(), "redirect_to": settings.redirect_to}))
    else:
        if settings.redirect_to:
            typer.secho(f"{redirected(settings.redirect_to)}\n", bold=True)
        _print_status(found)


async def _read_status(settings: "Settings") -> "Status":
    from outbox.operations.status import read_status

    async with connected(settings, "outbox status") as connection:
        return await read_status(connection)


def _print_status(found: "Status") -> None:
    from rich.table import Table

    is_terminal = sys.stdout.isatty()
    screen = console(highlight=False, soft_wrap=not is_terminal, width=None if is_terminal else WIDTH_OF_FILES)

    def table(title: str, *columns: str) -> Table:
        made = Table(
            title=title,
            title_justify="left",
            box=None,
            pad_edge=False,
            title_style="bold",
            header_style="dim",
        )
        for column in columns:
            made.add_column(
                column,
                justify="left" if column in _TEXT_COLUMNS else "right",
                overflow="fold",
                no_wrap=column == "period",
            )
        return made

    shown = {state: n for state, n in found.counts.items() if n or state not in _SELDOM}
    counts = table("deliveries", *shown)
    counts.add_row(*(f"{n}" for n in shown.values()))
    screen.print(counts)
    if found.oldest_due_s:
        screen.print(f"The oldest has been due for {found.oldest_due_s:.0f} s.")
    route = ["route"] if any(r.route for r in found.relays) else []
    columns = ("relay", *route, "host", "pid", "version", "since (UTC)", "in hand")
    relays = table(f"\nrelays alive: {len(found.relays)}", *columns)
    for r in found.relays:
        own = [r.route or "usual"] if route else []
        since = f"{r.started_at:%Y-%m-%d %H:%M:%S}"
        relays.add_row(str(r.id), *own, r.host, str(r.pid), r.version, since, str(r.in_hand))
    screen.print(relays if found.relays else "\nNo relay is alive: start `outbox relay`.")
    for line in _hindrances(found):
        screen.print(line, markup=False)
    if found.editions:
        seldom = {
            "in doubt": [e.in_doubt for e in found.editions],
            "cancelled": [e.cancelled for e in found.editions],
            "missing": [e.missing for e in found.editions],
            "waived": [e.waived for e in found.editions],
            "suppressed": [e.suppressed for e in found.editions],
            "bounced": [e.bounced for e in found.editions],
            "for a digest": [e.collected for e in found.editions],
        }
        further = {title: ns for title, ns in seldom.items() if any(ns)}
        editions = table("\neditions", "report", "period", "expected", "made", "sent", "waiting", "failed", *further)
        for at, e in enumerate(found.editions):
            expected = "?" if e.expected is None else str(e.expected)
            row = [e.report, e.period, expected, str(e.made), str(e.sent), str(e.waiting), str(e.failed)]
            editions.add_row(*row, *(str(numbers[at]) for numbers in further.values()))
        screen.print(editions)
    for line in (*_done_elsewhere(found), *_needs(found)):
        screen.print(line, markup=False, soft_wrap=True)  # a command in several lines would be several commands


def _done_elsewhere(found: "Status") -> Iterator[str]:
    """A line for each edition that another system made."""
    for e in found.editions:
        if e.done_elsewhere_at is not None:
            yield printable(f"{e.report} {e.period}: done elsewhere, as declared on {e.done_elsewhere_at:%Y-%m-%d}.")


def _hindrances(found: "Status") -> Iterator[str]:
    """What keeps the fleet from its work."""
    from outbox.generate.schedule_state import times

    for relay in found.relays:
        if relay.trouble:
            yield printable(f"  relay {relay.id} makes no progress: {relay.trouble}")
        if relay.stale:
            yield f"  relay {relay.id}: {relay.stale} verdicts came too late to matter; its log names them."
    for line in said_of(found.pauses):
        yield f"\n{line}"
    for route in found.routes:
        yield f"\nRoute {route.name} has been failing since {route.since:%Y-%m-%d %H:%M:%S} UTC:"
        reason = route.reason.removeprefix(f"{route.name}: ")
        yield printable(f"  {reason}")
        failed = times(route.failures)
        trying = "relays keep trying, and " if found.relays else ""
        yield f"  Failed {failed}; {trying}no email is lost. `outbox doctor` says what to correct."
    for rate in found.limiting_rates:
        yield f"\n{rate.route} takes about {rate.per_s:.3g} emails a second, so the fleet sends no more:"
        yield printable(f"  {rate.said} (at {rate.since:%Y-%m-%d %H:%M:%S} UTC)")
    yield from _deferred(found)
    for unserved in found.unserved:
        yield "\n" + printable(unserved.sentence)
    for schedule in found.schedules:
        yield f"\nThe edition that {schedule.report} was to start at {schedule.tick_at:%Y-%m-%d %H:%M:%S} UTC fails:"
        yield printable(
            f"  {schedule.said} ({times(schedule.failures)}; `outbox schedule` says when it is tried again)"
        )


def _deferred(found: "Status") -> Iterator[str]:
    """A line for each of the most frequent replies that emails wait after."""
    from outbox.operations.deferrals import GROUPS_MAX

    for at, one in enumerate(found.deferrals[:GROUPS_MAX]):
        yield ("" if at else "\n") + printable(one.sentence)
    if len(found.deferrals) > GROUPS_MAX:
        rest = sum(one.count for one in found.deferrals[GROUPS_MAX:])
        yield f"{rest:,} deferred for other reasons; `outbox list --state pending` names them."


def _needs(found: "Status") -> Iterator[str]:
    """What needs a person, and what to type; the last lines say whether anything does."""
    effects: dict[str, dict[str, str]] = {}
    if found.troubles:
        yield "\nThese need a person:"
    for trouble in found.troubles:
        said = f": {trouble.said.rstrip('.')}" if trouble.said else ""
        state = "has no report" if trouble.state == "missing" else f"is {trouble.state.replace('_', ' ')}"
        yield printable(f"  {trouble.key} {state}{said}.")
        for command in (trouble.command, *(choice.command for choice in trouble.choices)):
            yield printable(f"    {command}")
        effects.setdefault(trouble.state, {}).update({choice.name: choice.effect for choice in trouble.choices})
    for state, choices in effects.items():
        yield f"\n{_HEADINGS[state]}:"
        for name, effect in choices.items():
            yield f"  {name:<9}  {effect}"
    yield f"\n{printable(found.attention)}"
    for concern in found.concerns:
        yield printable(f"  {concern.sentence} Fix: {concern.fix}.")


_HEADINGS = {"in_doubt": "In doubt", "dead": "Dead", "expired": "Expired", "missing": "No report"}


@app.command()
def audit(
    context: typer.Context,
    report: Annotated[str, typer.Argument(help="Which report.", metavar="REPORT", show_default=False)],
    period: Annotated[
        str | None,
        typer.Argument(help="Which period, such as 2026-W48; by default the one due now.", metavar="PERIOD"),
    ] = None,
    config: ConfigOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts; names all.")] = False,
    names: Annotated[
        int | None, typer.Option(min=0, help="How many recipients of a kind are named; 10, with --json all.")
    ] = None,
) -> None:
    """Say by name whether all of an edition is sent.

    Exit 0 only if each email is sent, or it is decided that it will not be (suppressed, cancelled, waived). Compares
    who is to get the report now with what was generated and sent, and changes nothing.
    """
    from outbox.operations.audit import audit as look

    settings = settings_of(context, config)
    settings.require("database_url", "reports")
    names_max = names if names is not None or as_json else NAMES_SHOWN
    found = awaited(look(settings, report, period, names_max=names_max))
    if as_json:
        typer.echo(to_json(found.as_json()))
    else:
        _print_audit(found)
    raise typer.Exit(0 if found.is_well else 1)


def _print_audit(found: "Audit") -> None:
    from outbox.operations.audit import BOUNCED, MISSING, SETTLED, spoken

    counts = {"expected": found.expected, "generated": found.generated, "sent": found.sent}
    kinds = {**found.unsent, BOUNCED: found.bounced}
    counts |= {kind: one.count for kind, one in kinds.items() if one.count or kind not in (*SETTLED, BOUNCED)}
    if found.done_elsewhere_at is not None:  # nobody is missing in an edition that another system made
        del kinds[MISSING], counts[MISSING]
    typer.echo(f"{found.name}: " + ", ".join(f"{n:,} {spoken(word)}" for word, n in counts.items()) + ".")
    if found.left:
        typer.echo(f"No longer expected: {found.left:,} who have a report and are not named by the source now.")
    for kind, unsent in kinds.items():
        if unsent.count:
            typer.echo(f"\n{spoken(kind)}: {unsent.count:,}")
        for one in unsent.named:
            typer.echo(printable(f"  {_described(one)}"))
        if unsent.named and unsent.count > len(unsent.named):
            typer.echo(f"  \N{HORIZONTAL ELLIPSIS} and {unsent.count - len(unsent.named):,} more")
    typer.echo(("\n" if found.expected > found.sent or found.bounced.count else "") + found.sentence)


def _described(one: "Unsent") -> str:
    from outbox.operations.audit import spoken

    reasons = [spoken(one.state)] if one.state not in ("missing", "waived") else []
    reasons += [one.said.rstrip(".")] if one.said else []
    return f"{one.key} <{one.address}>" + (f": {', '.join(reasons)}." if reasons else "")


@app.command()
def doctor(
    context: typer.Context,
    config: ConfigOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Check database, mail server and reports; changes nothing."""
    from outbox.doctor.run import examine, has_problem

    settings = settings_of(context, config)
    import logging

    logging.basicConfig(level=logging.CRITICAL)  # what is wrong is said in lines, once
    findings = awaited(examine(settings))
    if as_json:
        checks = [{"check": f.check, "grade": f.grade, "found": f.found, "mend": f.fix} for f in findings]
        typer.echo(to_json({"ok": not has_problem(findings), "checks": checks}))
    else:
        _print_findings(findings)
    raise typer.Exit(1 if has_problem(findings) else 0)


def _print_findings(findings: "list[Finding]") -> None:
    """A line each: folded and coloured on a terminal, whole and plain elsewhere."""
    width = max(len(f.check) for f in findings)
    if not sys.stdout.isatty():
        for f in findings:
            typer.echo(printable(f"{f.grade:<7}  {f.check:<{width}}  {f.sentence}"))
    else:
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid("", "", "", padding=(0, 2))
        colours = {"ok": "green", "note": "yellow", "fault": "bold red", "unknown": "dim"}
        for f in findings:
            grid.add_row(Text(f.grade, colours[f.grade]), Text(printable(f.check)), Text(printable(f.sentence)))
        console(highlight=False).print(grid)
    counts = [sum(f.grade == grade for f in findings) for grade in ("fault", "note", "unknown")]
    typer.echo("{} at fault, {} worth a note, {} not checked, of {}.".format(*counts, len(findings)))

"""`outbox status`: show what waits, the relays that are alive, and what needs a person."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from outbox.cli.app import ConfigOption, app, awaited, connected, settings_of
from outbox.cli.output import console, printable, redirected, to_json
from outbox.cli.pause import describe_pauses

if TYPE_CHECKING:
    from rich.table import Table

    from outbox.operations.status import Status
    from outbox.settings import Settings

WIDTH_OF_FILES: Final = 1000  # columns: a table that goes to a file or a pipe is not folded
_SELDOM: Final = frozenset({"cancelled", "expired"})
_TEXT_COLUMNS: Final = frozenset({"host", "route", "report", "period", "version", "since (UTC)"})
_HEADINGS: Final = {"in_doubt": "In doubt", "dead": "Dead", "expired": "Expired", "missing": "No report"}


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
    is_terminal = sys.stdout.isatty()
    screen = console(highlight=False, soft_wrap=not is_terminal, width=None if is_terminal else WIDTH_OF_FILES)
    screen.print(_deliveries(found))
    if found.oldest_due_s:
        screen.print(f"The oldest has been due for {found.oldest_due_s:.0f} s.")
    screen.print(_relays(found) if found.relays else "\nNo relay is alive: start `outbox relay`.")
    for line in _hindrances(found):
        screen.print(line, markup=False)
    if found.editions:
        screen.print(_editions(found))
    for line in (*_done_elsewhere(found), *_needs(found)):
        screen.print(line, markup=False, soft_wrap=True)  # a command in several lines would be several commands


def _table(title: str, *columns: str) -> "Table":
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold", header_style="dim")
    for column in columns:
        side: Literal["left", "right"] = "left" if column in _TEXT_COLUMNS else "right"
        made.add_column(column, justify=side, overflow="fold", no_wrap=column == "period")
    return made


def _deliveries(found: "Status") -> "Table":
    shown = {state: n for state, n in found.counts.items() if n or state not in _SELDOM}
    made = _table("deliveries", *shown)
    made.add_row(*(f"{n}" for n in shown.values()))
    return made


def _relays(found: "Status") -> "Table":
    route = ["route"] if any(r.route for r in found.relays) else []
    columns = ("relay", *route, "host", "pid", "version", "since (UTC)", "in hand")
    made = _table(f"\nrelays alive: {len(found.relays)}", *columns)
    for r in found.relays:
        own = [r.route or "usual"] if route else []
        since = f"{r.started_at:%Y-%m-%d %H:%M:%S}"
        made.add_row(str(r.id), *own, r.host, str(r.pid), r.version, since, str(found.in_flight.get(r.id, 0)))
    return made


def _editions(found: "Status") -> "Table":
    """Return the table of editions; a column that is zero in all of them is left out."""
    outcomes = [e.outcome for e in found.editions if e.outcome is not None]
    seldom = {
        "in doubt": [one.in_doubt for one in outcomes],
        "cancelled": [one.cancelled for one in outcomes],
        "missing": [one.missing for one in outcomes],
        "waived": [one.waived for one in outcomes],
        "suppressed": [one.suppressed for one in outcomes],
        "bounced": [one.bounced for one in outcomes],
        "for a digest": [one.collected for one in outcomes],
    }
    further = {title: ns for title, ns in seldom.items() if any(ns)}
    made = _table("\neditions", "report", "period", "expected", "made", "sent", "waiting", "failed", *further)
    for at, (e, one) in enumerate(zip(found.editions, outcomes, strict=True)):
        expected = "?" if e.expected is None else str(e.expected)
        row = [e.report, e.period, expected, str(one.made), str(one.sent), str(one.waiting), str(one.failed)]
        made.add_row(*row, *(str(numbers[at]) for numbers in further.values()))
    return made


def _done_elsewhere(found: "Status") -> Iterator[str]:
    """Yield a line for each edition that another system made."""
    for e in found.editions:
        if e.done_elsewhere_at is not None:
            yield printable(f"{e.report} {e.period}: done elsewhere, as declared on {e.done_elsewhere_at:%Y-%m-%d}.")


def _hindrances(found: "Status") -> Iterator[str]:
    """Yield lines about everything that keeps the fleet from sending."""
    from outbox.suggestions import times

    for relay in found.relays:
        if relay.trouble:
            yield printable(f"  relay {relay.id} makes no progress: {relay.trouble}")
        if relay.stale:
            yield f"  relay {relay.id}: {relay.stale} verdicts came too late to matter; its log names them."
    for line in describe_pauses(found.pauses):
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
    """Yield a line for each of the most frequent replies after which emails wait."""
    from outbox.operations.deferrals import GROUPS_MAX

    for at, one in enumerate(found.deferrals[:GROUPS_MAX]):
        yield ("" if at else "\n") + printable(one.sentence)
    if len(found.deferrals) > GROUPS_MAX:
        rest = sum(one.count for one in found.deferrals[GROUPS_MAX:])
        yield f"{rest:,} deferred for other reasons; `outbox list --state pending` names them."


def _needs(found: "Status") -> Iterator[str]:
    """Yield what needs a person, with the commands for it; the last lines are the summary."""
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

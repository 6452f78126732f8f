"""Checks of the fleet: relays, routes, what needs a person, pauses and schedules, as the database shows them."""

from collections.abc import Collection, Iterable, Sequence
from typing import Final

import asyncpg

from outbox.database.connection import LOST_SESSION
from outbox.database.opening import connect
from outbox.database.pause_list import Pause
from outbox.doctor.database import Database
from outbox.doctor.finding import Finding, not_checked, note, ok, problem, problem_of
from outbox.errors import OutboxError
from outbox.generate.schedule_state import Agenda, Latest, Standing, look, scheduled
from outbox.operations.attention import WAITED_MAX_S, Kind
from outbox.operations.deferrals import GROUPS_MAX
from outbox.operations.route_rules import Unserved, difference
from outbox.operations.snapshot import FailingRoute
from outbox.operations.status import RateStatus, Status, read_status
from outbox.settings import Settings
from outbox.suggestions import times

FLEET: Final = ("relays", "route", "deliveries")
SCHEDULES: Final = "schedules"


async def examine_fleet(settings: Settings, database: Database) -> list[Finding]:
    """Return the findings about relays, routes and schedules, and about what needs a person."""
    names = list(scheduled(settings))
    looks = (*FLEET, SCHEDULES) if names else FLEET
    if not database.is_ours:
        return not_checked(looks, database.trouble or "outbox's tables cannot be read")
    assert settings.database_url is not None
    try:
        connection = await connect(settings.database_url, application="outbox doctor")
        try:
            found = await read_status(connection)
            agendas = await look(connection, settings, names, count=1)
            rules = await difference(connection, settings)
        finally:
            await connection.close()
    except OutboxError as error:
        return [problem_of("relays", error)]
    except (asyncpg.PostgresError, *LOST_SESSION) as error:
        return not_checked(looks, str(error) or type(error).__name__)
    assert settings.smtp_url is not None
    return [
        judge_relays(found),
        judge_routes(found.routes, {settings.smtp_url.name, *settings.routes}, relays=len(found.relays)),
        *judge_rules(rules, settings),
        *judge_unserved(found.unserved),
        *judge_rates(found.limiting_rates),
        *judge_deferrals(found),
        judge_deliveries(found),
        *judge_pauses(found.pauses),
        *judge_schedules(agendas),
    ]


def judge_relays(found: Status) -> Finding:
    """Judge the relays. Before the first start there is none, which is no problem until an email waits."""
    alive = len(found.relays)
    troubled = [f"relay {relay.id} on {relay.host}: {relay.trouble}" for relay in found.relays if relay.trouble]
    if troubled:
        return problem("relays", f"{alive} alive, in trouble: {', '.join(troubled)}", "see the log there")
    if alive:
        hosts = ", ".join(sorted({relay.host for relay in found.relays}))
        return ok("relays", f"{alive} alive on {hosts}")
    if found.oldest_due_s > WAITED_MAX_S:
        waited = f"none is alive, and an email has been due for {found.oldest_due_s:.0f} s"
        return problem("relays", waited, "start `outbox relay` on every server")
    return note("relays", "none is alive", "start `outbox relay` on every server")


def judge_rules(differs: str | None, settings: Settings) -> list[Finding]:
    """Judge whether the rules in the database are those of these settings; no finding where there are none."""
    if differs is not None:
        found, _, fix = differs.rpartition("; ")
        return [problem("rules", found, fix)]
    routes = ", ".join(settings.routes)
    return [ok("rules", f"the database has those of these settings, for {routes}")] if routes else []


def judge_unserved(routes: Iterable[Unserved]) -> list[Finding]:
    """Return a problem for each route that emails wait for and no relay serves."""
    return [problem("route", *one.sentence.rstrip(".").split(": ", 1)) for one in routes]


def judge_rates(rates: Iterable[RateStatus]) -> list[Finding]:
    """Return a note for each mail server that takes only so many emails a second."""
    return [
        note(
            "rate",
            f"{one.route} takes about {one.per_s:.3g} emails a second, as found from its reply at "
            f"{one.since:%Y-%m-%d %H:%M:%S} UTC: {one.said}",
            "no action is needed; set `rate` below that to avoid the refusals",
        )
        for one in rates
    ]


def judge_routes(routes: Iterable[FailingRoute], ours: Collection[str], *, relays: int) -> Finding:
    """Judge the routes whose circuit breaker is open. What dead relays found, or of other routes, is history."""
    open_routes = {
        route.name: f"{route.name} since {route.since:%Y-%m-%d %H:%M:%S} UTC, failed {times(route.failures)}: "
        + route.reason.removeprefix(f"{route.name}: ")
        for route in routes
    }
    if relays and (broken := [open_routes[name] for name in open_routes if name in ours]):
        fix = "correct what the reply names, here or at the mail server; relays keep trying"
        return problem("route", f"the fleet waits for {'; '.join(broken)}", fix)
    if open_routes:
        return note(
            "route", f"last known to be in trouble: {'; '.join(open_routes.values())}", "see that a relay is alive"
        )
    return ok("route", "no mail server is known to be in trouble")


OWN_LINES: Final = (Kind.ROUTE, Kind.UNSERVED, Kind.NO_RELAY, Kind.RELAY, Kind.SCHEDULE)


def judge_deliveries(found: Status) -> Finding:
    """Return one finding for all that needs a person (`attention`) and has no finding of its own."""
    concerns = [one for one in found.concerns if one.kind not in OWN_LINES]
    if concerns:
        sentences = " ".join(one.sentence for one in concerns).rstrip(".")
        return problem("deliveries", sentences, "; ".join(dict.fromkeys(one.fix for one in concerns)))
    pending, sent = found.counts["pending"], found.counts["sent"]
    return ok("deliveries", f"nothing is in doubt, failed or without a report, {pending} pending, {sent} sent")


def judge_deferrals(found: Status) -> list[Finding]:
    """Return a note with the most frequent replies that emails wait after; no line where none does."""
    sentences = "; ".join(one.sentence for one in found.deferrals[:GROUPS_MAX])
    fix = "no action is needed if the server takes other emails; they are tried again"
    return [note("deferred", sentences.rstrip("."), fix)] if sentences else []


def judge_pauses(pauses: Iterable[Pause]) -> list[Finding]:
    """Return a note for each pause: it may have been forgotten."""
    return [
        note(
            "pause",
            f"{one.target} is paused since {one.since:%Y-%m-%d %H:%M:%S} UTC by {one.who} ({one.why}), "
            f"{one.waiting:,} emails wait",
            f"`{one.remedy}` lets them go",
        )
        for one in pauses
    ]


def judge_schedules(agendas: Sequence[Agenda]) -> list[Finding]:
    """Return what became of the editions that schedules were to start, and what a relay that is started now does.

    No line where no report has a schedule.
    """
    if not agendas:
        return []
    labels: dict[Standing, list[str]] = {standing: [] for standing in Standing}
    for one in agendas:
        if one.last is not None:
            labels[one.last.standing].append(_label(one, one.last))
    if failing := labels[Standing.FAILING]:
        fix = "correct that; relays try again by themselves, and at once when one is started"
        return [problem(SCHEDULES, "; ".join(failing), fix)]
    if missed := labels[Standing.MISSED]:
        fix = "run `outbox generate` (or `outbox digest`) with `--period` for what is wanted"
        return [note(SCHEDULES, "; ".join(missed), fix)]
    if due := labels[Standing.DUE]:
        fix = "if another system has made one of them, run `outbox mark-done REPORT PERIOD` before a relay starts"
        return [note(SCHEDULES, "; ".join(due), fix)]
    if new := labels[Standing.NEW]:
        return [ok(SCHEDULES, "; ".join(new))]
    ticks = [(one.ticks[0].at, one.name) for one in agendas if one.ticks]
    ahead = f", next {min(ticks)[1]} at {min(ticks)[0]:%Y-%m-%d %H:%M} UTC" if ticks else ""
    return [ok(SCHEDULES, f"{', '.join(one.name for one in agendas)}{ahead}")]


def _label(one: Agenda, last: Latest) -> str:
    edition, row = f"{one.name} {last.tick.period}", last.row
    match last.standing:
        case Standing.FAILING if row is not None:
            return f"{edition} {row.failed}"
        case Standing.MISSED:
            return f"{edition} was not done by {last.until:%Y-%m-%d %H:%M:%S} UTC"
        case Standing.DUE:
            return f"a relay makes {edition} at once, since its schedule ticked at {last.tick.at:%Y-%m-%d %H:%M} UTC"
        case Standing.NEW:
            first = f"with {one.ticks[0].period} at {one.ticks[0].at:%Y-%m-%d %H:%M} UTC" if one.ticks else "never"
            return f"{one.name} is new: relays start {first}, and do not make {last.tick.period}"
        case _:
            return edition

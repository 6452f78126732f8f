"""The corridor of `outbox doctor`: what users get wrong, looked at in the order in which a report travels.

It changes nothing and sends nothing. Each look is a line with its mend; what depends on a line that is at fault says
that it was not looked at.
"""

import asyncio
import resource
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Final, assert_never

import asyncpg

from outbox.database.connection import LOST_SESSION
from outbox.database.opening import connect
from outbox.doctor.database import Database, examine_database
from outbox.doctor.finding import Finding, Grade, fault, fault_of, not_checked, note, ok
from outbox.doctor.lmtp_maildir import examine_lmtp, examine_maildir
from outbox.doctor.reports import examine_reports
from outbox.doctor.smtp import examine_smtp
from outbox.errors import OutboxError
from outbox.generate.run import sender_of
from outbox.generate.schedule_state import Agenda, Latest, Standing, look, scheduled, times
from outbox.mail.verp import TOKEN_MAX
from outbox.operations.attention import WAITED_MAX_S, Kind, RouteStatus
from outbox.operations.deferrals import GROUPS_MAX
from outbox.operations.route_rules import Unserved, difference
from outbox.operations.status import RateStatus, Status, read_status
from outbox.relay.in_doubt import load_resolver
from outbox.relay.pauses import Pause
from outbox.settings import Settings, WhenInDoubt
from outbox.smtp.dkim import load_signer

FILES_BESIDE: Final = 64  # what a process holds open beside its SMTP connections
FLEET: Final = ("relays", "route", "deliveries")
SCHEDULES: Final = "schedules"


async def examine(settings: Settings) -> list[Finding]:
    """Every line, in order; faults of the user's are values here.

    Raises:
        ConfigurationError: a setting that generate or relay needs is not there, or the sender is no address.

    """
    settings.require("database_url", "smtp_url", "sender", "reports")
    sender = sender_of(settings)
    database = await examine_database(settings)
    reports = await examine_reports(settings, database)
    smtp: list[Finding] = []
    for name in ("", *settings.routes):
        found = await examine_server(
            settings.on_route(name),
            sender=sender.address,
            recipient=settings.redirect_to or reports.recipient or sender.address,
            largest_bytes=max(database.largest_bytes, reports.largest_bytes),
        )
        smtp += [replace(one, check=f"{name}.{one.check}") for one in found] if name else found
    fleet = await examine_fleet(settings, database)
    rest = [*look_at_redirect(settings), look_at_doubt(settings), look_at_limits(settings)]
    return [*database.findings, *reports.findings, *smtp, *fleet, *rest]


async def examine_server(settings: Settings, *, sender: str, recipient: str, largest_bytes: int) -> list[Finding]:
    """What can be said of the mail server, or of what stands for one, and of the signature that emails get for it."""
    assert settings.smtp_url is not None
    signature = look_at_dkim(settings, sender)
    if settings.smtp_url.scheme == "file":
        return [*await asyncio.to_thread(examine_maildir, settings.smtp_url), *signature]
    examine = examine_lmtp if settings.smtp_url.scheme == "lmtp" else examine_smtp
    bounces_to = (settings.return_path or sender).replace("{token}", "0" * TOKEN_MAX)
    found = await examine(settings, sender=bounces_to, recipient=recipient, largest_bytes=largest_bytes)
    return [*found, *signature]


def has_fault(findings: Iterable[Finding]) -> bool:
    """Whether a person is needed."""
    return any(finding.grade is Grade.FAULT for finding in findings)


async def examine_fleet(settings: Settings, database: Database) -> list[Finding]:
    """Who relays, what keeps them from it, and what waits for a person."""
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
        return [fault_of("relays", error)]
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
    """Whether somebody sends. Before the first start nobody does, which is no fault until an email waits."""
    alive = len(found.relays)
    said = [f"relay {relay.id} on {relay.host}: {relay.trouble}" for relay in found.relays if relay.trouble]
    if said:
        return fault("relays", f"{alive} alive, in trouble: {', '.join(said)}", "see the log there")
    if alive:
        hosts = ", ".join(sorted({relay.host for relay in found.relays}))
        return ok("relays", f"{alive} alive on {hosts}")
    if found.oldest_due_s > WAITED_MAX_S:
        waited = f"none is alive, and an email has been due for {found.oldest_due_s:.0f} s"
        return fault("relays", waited, "start `outbox relay` on every server")
    return note("relays", "none is alive", "start `outbox relay` on every server")


def judge_rules(differs: str | None, settings: Settings) -> list[Finding]:
    """Whether the rules that count are those of these settings; no line where there are none anywhere."""
    if differs is not None:
        found, _, mend = differs.rpartition("; ")
        return [fault("rules", found, mend)]
    routes = ", ".join(settings.routes)
    return [ok("rules", f"the database has those of these settings, for {routes}")] if routes else []


def judge_unserved(routes: Iterable[Unserved]) -> list[Finding]:
    """What waits for a route that nobody serves, a line each."""
    return [fault("route", *one.sentence.rstrip(".").split(": ", 1)) for one in routes]


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


def judge_routes(routes: Iterable[RouteStatus], ours: Collection[str], *, relays: int) -> Finding:
    """Whether the fleet pauses before a mail server. What dead relays said of it, or of another one, is history."""
    said = {
        route.name: f"{route.name} since {route.since:%Y-%m-%d %H:%M:%S} UTC, failed {times(route.failures)}: "
        + route.reason.removeprefix(f"{route.name}: ")
        for route in routes
    }
    if relays and (broken := [said[name] for name in said if name in ours]):
        mend = "correct what the reply names, here or at the mail server; relays keep trying"
        return fault("route", f"the fleet waits for {'; '.join(broken)}", mend)
    if said:
        return note("route", f"last known to be in trouble: {'; '.join(said.values())}", "see that a relay is alive")
    return ok("route", "no mail server is known to be in trouble")


OWN_LINES: Final = (Kind.ROUTE, Kind.UNSERVED, Kind.NO_RELAY, Kind.RELAY, Kind.SCHEDULE)


def judge_deliveries(found: Status) -> Finding:
    """Return one line for all that needs a person (`attention`) and has no line of its own among the others."""
    concerns = [one for one in found.concerns if one.kind not in OWN_LINES]
    if concerns:
        said = " ".join(one.sentence for one in concerns).rstrip(".")
        return fault("deliveries", said, "; ".join(dict.fromkeys(one.fix for one in concerns)))
    pending, sent = found.counts["pending"], found.counts["sent"]
    return ok("deliveries", f"nothing is in doubt, failed or without a report, {pending} pending, {sent} sent")


def judge_deferrals(found: Status) -> list[Finding]:
    """Return a note with the most frequent replies that emails wait after; no line where none does."""
    said = "; ".join(one.sentence for one in found.deferrals[:GROUPS_MAX])
    fix = "no action is needed if the server takes other emails; they are tried again"
    return [note("deferred", said.rstrip("."), fix)] if said else []


def judge_pauses(pauses: Iterable[Pause]) -> list[Finding]:
    """What people hold back, a line each: somebody may have forgotten it."""
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
    said: dict[Standing, list[str]] = {standing: [] for standing in Standing}
    for one in agendas:
        if one.last is not None:
            said[one.last.standing].append(_spoken(one, one.last))
    if failing := said[Standing.FAILING]:
        mend = "correct that; relays try again by themselves, and at once when one is started"
        return [fault(SCHEDULES, "; ".join(failing), mend)]
    if missed := said[Standing.MISSED]:
        mend = "run `outbox generate` (or `outbox digest`) with `--period` for what is wanted"
        return [note(SCHEDULES, "; ".join(missed), mend)]
    if due := said[Standing.DUE]:
        mend = "if another system has made one of them, run `outbox mark-done REPORT PERIOD` before a relay starts"
        return [note(SCHEDULES, "; ".join(due), mend)]
    if new := said[Standing.NEW]:
        return [ok(SCHEDULES, "; ".join(new))]
    ticks = [(one.ticks[0].at, one.name) for one in agendas if one.ticks]
    ahead = f", next {min(ticks)[1]} at {min(ticks)[0]:%Y-%m-%d %H:%M} UTC" if ticks else ""
    return [ok(SCHEDULES, f"{', '.join(one.name for one in agendas)}{ahead}")]


def _spoken(one: Agenda, last: Latest) -> str:
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


def look_at_dkim(settings: Settings, sender: str) -> list[Finding]:
    """Whether emails can be signed, and what has to stand in the DNS for it; nothing where they are not."""
    if settings.dkim is None:
        return []
    try:
        signer = load_signer(settings.dkim, settings.directory)
    except OutboxError as error:
        return [fault_of("dkim", error)]
    found = f'publish {settings.dkim.record_name} TXT "{signer.record}", if it is not there yet'
    domain = sender.rpartition("@")[2]
    if domain != settings.dkim.domain and not domain.endswith(f".{settings.dkim.domain}"):
        mend = "sign with the domain of sender, or DMARC does not count it (RFC 7489 §3.1.1)"
        return [note("dkim", f"the sender is of {domain}, and {settings.dkim.domain} signs ({found})", mend)]
    return [ok("dkim", f"{settings.dkim.domain} signs; {found}")]


def look_at_redirect(settings: Settings) -> list[Finding]:
    """Whether somebody else gets everybody's mail, which must not be forgotten; nothing where not."""
    if settings.redirect_to is None:
        return []
    found = f"every email goes to {settings.redirect_to}, and none to its recipient"
    return [note("redirect_to", found, "take redirect_to out where people are to get their mail")]


def look_at_doubt(settings: Settings) -> Finding:
    """What happens to an email of which nobody knows whether it arrived, and whether who is asked then can be."""
    match settings.in_doubt:
        case WhenInDoubt.HOLD:
            return ok("in_doubt", "hold: a person decides, with `outbox resolve`")
        case WhenInDoubt.RESEND:
            return ok("in_doubt", "resend: the same bytes go out again, and may arrive twice")
        case WhenInDoubt.ASK:
            assert settings.resolver is not None
            try:
                load_resolver(settings.resolver, settings.directory)
            except OutboxError as error:
                return fault_of("in_doubt", error)
            return ok("in_doubt", f"ask: {settings.resolver} can be asked")
        case _:
            assert_never(settings.in_doubt)


def look_at_limits(settings: Settings) -> Finding:
    """Whether this process may open as many connections as the relay would."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = sum(settings.on_route(name).connections_max for name in ("", *settings.routes))
    return judge_limits(soft if soft != resource.RLIM_INFINITY else None, most)


def judge_limits(files_max: int | None, connections_max: int) -> Finding:
    """Whether the open files suffice; None is no limit."""
    needed = connections_max + FILES_BESIDE
    if files_max is not None and files_max < needed:
        found = f"a process may open {files_max} files, and connections_max = {connections_max} needs {needed}"
        return fault("limits", found, "raise it (ulimit -n, or LimitNOFILE= for systemd), or lower connections_max")
    files = "any number of" if files_max is None else str(files_max)
    return ok("limits", f"a process may open {files} files, connections_max = {connections_max} needs {needed}")

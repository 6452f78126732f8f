"""The command line: reads the settings, wires, prints and sets the exit code. Nothing else does any of these four.

Exit codes: 0 done, 1 not (all) done, 2 the settings or the arguments are wrong. Heavy imports stand inside the
commands that need them, so that cron pays for what it uses.
"""

import gc

gc.set_threshold(20_000)  # before all else: imports make many objects and no garbage, and collecting at 700 costs 50 ms

import os
import re
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

import typer

from outbox.errors import ConfigurationError, OutboxError

if TYPE_CHECKING:
    from datetime import timedelta

    from outbox.audit import Audit, Unsent
    from outbox.finding import Finding
    from outbox.generate import Result
    from outbox.prune import Pruned
    from outbox.resolve import Chosen, Decision
    from outbox.settings import Settings
    from outbox.status import Status

_T = TypeVar("_T")

app = typer.Typer(
    help="One report, one email per person and period, however many servers run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Settings file; else OUTBOX_CONFIG, else ./outbox.toml.", show_default=False),
]


def main() -> None:
    """Run a command; every fault that a user can meet is one sentence on stderr."""
    try:
        app(prog_name="outbox")
    except OutboxError as error:
        for sentence in str(error).splitlines():
            print(f"outbox: {sentence}", file=sys.stderr)  # noqa: T201 - this room prints
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has seen enough
        sys.exit(1)
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("asyncpg", "sqlalchemy"):
            raise  # a fault of ours, to be seen whole
        print(f"outbox: Postgres refuses: {_said(error)}.", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    finally:
        gc.freeze()  # else the interpreter's last collections walk through all that was imported: 100 ms


def _awaited(main: Coroutine[Any, Any, _T]) -> _T:
    """What a coroutine gives."""
    import asyncio

    return asyncio.run(main)


def _as_json(found: Any) -> str:
    """One line for scripts; times as ISO 8601."""
    import json

    return json.dumps(found, default=lambda at: at.isoformat(), ensure_ascii=False)


def _said(error: BaseException) -> str:
    """What Postgres said, without the statement: it may hold people's data."""
    original = getattr(error, "orig", None)
    return str(getattr(original, "__cause__", None) or original or error).splitlines()[0].rstrip(".")


@app.callback(invoke_without_command=True)
def outbox(
    context: typer.Context,
    config: ConfigOption = None,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """One report, one email per person and period, however many servers run it."""
    if version:
        from outbox import __version__

        typer.echo(f"outbox-mail {__version__}")
        raise typer.Exit
    context.obj = config


def _settings(context: typer.Context, config: Path | None) -> "Settings":
    from outbox.settings import load

    return load(config or context.obj)


@app.command()
def init(
    context: typer.Context,
    config: ConfigOption = None,
    redefine: Annotated[
        list[str] | None,
        typer.Option(help="Make this server's cadence, covers and timezone of REPORT the fleet's.", metavar="REPORT"),
    ] = None,
) -> None:
    """Create or upgrade the database's schema.

    Safe on all servers at once, and again.
    """
    settings = _settings(context, config)
    settings.require("database_url")
    for name in redefine or []:
        settings.report(name)
    before, after = _awaited(_initialise(settings, redefine or []))
    if before is None:
        typer.echo(f"The outbox schema is there now, at version {after}.")
    elif before < after:
        typer.echo(f"The outbox schema was upgraded from version {before} to {after}.")
    else:
        typer.echo(f"The outbox schema is at version {after} already.")
    for name in redefine or []:
        report = settings.report(name)
        typer.echo(f"{name} is {report.cadence}, covers {report.covers}, {report.timezone}, for the whole fleet.")


async def _initialise(settings: "Settings", redefine: list[str]) -> tuple[int | None, int]:
    from outbox.database import connect, engine
    from outbox.schema import initialise

    assert settings.database_url is not None
    connection = await connect(settings.database_url, application="outbox init")
    try:
        versions = await initialise(connection)
    finally:
        await connection.close()
    if redefine:
        from outbox import edition

        async with engine(settings.database_url, application="outbox init").connect() as session:
            for name in redefine:
                await edition.redefine(session, name, settings.report(name))
    return versions


@app.command()
def generate(
    context: typer.Context,
    reports: Annotated[
        list[str] | None, typer.Argument(help="Which reports; all by default.", metavar="REPORT")
    ] = None,
    config: ConfigOption = None,
    period: Annotated[
        str | None, typer.Option(help="Which period, such as 2026-W48; by default the one due now.")
    ] = None,
) -> None:
    """Make what is missing of an edition, once for the fleet.

    Each recipient gets a report and an email for the period; run it from cron on every server.
    """
    settings = _settings(context, config)
    settings.require("database_url", "sender", "reports")
    names = reports or list(settings.reports)
    for name in names:
        settings.report(name)
    import logging

    logging.basicConfig(level=logging.WARNING, format="outbox: %(message)s")
    worst = 0
    for name in names:
        try:
            worst = max(worst, _generate_one(settings, name, period))
        except ConfigurationError:
            raise
        except OutboxError as error:
            if len(names) == 1:
                raise
            typer.echo(f"outbox: {error}", err=True)
            worst = max(worst, error.exit_code)
    raise typer.Exit(worst)


def _generate_one(settings: "Settings", name: str, period: str | None) -> int:
    from outbox.generate import generate as make

    with _Bar(name, counted=True) as bar:

        def progress(result: "Result") -> None:
            done = max(result.present, result.made) + len(result.failed)
            bar.show(total=result.expected, completed=done, description=result.edition.name)

        result = _awaited(make(settings, name, period_key=period, progress=progress))
    for key, why in result.failed.items():
        typer.echo(f"outbox: {result.edition.name}, recipient {key}: {why}", err=True)
    typer.echo(
        f"{result.edition.name}: {result.made} made here, {result.elsewhere} elsewhere, "
        f"{len(result.failed)} failed, of {result.expected} recipients."
    )
    return 1 if result.failed else 0


class _Bar:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, title: str, *, counted: bool) -> None:
        self.title = title
        self.counted = counted
        self.bar: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeElapsedColumn,
            )

            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(),
                MofNCompleteColumn() if self.counted else TaskProgressColumn(), TimeElapsedColumn(),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self.bar.start()
            self.line = self.bar.add_task(self.title, total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, **how: Any) -> None:
        """Where it stands: `completed` of `total`."""
        if self.bar is not None:
            self.bar.update(self.line, **how)


@app.command()
def relay(
    context: typer.Context,
    config: ConfigOption = None,
    *,
    until_empty: Annotated[
        bool, typer.Option("--until-empty", help="Exit when nothing is pending or being sent.")
    ] = False,
) -> None:
    """Send what is due; keep one running on every server. SIGTERM finishes what is in hand, twice ends at once."""
    settings = _settings(context, config)
    settings.require("database_url", "smtp_url")
    import logging

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z"
    )
    _run(_relay(settings, until_empty=until_empty))


async def _relay(settings: "Settings", *, until_empty: bool) -> None:
    import asyncio
    import logging
    import signal

    from outbox.relay import Relay

    sender = Relay(settings, until_empty=until_empty)

    def stop(signum: int) -> None:
        if sender.stopping:
            # What is past its dot stays marked: another relay finds it in doubt, as after a crash.
            os._exit(128 + signum)
        logging.getLogger("outbox.relay").info(
            "stopping: what is in hand is finished first, for %g s", settings.drain_s
        )
        sender.stop()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop, signum)
    await sender.run()
    if sender.left_in_doubt:
        raise OutboxError(
            f"The relay had to stop before everything was answered and written (drain_s), so {sender.left_in_doubt} "
            "of its emails may be in doubt; `outbox status` names those that are."
        )


def _run(main: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop where it is installed: it halves the CPU per message."""
    try:
        import uvloop
    except ImportError:
        _awaited(main)
    else:
        uvloop.run(main)


@app.command()
def status(
    context: typer.Context,
    config: ConfigOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show what waits, who relays, and what needs a person."""
    settings = _settings(context, config)
    settings.require("database_url")
    found = _awaited(_read_status(settings))
    if as_json:
        typer.echo(_as_json(found.as_json()))
    else:
        _print_status(found)


async def _read_status(settings: "Settings") -> "Status":
    from outbox.status import read_status

    async with _connected(settings, "outbox status") as connection:
        return await read_status(connection)


@asynccontextmanager
async def _connected(settings: "Settings", application: str) -> AsyncIterator[Any]:
    """A connection to a database whose schema is this code's."""
    from outbox.database import connect
    from outbox.schema import require_current

    assert settings.database_url is not None
    connection = await connect(settings.database_url, application=application)
    try:
        await require_current(connection)
        yield connection
    finally:
        await connection.close()


def _print_status(found: "Status") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())

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
            made.add_column(column, justify="left" if column in _TEXT_COLUMNS else "right", overflow="fold")
        return made

    shown = {state: n for state, n in found.counts.items() if n or state not in _SELDOM}
    counts = table("deliveries", *shown)
    counts.add_row(*(f"{n}" for n in shown.values()))
    console.print(counts)
    if found.oldest_due_s:
        console.print(f"The oldest has been due for {found.oldest_due_s:.0f} s.")
    relays = table(f"\nrelays alive: {len(found.relays)}", "relay", "host", "pid", "version", "since (UTC)", "in hand")
    for r in found.relays:
        relays.add_row(str(r.id), r.host, str(r.pid), r.version, f"{r.started_at:%Y-%m-%d %H:%M:%S}", str(r.in_hand))
    console.print(relays if found.relays else "\nNo relay is alive: start `outbox relay`.")
    for line in _hindrances(found):
        console.print(line, markup=False)
    if found.editions:
        editions = table("\neditions", "report", "period", "expected", "made", "sent", "not sent")
        for e in found.editions:
            expected = "?" if e.expected is None else str(e.expected)
            editions.add_row(e.report, e.period, expected, str(e.made), str(e.sent), str(e.not_sent))
        console.print(editions)
    for line in _needs(found):
        console.print(line, markup=False)


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
    """Say by name whether all of an edition is sent; exit 0 only then.

    Compares who is to get the report now with what was generated and sent, and changes nothing.
    """
    from outbox.audit import audit as look

    settings = _settings(context, config)
    settings.require("database_url", "reports")
    names_max = names if names is not None or as_json else NAMES_SHOWN
    found = _awaited(look(settings, report, period, names_max=names_max))
    if as_json:
        typer.echo(_as_json(found.as_json()))
    else:
        _print_audit(found)
    raise typer.Exit(0 if found.is_well else 1)


NAMES_SHOWN = 10


def _print_audit(found: "Audit") -> None:
    from outbox.audit import spoken

    counts = {"expected": found.expected, "generated": found.generated, "sent": found.sent}
    counts |= {kind: unsent.count for kind, unsent in found.unsent.items()}
    typer.echo(f"{found.name}: " + ", ".join(f"{n:,} {spoken(word)}" for word, n in counts.items()) + ".")
    if found.left:
        typer.echo(f"No longer expected: {found.left:,} who have a report and are not named by the source now.")
    for kind, unsent in found.unsent.items():
        if unsent.count:
            typer.echo(f"\n{spoken(kind)}: {unsent.count:,}")
        for one in unsent.named:
            typer.echo(_printable(f"  {_described(one)}"))
        if unsent.named and unsent.count > len(unsent.named):
            typer.echo(f"  \N{HORIZONTAL ELLIPSIS} and {unsent.count - len(unsent.named):,} more")
    typer.echo(("\n" if found.expected > found.sent else "") + found.sentence)


def _described(one: "Unsent") -> str:
    from outbox.audit import spoken

    reasons = [spoken(one.state)] if one.state != "missing" else []
    reasons += [one.said.rstrip(".")] if one.said else []
    return f"{one.key} <{one.address}>" + (f": {', '.join(reasons)}." if reasons else "")


def _hindrances(found: "Status") -> Iterator[str]:
    """What keeps the fleet from its work."""
    for relay in found.relays:
        if relay.trouble:
            yield _printable(f"  relay {relay.id} makes no progress: {relay.trouble}")
        if relay.stale:
            yield f"  relay {relay.id}: {relay.stale} verdicts came too late to matter; its log names them."
    for route in found.routes:
        yield f"\nThe way to {route.name} is in trouble since {route.since:%Y-%m-%d %H:%M:%S} UTC:"
        yield _printable(f"  {route.reason} ({route.failures} tries; it is tried again all the time)")


def _needs(found: "Status") -> Iterator[str]:
    """What waits for a person, and what to type."""
    if not found.troubles:
        return
    yield "\nThese need a person:"
    for trouble in found.troubles:
        said = f": {trouble.said.rstrip('.')}" if trouble.said else ""
        yield _printable(f"  {trouble.key} is {trouble.state.replace('_', ' ')}{said}.")
        yield _printable(f"    {trouble.command}")
    yield (
        "\n--sent says that it arrived, --resend sends the same bytes again, --discard lets it be;"
        " a dead letter cannot be --sent."
    )


def _printable(line: str) -> str:
    """The line without what a terminal would obey: keys and replies come from outside."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", line)


_SELDOM = {"cancelled", "expired"}
_TEXT_COLUMNS = {"host", "report", "period", "version", "since (UTC)"}


class State(StrEnum):
    """Of which deliveries of an edition a person decides."""

    IN_DOUBT = "in_doubt"
    DEAD = "dead"


@app.command()
def doctor(
    context: typer.Context,
    config: ConfigOption = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Check database, mail server and reports; changes nothing."""
    from outbox.doctor import examine, has_fault

    settings = _settings(context, config)
    import logging

    logging.basicConfig(level=logging.CRITICAL)  # what is wrong is said in lines, once
    findings = _awaited(examine(settings))
    if as_json:
        checks = [{"check": f.check, "grade": f.grade, "found": f.found, "mend": f.mend} for f in findings]
        typer.echo(_as_json({"ok": not has_fault(findings), "checks": checks}))
    else:
        _print_findings(findings)
    raise typer.Exit(1 if has_fault(findings) else 0)


def _print_findings(findings: "list[Finding]") -> None:
    """A line each: folded and coloured on a terminal, whole and plain elsewhere."""
    width = max(len(f.check) for f in findings)
    if not sys.stdout.isatty():
        for f in findings:
            typer.echo(_printable(f"{f.grade:<7}  {f.check:<{width}}  {f.sentence}"))
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid("", "", "", padding=(0, 2))
        colours = {"ok": "green", "note": "yellow", "fault": "bold red", "unknown": "dim"}
        for f in findings:
            grid.add_row(Text(f.grade, colours[f.grade]), Text(_printable(f.check)), Text(_printable(f.sentence)))
        Console(highlight=False).print(grid)
    counts = [sum(f.grade == grade for f in findings) for grade in ("fault", "note", "unknown")]
    typer.echo("{} at fault, {} worth a note, {} not checked, of {}.".format(*counts, len(findings)))


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
    settings = _settings(context, config)
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
        touched = _awaited(_preview(settings, wanted, decision))
        _ask(touched, decision)
    decided, others = _awaited(_decide(settings, wanted, decision, why))
    for key in decided:
        typer.echo(f"{_printable(key)}: {decision}")
    others += [f"{key} was named twice; it counts once." for key in wanted if keys.count(key) > 1]
    for sentence in others:
        typer.echo(f"outbox: {_printable(sentence)}", err=True)
    return 1 if others else 0


def _resolve_edition(
    settings: "Settings", edition: str, state: State, decision: "Decision", why: str, *, yes: bool
) -> int:
    touched = _awaited(_preview_edition(settings, edition, state))
    if not touched:
        typer.echo(f"Nothing of {_printable(edition)} is {state.replace('_', ' ')} and undecided.")
        return 0
    if not yes:
        _ask(touched, decision)
    keys = [one.key for one in touched]
    decided, others = _awaited(_decide(settings, keys, decision, why, target=edition.strip(), states=[state.value]))
    for key in decided[:NAMES_SHOWN]:
        typer.echo(f"{_printable(key)}: {decision}")
    if len(decided) > NAMES_SHOWN:
        typer.echo(f"\N{HORIZONTAL ELLIPSIS} and {len(decided) - NAMES_SHOWN:,} more: {decision}")
    for sentence in others:
        typer.echo(f"outbox: {_printable(sentence)}", err=True)
    return 1 if others else 0


def _ask(touched: "list[Chosen]", decision: "Decision") -> None:
    """Return if the person at the terminal agrees."""
    if len(touched) <= 1:
        return
    for one in touched[:NAMES_SHOWN]:
        typer.echo(_printable(f"  {one.key} <{one.address}> is {one.state.replace('_', ' ')}"), err=True)
    if len(touched) > NAMES_SHOWN:
        typer.echo(f"  \N{HORIZONTAL ELLIPSIS} and {len(touched) - NAMES_SHOWN:,} more", err=True)
    if not typer.confirm(f"Decide --{decision} about these {len(touched):,} emails?", err=True):
        typer.echo("outbox: Nothing was changed.", err=True)
        raise typer.Exit(1)


async def _preview(settings: "Settings", keys: list[str], decision: "Decision") -> "list[Chosen]":
    from outbox.resolve import of_keys

    async with _connected(settings, "outbox resolve") as connection:
        return await of_keys(connection, keys, decision)


async def _preview_edition(settings: "Settings", edition: str, state: State) -> "list[Chosen]":
    from outbox.resolve import of_edition

    async with _connected(settings, "outbox resolve") as connection:
        return await of_edition(connection, edition, state.value)


async def _decide(
    settings: "Settings", keys: list[str], decision: "Decision", why: str, **how: Any
) -> tuple[list[str], list[str]]:
    """The keys that are decided now, in the order of `keys`, and a sentence for each of the others."""
    from outbox.resolve import explain
    from outbox.resolve import resolve as decide

    async with _connected(settings, "outbox resolve") as connection:
        decided = set(await decide(connection, keys, decision, why=why, **how))
        sentences = await explain(connection, [key for key in keys if key not in decided], decision)
    return [key for key in keys if key in decided], list(sentences.values())


@app.command()
def prune(
    context: typer.Context,
    keep: Annotated[
        str, typer.Option(help="What is older goes: 400d, 52w, 48h; at least 1d.", metavar="TIME", show_default=False)
    ],
    config: ConfigOption = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Remove the bodies, trails and pages of old, settled emails.

    Their rows stay, so an old edition that is generated again sends nothing. Relays may run; so may cron run this.
    """
    from outbox.prune import keep_of

    kept = keep_of(keep)
    settings = _settings(context, config)
    settings.require("database_url")
    found, signum = _awaited(_prune(settings, kept, dry_run=dry_run))
    if as_json:
        whole = {**found.as_json(), "dry_run": dry_run, "stopped": signum is not None}
        typer.echo(_as_json(whole))
    else:
        _print_pruned(found, dry_run=dry_run, stopped=signum is not None)
    raise typer.Exit(0 if signum is None else 128 + signum)


async def _prune(settings: "Settings", keep: "timedelta", *, dry_run: bool) -> "tuple[Pruned, int | None]":
    """What went, and the signal that ended it early. A second signal ends at once, which harms nothing either."""
    import asyncio
    import signal

    from outbox.prune import prune as remove

    assert settings.database_url is not None
    stop = asyncio.Event()
    heard: list[int] = []

    def end(signum: int) -> None:
        if heard:
            os._exit(128 + signum)
        heard.append(signum)
        stop.set()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, end, signum)
    with _Bar("pruning", counted=False) as bar:

        def progress(found: "Pruned") -> None:
            description = f"pruning {'pages' if found.walking == 'report' else 'emails'}"
            bar.show(total=1.0, completed=found.share, description=description)

        found = await remove(settings.database_url, keep, dry_run=dry_run, stop=stop, progress=progress)
    return found, heard[0] if heard else None


def _print_pruned(found: "Pruned", *, dry_run: bool, stopped: bool) -> None:
    line = (
        f"{'Would prune' if dry_run else 'Pruned'} {found.emails:,} emails, {found.attempts:,} attempts and "
        f"{found.pages:,} pages from before {found.before:%Y-%m-%d %H:%M:%S} UTC"
    )
    if found.unsettled:
        line += f"; {found.unsettled:,} emails stay that are not settled"
    typer.echo(line + ("; stopped early, run it again to go on." if stopped else "."))


@app.command()
def demo(
    people: Annotated[int, typer.Option(min=1, max=5000, help="How many people get a report.")] = 40,
    servers: Annotated[int, typer.Option(min=1, max=16, help="How many servers fire their cron at once.")] = 4,
    keep: Annotated[
        Path | None, typer.Option(help="Keep the emails and reports in this directory.", metavar="DIR")
    ] = None,
) -> None:
    """Tell the whole story in a minute.

    On an embedded Postgres and mail server; one of the company's servers is killed on the way.
    """
    from outbox.demo import tell

    raise typer.Exit(tell(people=people, servers=servers, keep=keep))

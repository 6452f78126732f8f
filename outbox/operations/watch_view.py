"""Screen of `outbox watch`: a snapshot as rows of text with bars. It reads nothing and prints nothing."""

from collections.abc import Iterator
from datetime import UTC
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from outbox.mail.delivery_state import DeliveryState
from outbox.operations.attention import concerns_of, headline
from outbox.operations.snapshot import Edition, EditionOutcome, Snapshot
from outbox.operations.watch import Rates
from outbox.operations.wording import Frame, Level, duration_label, progress_of, rate_label, reasons
from outbox.reports.period import spoken_time
from outbox.suggestions import word

BAR: Final = 30
SETTLED: Final = (DeliveryState.SENT, DeliveryState.DEAD, DeliveryState.EXPIRED, DeliveryState.CANCELLED)
STALE_S: Final = 3.0  # what is older says how old it is
SENT, WAITING, FAILED, DECIDED, MISSING = "█", "▒", "!", "-", "·"
COLOURS: Final = {Level.BAD: "red", Level.WARN: "yellow", Level.PLAIN: "", Level.SOFT: "dim"}
STYLES: Final = {SENT: "green", WAITING: "yellow", FAILED: "red", DECIDED: "dim", MISSING: "dim"}
LEGEND: Final = (
    f"{SENT} sent  {WAITING} waiting  {FAILED} failed: dead or expired  {DECIDED} cancelled, waived or suppressed  "
    f"{MISSING} no report"
)


def draw(
    snapshot: Snapshot | None,
    rates: Rates,
    frame: Frame,
    *,
    age_s: float = 0.0,
    waited_s: float = 0.0,
    trouble: str | None = None,
) -> RenderableType:
    """Return the whole screen.

    `age_s` is the age of the snapshot, `waited_s` how long Postgres has been asked for the next; `trouble` is why there
    is none.
    """
    parts: list[RenderableType] = [_head(snapshot)]
    if frame.redirect_to:
        line = f"REDIRECTED: every email goes to {frame.redirect_to} (redirect_to), none to its recipient."
        parts.append(Text(line, "bold red"))
    if trouble is not None:
        seen = "" if snapshot is None else f" What follows is {duration_label(age_s)} old."
        parts.append(Text(_printable(f"No answer: {trouble.rstrip('.')}. Asking again.{seen}"), "bold red"))
    elif waited_s > STALE_S:
        seen = "" if snapshot is None else f"; this is {duration_label(age_s)} old"
        parts.append(Text(f"Postgres is slow to answer{seen}.", "yellow"))
    if snapshot is not None:
        concerns = concerns_of(snapshot)
        parts.append(Text(_printable(headline(concerns)), "bold red" if concerns else "green"))
        waits = _waits(snapshot, rates, frame)
        parts += [_editions(snapshot, frame), _relays(snapshot, rates), *waits, _settled(snapshot)]
    return Group(*parts)


def _head(snapshot: Snapshot | None) -> Text:
    at = "" if snapshot is None else f"{snapshot.at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return Text.assemble(("outbox watch", "bold"), f"  {at}  ", ("q ends", "dim"))


def _heading(title: str) -> Text:
    return Text(f"\n{title}", "bold")


def _editions(snapshot: Snapshot, frame: Frame) -> RenderableType:
    if not snapshot.editions:
        return _heading("editions: none yet")
    grid = Table.grid(padding=(0, 2))
    for edition in snapshot.editions:
        grid.add_row(
            Text(f"{edition.report} {edition.period}", no_wrap=True),
            bar(edition),
            Text(", ".join(_progress(edition, frame)), overflow="fold"),
        )
    return Group(_heading("editions"), grid, Text(LEGEND, "dim"))


def bar(edition: Edition, width: int = BAR) -> Text:
    """Return an edition as a bar: full of `SENT` only when every report is made and sent, with any failure visible."""
    found = edition.outcome or EditionOutcome()
    decided = found.sent + found.failed + found.suppressed + found.cancelled + found.waived
    total = max(edition.expected or 0, found.made + found.waived, 1)
    counts = (found.sent, found.sent + found.failed, decided, found.made + found.waived)
    ends = [width * count // total for count in counts]
    if found.failed:
        ends[1] = max(ends[1], ends[0] + 1)
    text = Text(no_wrap=True)
    for cell, to in zip((SENT, FAILED, DECIDED, WAITING, MISSING), (*ends, width), strict=True):
        text.append(cell * (to - len(text)), STYLES[cell])
    return text


def _progress(edition: Edition, frame: Frame) -> Iterator[str]:
    expected = "?" if edition.expected is None else f"{edition.expected:,}"
    found = edition.outcome
    if found is None:
        yield f"{expected} expected, not counted"
    else:
        yield f"{found.sent:,} of {expected} sent"
        if found.made != edition.expected:
            yield f"{found.made:,} made"
        yield from (f"{count:,} {word}" for count, word in progress_of(found))
    if edition.done_elsewhere_at is not None:
        yield f"done elsewhere, as declared {spoken_time(edition.done_elsewhere_at, frame.zone(edition.report))}"
    elif edition.completed_at is not None:
        yield f"complete {spoken_time(edition.completed_at, frame.zone(edition.report))}"


def _relays(snapshot: Snapshot, rates: Rates) -> RenderableType:
    if not snapshot.relays:
        return Group(_heading("relays alive: none"), Text("Start `outbox relay` on every server.", "yellow"))
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    route = ["route"] if any(relay.route for relay in snapshot.relays) else []
    for title in ("relay", *route, "host", "pid", "sent", "/s", "in hand"):
        table.add_column(title, justify="left" if title in ("route", "host") else "right", no_wrap=True)
    table.add_column("last reply", overflow="ellipsis", no_wrap=True, ratio=1)
    for relay in snapshot.relays:
        in_hand = "?" if snapshot.waiting is None else f"{snapshot.waiting.in_flight.get(relay.id, 0):,}"
        own = [_printable(relay.route or "usual")] if route else []
        table.add_row(
            str(relay.id), *own, _printable(relay.host), str(relay.pid), f"{relay.sent:,}",
            rate_label(rates.per_s(relay.id)), in_hand, Text(_printable(relay.last_reply or "")),
        )  # fmt: skip
    return Group(_heading(f"relays alive: {len(snapshot.relays)}"), table)


def _waits(snapshot: Snapshot, rates: Rates, frame: Frame) -> list[RenderableType]:
    found = reasons(snapshot, frame, per_s=rates.total_per_s())
    lines = [Text(_printable(line), COLOURS[level]) for line, level in found]
    if snapshot.in_doubt:
        keys = ", ".join(map(word, snapshot.in_doubt))
        lines.append(Text(_printable(f"In doubt (see `outbox show KEY`): {keys}"), "red"))
    return [_heading("what waits, and why" if lines else "nothing waits"), *lines]


def _settled(snapshot: Snapshot) -> RenderableType:
    if snapshot.settled is None or snapshot.settled_at is None:
        return Text("")
    age_s = (snapshot.at - snapshot.settled_at).total_seconds()
    counts = {state: snapshot.settled.get(state, 0) for state in SETTLED}
    said = ", ".join(f"{n:,} {state}" for state, n in counts.items() if n or state in SETTLED[:2])
    old = f" (counted {duration_label(age_s)} ago)" if age_s > STALE_S else ""
    return Group(_heading("settled in all"), Text(f"{said}{old}"))


def _printable(line: str) -> str:
    """Return the line without control characters: replies, keys and reasons come from outside."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)

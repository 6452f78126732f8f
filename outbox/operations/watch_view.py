"""Screen of `outbox watch`: what was seen, as rows of text with bars. It reads nothing and prints nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC
from typing import Final
from zoneinfo import ZoneInfo

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from outbox.operations.attention import headline
from outbox.operations.deferrals import GROUPS_MAX
from outbox.operations.watch import EditionSeen, Look, PauseSeen, Rates
from outbox.reports.period import spoken_time
from outbox.settings import Settings
from outbox.suggestions import word

BAR: Final = 30
STALE_S: Final = 3.0  # what is older says how old it is
SENT, WAITING, FAILED, DECIDED, MISSING = "█", "▒", "!", "-", "·"
STYLES: Final = {SENT: "green", WAITING: "yellow", FAILED: "red", DECIDED: "dim", MISSING: "dim"}
LEGEND: Final = (
    f"{SENT} sent  {WAITING} waiting  {FAILED} failed: dead or expired  {DECIDED} cancelled, waived or suppressed  "
    f"{MISSING} no report"
)


@dataclass(frozen=True, slots=True)
class Frame:
    """What the settings say of what is seen: the zones of reports, limits, and to whom all mail is redirected."""

    zones: Mapping[str, ZoneInfo] = field(default_factory=dict)
    rate: str | None = None
    daily_max: int | None = None
    redirect_to: str | None = None

    @classmethod
    def of(cls, settings: Settings) -> "Frame":
        """As these settings say."""
        zones = {name: report.zone for name, report in settings.editions.items()}
        return cls(zones, settings.rate, settings.daily_max, settings.redirect_to)

    def zone(self, report: str) -> ZoneInfo | None:
        """The report's zone; for the whole fleet (`""`) that of all reports, if they have one in common."""
        if report in self.zones:
            return self.zones[report]
        zones = set(self.zones.values())
        return zones.pop() if len(zones) == 1 else None


def draw(
    look: Look | None,
    rates: Rates,
    frame: Frame,
    *,
    age_s: float = 0.0,
    waited_s: float = 0.0,
    trouble: str | None = None,
) -> RenderableType:
    """The whole screen. `age_s` is how long ago the look was, `waited_s` how long Postgres has been asked for the next;
    `trouble` is why there is none.
    """
    parts: list[RenderableType] = [_head(look)]
    if frame.redirect_to:
        line = f"REDIRECTED: every email goes to {frame.redirect_to} (redirect_to), none to its recipient."
        parts.append(Text(line, "bold red"))
    if trouble is not None:
        seen = "" if look is None else f" What follows is {spoken_s(age_s)} old."
        parts.append(Text(_printable(f"No answer: {trouble.rstrip('.')}. Asking again.{seen}"), "bold red"))
    elif waited_s > STALE_S:
        seen = "" if look is None else f"; this is {spoken_s(age_s)} old"
        parts.append(Text(f"Postgres is slow to answer{seen}.", "yellow"))
    if look is not None:
        parts.append(Text(_printable(headline(look.concerns)), "bold red" if look.concerns else "green"))
        parts += [_editions(look, frame), _relays(look, rates), *_waits(look, rates, frame), _settled(look)]
    return Group(*parts)


def _head(look: Look | None) -> Text:
    at = "" if look is None else f"{look.at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return Text.assemble(("outbox watch", "bold"), f"  {at}  ", ("q ends", "dim"))


def _heading(title: str) -> Text:
    return Text(f"\n{title}", "bold")


def _editions(look: Look, frame: Frame) -> RenderableType:
    if not look.editions:
        return _heading("editions: none yet")
    grid = Table.grid(padding=(0, 2))
    for edition in look.editions:
        grid.add_row(
            Text(f"{edition.report} {edition.period}", no_wrap=True),
            bar(edition),
            Text(", ".join(_progress(edition, frame)), overflow="fold"),
        )
    return Group(_heading("editions"), grid, Text(LEGEND, "dim"))


def bar(edition: EditionSeen, width: int = BAR) -> Text:
    """Return an edition as a bar: full of `SENT` only when every report is made and sent, with any failure visible."""
    made, sent, failed = edition.made or 0, edition.sent or 0, edition.failed or 0
    waived = edition.waived or 0
    decided = sent + failed + (edition.suppressed or 0) + (edition.cancelled or 0) + waived
    total = max(edition.expected or 0, made + waived, 1)
    ends = [width * count // total for count in (sent, sent + failed, decided, made + waived)]
    if failed:
        ends[1] = max(ends[1], ends[0] + 1)
    text = Text(no_wrap=True)
    for cell, to in zip((SENT, FAILED, DECIDED, WAITING, MISSING), (*ends, width), strict=True):
        text.append(cell * (to - len(text)), STYLES[cell])
    return text


def progress_of(edition: EditionSeen) -> Iterator[tuple[int, str]]:
    """Yield each count of an edition that is not zero, beside those that are always shown, with its word."""
    counts = (
        (edition.waiting, "waiting"), (edition.collected, "for a digest"), (edition.in_doubt, "in doubt"),
        (edition.failed, "failed"), (edition.missing, "without a report"), (edition.cancelled, "cancelled"),
        (edition.waived, "waived"), (edition.suppressed, "suppressed"),
    )  # fmt: skip
    yield from ((count, word) for count, word in counts if count)


def _progress(edition: EditionSeen, frame: Frame) -> Iterator[str]:
    expected = "?" if edition.expected is None else f"{edition.expected:,}"
    if edition.made is None or edition.sent is None:
        yield f"{expected} expected, not counted"
    else:
        yield f"{edition.sent:,} of {expected} sent"
        if edition.made != edition.expected:
            yield f"{edition.made:,} made"
        yield from (f"{count:,} {word}" for count, word in progress_of(edition))
    if edition.done_elsewhere_at is not None:
        yield f"done elsewhere, as declared {spoken_time(edition.done_elsewhere_at, frame.zone(edition.report))}"
    elif edition.completed_at is not None:
        yield f"complete {spoken_time(edition.completed_at, frame.zone(edition.report))}"


def _relays(look: Look, rates: Rates) -> RenderableType:
    if not look.relays:
        return Group(_heading("relays alive: none"), Text("Start `outbox relay` on every server.", "yellow"))
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    route = ["route"] if any(relay.route for relay in look.relays) else []
    for title in ("relay", *route, "host", "pid", "sent", "/s", "in hand"):
        table.add_column(title, justify="left" if title in ("route", "host") else "right", no_wrap=True)
    table.add_column("last reply", overflow="ellipsis", no_wrap=True, ratio=1)
    for relay in look.relays:
        in_hand = "?" if look.open is None else f"{look.open.in_hand.get(relay.id, 0):,}"
        own = [_printable(relay.route or "usual")] if route else []
        table.add_row(
            str(relay.id), *own, _printable(relay.host), str(relay.pid), f"{relay.sent:,}",
            _rate(rates.per_s(relay.id)), in_hand, Text(_printable(relay.last_reply or "")),
        )  # fmt: skip
    return Group(_heading(f"relays alive: {len(look.relays)}"), table)


def _rate(per_s: float | None) -> str:
    return "" if per_s is None else f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.1f}"  # noqa: PLR2004 - two figures


def _waits(look: Look, rates: Rates, frame: Frame) -> list[RenderableType]:
    """What waits and why."""
    lines = [Text(_printable(line), style) for line, style in reasons(look, rates, frame)]
    if look.in_doubt:
        lines.append(
            Text(_printable(f"In doubt (see `outbox show KEY`): {', '.join(map(word, look.in_doubt))}"), "red")
        )
    return [_heading("what waits, and why" if lines else "nothing waits"), *lines]


def reasons(look: Look, rates: Rates, frame: Frame) -> Iterator[tuple[str, str]]:
    """Yield a sentence for each thing that waits or needs a person, with its style: red is for a person."""
    yield from ((f"{one.sentence} Fix: {one.fix}.", "red") for one in look.concerns)
    for pause in look.pauses:
        yield _pause(pause, frame), "yellow"
    yield from ((one.sentence, "yellow") for one in (look.deferrals or [])[:GROUPS_MAX])
    if look.open is None:
        yield "It is not counted: there is too much of it, or this is the first look.", "dim"
    else:
        yield from _counts(look, rates, frame)
    if frame.daily_max is not None and look.given_today is not None:
        yield f"daily_max: {look.given_today:,} of {frame.daily_max:,} in 24 hours", "dim"


def _counts(look: Look, rates: Rates, frame: Frame) -> Iterator[tuple[str, str]]:
    found = look.open
    assert found is not None
    if in_hand := sum(found.in_hand.values()):
        yield f"{in_hand:,} in the hands of relays", ""
    if found.due:
        waited = "" if found.oldest_due_at is None else spoken_s((look.at - found.oldest_due_at).total_seconds())
        limit = f", the rate is {frame.rate}" if frame.rate else ""
        yield f"{found.due:,} due, the oldest for {waited}{limit}{_left(look, rates, found.due + in_hand)}", ""
    if found.put_off:
        until = "" if found.next_at is None else f", the next until {spoken_time(found.next_at, frame.zone(''))}"
        yield f"{found.put_off:,} put off, to be tried again{until}", ""
    for report, n in sorted(found.paused.items()):
        yield f"{n:,} held back by the pause of {report or 'everything'}", "yellow"


def _left(look: Look, rates: Rates, emails: int) -> str:
    """How long so many emails take at the rate of late."""
    per_s = sum(rates.per_s(relay.id) or 0.0 for relay in look.relays)
    return f"; at {_rate(per_s)}/s about {spoken_s(emails / per_s)} more" if per_s > 0 else ""


def _pause(pause: PauseSeen, frame: Frame) -> str:
    why = f": {pause.why}" if pause.why else ""
    since = spoken_time(pause.since, frame.zone(pause.report))
    return f"{pause.report or 'Everything'} is paused since {since} by {pause.who}{why}"


def _settled(look: Look) -> RenderableType:
    if look.settled is None or look.settled_at is None:
        return Text("")
    age_s = (look.at - look.settled_at).total_seconds()
    counts = {state: look.settled.get(state, 0) for state in ("sent", "dead", "expired", "cancelled")}
    said = ", ".join(f"{n:,} {state}" for state, n in counts.items() if n or state in ("sent", "dead"))
    old = f" (counted {spoken_s(age_s)} ago)" if age_s > STALE_S else ""
    return Group(_heading("settled in all"), Text(f"{said}{old}"))


def spoken_s(seconds: float) -> str:
    """A while in words, in its two largest units at most: `45 s`, `3 min`, `2 h 5 min`, `4 d`."""
    minutes = round(max(seconds, 0.0) / 60)
    if seconds < 100:  # noqa: PLR2004 - in seconds as long as they say more
        return f"{max(seconds, 0.0):.0f} s"
    if minutes < 60:  # noqa: PLR2004
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:  # noqa: PLR2004
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d"


def _printable(line: str) -> str:
    """The line without what a terminal would obey: replies, keys and reasons come from outside."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)

"""Overview of the fleet, and live updates of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from outbox.operations.attention import Kind, concerns_of, headline
from outbox.operations.snapshot import Edition, EditionOutcome, Snapshot
from outbox.operations.wording import Frame, duration_label, reasons
from outbox.web.board.auth import User
from outbox.web.board.context import BoardContext
from outbox.web.board.live import NEWEST, Seen
from outbox.web.responses import notice, rendered

BAR: Final = 100.0
STALE_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """State of the fleet in one line. `level` is bad only for what needs a person."""

    level: str
    title: str
    words: str
    path: str = ""
    """Page on which it is decided."""


class Overview:
    """GET / and GET /events."""

    def __init__(self, board: BoardContext) -> None:
        self.board = board

    async def show(self, request: Request, user: User) -> Response:
        """Return the page; without Postgres it says so, and shows the latest facts."""
        parts = self._parts(await self.board.live.fresh())
        return self.board.page(request, "board/overview.html.j2", user, section="/", title="Overview", **parts)

    async def events(self, request: Request, user: User) -> Response:
        """GET /events: stream the live part of the page as it changes, as server-sent events of HTML."""
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        if not self.board.live.streams.has_room(user.key):
            return notice(
                request,
                503,
                "Too many viewers",
                "Live updates are used up; load the page again to see news.",
                Retry_After="30",
            )
        root = request.scope.get("root_path", "")
        stream = self.board.live.events(
            root, user.key, lambda: self.board.authenticator.is_still(user), draw=self.event
        )
        return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    def event(self, root: str) -> dict[str, Any]:
        """Return an event: the live part of the page, and the beginning of its title."""
        parts = self._parts(self.board.live.seen)
        html = rendered("board/live.html.j2", root, **self.board.words, **parts)
        return {"html": html, "title": parts["verdict"].title}

    def _parts(self, seen: Seen) -> dict[str, Any]:
        snapshot, live = seen.snapshot, self.board.live
        frame = Frame.of(self.board.settings)
        parts: dict[str, Any] = {"snapshot": snapshot, "seen": seen, "verdict": verdict(seen), "frame": frame}
        if snapshot is None:
            return parts
        rates = live.watcher.rates
        per_s = rates.total_per_s()
        in_flight = snapshot.waiting.in_flight if snapshot.waiting is not None else {}
        living = {relay.id: relay for relay in snapshot.relays}
        return parts | {
            "reasons": list(reasons(snapshot, frame, per_s=per_s)),
            "bars": [(edition, bar(edition)) for edition in snapshot.editions],
            "fleet": [
                (relay, living.get(relay.id), rates.per_s(relay.id), in_flight.get(relay.id, 0))
                for relay in seen.relays
            ],
            "newest": NEWEST,
            "per_s": per_s,
            "plot": live.hour.plot(snapshot.at),
        }


def bar(edition: Edition) -> list[tuple[str, float, float]]:
    """Return the pieces of an edition's bar: kind, start and width. A failure is visible, however small."""
    found = edition.outcome or EditionOutcome()
    total = max(edition.expected or 0, found.made + found.waived, 1)
    counts = {
        "sent": found.sent, "failed": found.failed, "doubt": found.in_doubt,
        "decided": found.suppressed + found.cancelled + found.waived, "waiting": found.waiting + found.collected,
    }  # fmt: skip
    pieces, at = [], 0.0
    for kind, count in counts.items():
        width = BAR * count / total
        if count > 0:
            width = min(max(width, 0.5 if kind == "waiting" else 1.0), BAR - at)
            pieces.append((kind, at, width))
            at += width
    return pieces


def verdict(seen: Seen) -> Verdict:
    """Return whether a person is needed, and for what first."""
    snapshot = seen.snapshot
    if seen.trouble is not None:
        old = "" if snapshot is None else f" What follows is {duration_label(seen.age_s)} old."
        return Verdict("bad", "No answer from Postgres", f"{seen.trouble.rstrip('.')}.{old} It is asked again.")
    if snapshot is None:
        return Verdict("soft", "Looking", "Postgres has not answered yet.")
    return next(_verdicts(snapshot))


PATHS: Final = {
    Kind.IN_DOUBT: "/emails?state=in_doubt", Kind.FAILED: "/emails?state=dead", Kind.MISSING: "/editions",
    Kind.UNFINISHED: "/editions", Kind.EMPTY: "/editions",
}  # fmt: skip


def _verdicts(snapshot: Snapshot) -> Iterator[Verdict]:
    """Yield what a person should know, the gravest first; the last is that nothing needs a person."""
    concerns, counts = concerns_of(snapshot), snapshot.waiting
    for concern in concerns:
        yield Verdict("bad", concern.title, f"{concern.sentence} Fix: {concern.fix}.", PATHS.get(concern.kind, ""))
    waiting = 0 if counts is None else counts.due + sum(counts.in_flight.values())
    if waiting and not snapshot.relays:
        yield Verdict("bad", "No relay is alive", "Emails are due and no relay sends; start `outbox relay`.")
    if snapshot.pauses:
        what = ", ".join(pause.report or "everything" for pause in snapshot.pauses)
        yield Verdict("warn", "Paused", f"Held back by a person: {what}.", "/pauses")
    if counts is None:
        yield Verdict("soft", "Not counted", "What waits is not counted: this is the first look, or it is too much.")
    yield Verdict("good", "Sending" if waiting else "All is well", headline(concerns))

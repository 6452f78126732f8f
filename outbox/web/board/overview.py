"""How it stands, in one look, and what changes on it as it changes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from outbox.operations.attention import Kind, headline
from outbox.operations.watch import EditionSeen, Look
from outbox.operations.watch_view import Frame, reasons, spoken_s
from outbox.web.board.auth import User
from outbox.web.board.context import Desk
from outbox.web.board.live import NEWEST, Seen
from outbox.web.responses import notice, rendered

BAR: Final = 100.0
STALE_S: Final = 3.0
LEVELS: Final = {"red": "bad", "yellow": "warn", "dim": "soft", "": ""}


@dataclass(frozen=True, slots=True)
class Verdict:
    """All of it in one line. `level` is bad only for what needs a person."""

    level: str
    title: str
    words: str
    path: str = ""
    """Where it is decided."""


class Overview:
    """GET / and GET /events."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        desk.live.draw = self.event

    async def show(self, request: Request, user: User) -> Response:
        """The page; without Postgres it says so, and shows what was seen last."""
        parts = self._parts(await self.desk.live.fresh())
        return self.desk.page(request, "board/overview.html.j2", user, section="/", title="Overview", **parts)

    async def events(self, request: Request, user: User) -> Response:
        """GET /events: the live part of the page as it changes, as server-sent events of HTML."""
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        if not self.desk.live.has_room(user.key):
            return notice(
                request,
                503,
                "Too many viewers",
                "Live updates are used up; load the page again to see news.",
                Retry_After="30",
            )
        stream = self.desk.live.events(
            request.scope.get("root_path", ""), user.key, lambda: self.desk.authenticator.is_still(user)
        )
        return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    def event(self, root: str) -> dict[str, Any]:
        """What an event says: the live part of the page, and what its title begins with."""
        parts = self._parts(self.desk.live.seen)
        html = rendered("board/live.html.j2", root, **self.desk.words, **parts)
        return {"html": html, "title": parts["verdict"].title}

    def _parts(self, seen: Seen) -> dict[str, Any]:
        look, live = seen.look, self.desk.live
        frame = Frame.of(self.desk.settings)
        parts: dict[str, Any] = {"look": look, "seen": seen, "verdict": verdict(seen), "frame": frame}
        if look is None:
            return parts
        rates = live.watcher.rates
        in_hand = look.open.in_hand if look.open is not None else {}
        living = {relay.id: relay for relay in look.relays}
        return parts | {
            "reasons": [(line, LEVELS.get(style, "")) for line, style in reasons(look, rates, frame)],
            "bars": [(edition, bar(edition)) for edition in look.editions],
            "fleet": [
                (relay, living.get(relay.id), rates.per_s(relay.id), in_hand.get(relay.id, 0)) for relay in seen.relays
            ],
            "newest": NEWEST,
            "per_s": sum(rates.per_s(relay.id) or 0.0 for relay in look.relays),
            "plot": live.hour.plot(look.at),
        }


def bar(edition: EditionSeen) -> list[tuple[str, float, float]]:
    """Return the pieces of an edition's bar: kind, start and width. A failure is visible, however small."""
    decided = (edition.suppressed or 0) + (edition.cancelled or 0) + (edition.waived or 0)
    total = max(edition.expected or 0, (edition.made or 0) + (edition.waived or 0), 1)
    counts = {
        "sent": edition.sent or 0, "failed": edition.failed or 0, "doubt": edition.in_doubt or 0, "decided": decided,
        "waiting": (edition.waiting or 0) + (edition.collected or 0),
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
    """Whether a person is needed, and for what first."""
    look = seen.look
    if seen.trouble is not None:
        old = "" if look is None else f" What follows is {spoken_s(seen.age_s)} old."
        return Verdict("bad", "No answer from Postgres", f"{seen.trouble.rstrip('.')}.{old} It is asked again.")
    if look is None:
        return Verdict("soft", "Looking", "Postgres has not answered yet.")
    return next(_concerns(look))


PATHS: Final = {
    Kind.IN_DOUBT: "/emails?state=in_doubt", Kind.FAILED: "/emails?state=dead", Kind.MISSING: "/editions",
    Kind.UNFINISHED: "/editions", Kind.EMPTY: "/editions",
}  # fmt: skip


def _concerns(look: Look) -> Iterator[Verdict]:
    """Yield what a person should know, the gravest first; the last is that nothing needs a person."""
    for concern in look.concerns:
        yield Verdict("bad", concern.title, f"{concern.sentence} Fix: {concern.fix}.", PATHS.get(concern.kind, ""))
    waiting = 0 if look.open is None else look.open.due + sum(look.open.in_hand.values())
    if waiting and not look.relays:
        yield Verdict("bad", "No relay is alive", "Emails are due and no relay sends; start `outbox relay`.")
    if look.pauses:
        what = ", ".join(pause.report or "everything" for pause in look.pauses)
        yield Verdict("warn", "Paused", f"Held back by a person: {what}.", "/pauses")
    if look.open is None:
        yield Verdict("soft", "Not counted", "What waits is not counted: this is the first look, or it is too much.")
    yield Verdict("good", "Sending" if waiting else "All is well", headline(look.concerns))

"""Pages of the list of emails, and of one email with its message."""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from outbox.mail.delivery_state import DeliveryState
from outbox.mail.stored_message import MESSAGE_MAX
from outbox.operations.show import Story, Try, read_story
from outbox.operations.wording import Frame
from outbox.web.board.auth import User
from outbox.web.board.context import BoardContext
from outbox.web.board.message_view import POLICY, Mail, read_mail
from outbox.web.board.search import PAGE, WHERE, Wanted, browse
from outbox.web.responses import bigint, notice

SHOWN_MAX: Final = 200_000  # characters of a text or a source that are put into a page
MESSAGES_AT_ONCE: Final = 2  # that are fetched and read: each takes a few times its size, up to MESSAGE_MAX
STEPS_MAX: Final = 200  # of a timeline, the latest
KEY: Final = "SELECT key, octet_length(message) AS size FROM outbox.email WHERE id = $1"
REPORTS: Final = "SELECT report FROM outbox.definition ORDER BY report LIMIT 200"

GOOD: Final = frozenset({"accepted"})
BAD: Final = frozenset({"refused", "in_doubt", "quarantined", "bounced"})

# Decisions about an email in this state, and about a list of those.
POSSIBLE: Final[Mapping[str, tuple[str, ...]]] = {
    DeliveryState.PENDING: ("retry", "cancel"),
    DeliveryState.IN_DOUBT: ("sent", "resend", "discard"),
    DeliveryState.DEAD: ("retry", "discard"),
    DeliveryState.EXPIRED: ("retry",),
    DeliveryState.CANCELLED: ("retry",),
}


@dataclass(frozen=True, slots=True)
class Step:
    """Line of a timeline."""

    at: datetime | None
    level: str
    title: str
    words: str = ""


class TooLargeMessageError(Exception):
    """Raised if a message has more bytes than the board reads."""


async def too_large_message(request: Request, error: Exception) -> Response:
    """Return the answer to a TooLargeMessageError."""
    words = f"Its message has {error} bytes, more than the board shows. Use `outbox show`."
    return notice(request, 413, "Too large to show", words)


class Emails:
    """GET /emails and below."""

    def __init__(self, board: BoardContext) -> None:
        self.board = board
        self._turns = asyncio.Semaphore(MESSAGES_AT_ONCE)

    async def index(self, request: Request, user: User) -> Response:
        """Return a page of the list, filtered by address, key, reply, state, report and day."""
        wanted = Wanted.of(request.query_params)
        zone = Frame.of(self.board.settings).zone("") or UTC
        async with self.board.store.connection() as connection:
            found = await browse(connection, wanted, zone)
            reports = [row["report"] for row in await connection.fetch(REPORTS)]
        return self.board.page(
            request, "board/emails.html.j2", user, section="/emails", title="Emails",
            wanted=wanted, found=found, reports=reports, where=WHERE, page_max=PAGE, acts=_acts(wanted),
        )  # fmt: skip

    async def story(self, request: Request, user: User) -> Response:
        """GET /emails/N: return all that is known of one email."""
        async with self._turns:
            return await self._shown(request, user)

    async def _shown(self, request: Request, user: User) -> Response:
        email = _id_of(request)
        story = await self._story(email)
        mail = Mail() if story.gone else await read_mail(story.message)
        timeline = list(steps(story))
        response = self.board.page(
            request,
            "board/email.html.j2",
            user,
            section="/emails",
            title=story.subject or story.key,
            email=email,
            story=story,
            steps=timeline[-STEPS_MAX:],
            steps_left_out=max(len(timeline) - STEPS_MAX, 0),
            acts=POSSIBLE.get(story.state, ()),
            text=(mail.text or "")[:SHOWN_MAX],
            has_html=mail.html is not None,
            is_remote=mail.is_remote,
            notes=mail.notes,
            source="" if story.gone else story.message[:SHOWN_MAX].decode("utf-8", "replace"),
        )
        policy = response.headers["Content-Security-Policy"]
        response.headers["Content-Security-Policy"] = f"{policy}; frame-src 'self'"
        return response

    async def html(self, request: Request, _: User) -> Response:
        """GET /emails/N/html: return the HTML of its message, for the frame in its page."""
        async with self._turns:
            story = await self._story(_id_of(request))
            mail = Mail() if story.gone else await read_mail(story.message)
        if mail.html is None:
            raise HTTPException(404)
        return HTMLResponse(mail.html, headers={"Content-Security-Policy": POLICY, "X-Frame-Options": "SAMEORIGIN"})

    async def source(self, request: Request, _: User) -> Response:
        """GET /emails/N/source: return its bytes as a file."""
        email = _id_of(request)
        async with self._turns:
            story = await self._story(email)
        if story.gone:
            raise HTTPException(404)
        name = f'attachment; filename="{email}.eml"'
        return Response(story.message, media_type="message/rfc822", headers={"Content-Disposition": name})

    async def _story(self, email: int) -> Story:
        async with self.board.store.connection() as connection:
            row = await connection.fetchrow(KEY, email)
            if row is None:
                raise HTTPException(404)
            if row["size"] > MESSAGE_MAX:  # of a row from before there was a limit: it would fill this process's memory
                raise TooLargeMessageError(row["size"])
            return await read_story(connection, row["key"])


def _id_of(request: Request) -> int:
    email = bigint(request.path_params["email"])
    if email is None:
        raise HTTPException(404)
    return email


def _acts(wanted: Wanted) -> dict[str, Any]:
    """Return the decisions about all that fits which the commands have, too: by edition, address and state."""
    by_command = not (wanted.since or wanted.until or (wanted.q and wanted.where != "address"))
    is_narrow = bool(wanted.q or wanted.report or wanted.period or wanted.state)
    acts = POSSIBLE.get(wanted.state, ("retry", "cancel") if not wanted.state else ())
    if not by_command or not is_narrow:
        return {"acts": (), "selection": {}}
    if wanted.state == DeliveryState.PENDING:
        acts = ("cancel",) if not wanted.q and not wanted.report and not wanted.period else acts
    to = "" if not wanted.q else wanted.q if "*" in wanted.q else wanted.q + "*"
    said = {"to": to, "report": wanted.report, "period": wanted.period, "state": wanted.state}
    return {"acts": acts, "selection": {name: value for name, value in said.items() if value}}


def steps(story: Story) -> Iterator[Step]:
    """Yield the timeline of an email, from its making on."""
    yield Step(story.created_at, "", "made", f"by {story.made_by}" if story.made_by else "")
    for one in story.tries:
        yield _step(one)
    if story.state == DeliveryState.SENDING:
        yield Step(story.marked_at, "", "being sent", f"by relay {story.relay} on {story.host}")
    elif story.state == DeliveryState.PENDING and story.paused:
        yield Step(None, "warn", "held back", f"{story.paused} is paused")
    elif story.state == DeliveryState.PENDING:
        yield Step(story.due_at, "", "due")


def _step(one: Try) -> Step:
    level = "good" if one.verdict in GOOD else "bad" if one.verdict in BAD else ""
    by = f" by relay {one.relay} on {one.host}" if one.relay is not None else ""
    marked = f", marked {one.marked_at.astimezone(UTC):%H:%M:%S.%f} UTC" if one.marked_at is not None else ""
    title = f"attempt {one.attempt}: {one.verdict.replace('_', ' ')}{by}{marked}"
    return Step(one.settled_at, level, title, one.reply)

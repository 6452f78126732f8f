"""How it stands, in one look; and the board's routes."""

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from outbox.settings import Settings
from outbox.status import read_status
from outbox.web.board.signing import Door, Visitor
from outbox.web.looks import page
from outbox.web.store import Store

SECTIONS: Final = (("/", "Overview"),)
STATES: Final = ("pending", "sending", "sent", "in_doubt", "dead")


class Board:
    """The pages; each asks the store once, and shows what the rooms of the commands give."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings = settings
        self.store = store

    def page(self, request: Request, template: str, visitor: Visitor, *, section: str, **context: Any) -> Response:
        """A page of the board in its frame."""
        frame: dict[str, Any] = {"sections": SECTIONS, "section": section, "read_only": self.settings.web.read_only}
        return page(request, template, visitor=visitor, **frame, **context)

    async def overview(self, request: Request, visitor: Visitor) -> Response:
        """GET /."""
        async with self.store.connection() as connection:
            status = (await read_status(connection)).as_json()
        counts = [(state.replace("_", " "), status[state]) for state in STATES]
        return self.page(request, "board/overview.html.j2", visitor, section="/", title="Overview", counts=counts)


def board_routes(settings: Settings, store: Store, door: Door) -> list[Route]:
    """All that the board answers."""
    board = Board(settings, store)
    return [
        Route("/", door.shown(board.overview)),
        Route("/sign-in", door.enter, methods=["POST"]),
        Route("/sign-out", door.leave, methods=["POST"]),
    ]

"""Routes of the board, each behind the sign-in."""

from starlette.routing import Route

from outbox.settings import Settings
from outbox.web.board.auth import Authenticator
from outbox.web.board.context import BoardContext
from outbox.web.board.decisions import Deciding
from outbox.web.board.editions import Editions
from outbox.web.board.emails import Emails
from outbox.web.board.live import Live
from outbox.web.board.overview import Overview
from outbox.web.queries import Store


def board_routes(settings: Settings, store: Store, authenticator: Authenticator, live: Live) -> list[Route]:
    """Return all that the board answers."""
    shown, decided = authenticator.shown, authenticator.decided
    board = BoardContext(settings, store, authenticator, live)
    overview, editions, emails, deciding = Overview(board), Editions(board), Emails(board), Deciding(board)
    return [
        Route("/", authenticator.linked(shown(overview.show))),
        Route("/events", shown(overview.events)),
        Route("/editions", shown(editions.index)),
        Route("/editions/{edition}", shown(editions.one)),
        Route("/emails", shown(emails.index)),
        Route("/emails/{email}", shown(emails.story)),
        Route("/emails/{email}/html", shown(emails.html)),
        Route("/emails/{email}/source", shown(emails.source)),
        Route("/pauses", shown(editions.pauses)),
        Route("/decisions", shown(editions.decisions)),
        Route("/confirm", decided(deciding.confirm), methods=["POST"]),
        Route("/decide", decided(deciding.decide), methods=["POST"]),
        Route("/sign-in", authenticator.enter, methods=["POST"]),
        Route("/sign-out", authenticator.leave, methods=["POST"]),
    ]

"""All that the board answers, each behind the door."""

from starlette.routing import Route

from outbox.settings import Settings
from outbox.web.board.deciding import Deciding
from outbox.web.board.desk import Desk
from outbox.web.board.editions import Editions
from outbox.web.board.emails import Emails
from outbox.web.board.live import Live
from outbox.web.board.overview import Overview
from outbox.web.board.signing import Door
from outbox.web.store import Store


def board_routes(settings: Settings, store: Store, door: Door, live: Live) -> list[Route]:
    """All that the board answers."""
    desk = Desk(settings, store, door, live)
    overview, editions, emails, deciding = Overview(desk), Editions(desk), Emails(desk), Deciding(desk)
    return [
        Route("/", door.shown(overview.show)),
        Route("/events", door.shown(overview.events)),
        Route("/editions", door.shown(editions.index)),
        Route("/editions/{edition:int}", door.shown(editions.one)),
        Route("/emails", door.shown(emails.index)),
        Route("/emails/{email:int}", door.shown(emails.story)),
        Route("/emails/{email:int}/html", door.shown(emails.html)),
        Route("/emails/{email:int}/source", door.shown(emails.source)),
        Route("/pauses", door.shown(editions.pauses)),
        Route("/decisions", door.shown(editions.decisions)),
        Route("/confirm", door.decided(deciding.confirm), methods=["POST"]),
        Route("/decide", door.decided(deciding.decide), methods=["POST"]),
        Route("/sign-in", door.enter, methods=["POST"]),
        Route("/sign-out", door.leave, methods=["POST"]),
    ]

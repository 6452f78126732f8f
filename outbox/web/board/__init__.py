"""The operators' board: sign-in and pages. What is decided there is done by the modules of the commands.

    auth            sign-in by the token or through a trusted proxy; tokens of forms
    sessions        sign-ins, as rows in Postgres
    urls            all routes of the board
    context         what every page shares: layout, texts, the signed-in user

    live            one poller for all open pages
    streams         how many live streams there may be
    throughput      the minutes of the last hour, as a line
    overview        /: the current state; /events: the same as it changes
    editions        /editions: what became of each; /pauses and /decisions
    emails          /emails: the list, and everything about one
    search          the list page by page
    message_view    a message for a browser
    decisions       /confirm and /decide
    decision_scope  what was confirmed, and whether it is still the same

A page is `async def page(request, user) -> Response` behind `Authenticator.shown`, a decision one behind `decided`.
"""

from outbox.web.board.live import Live
from outbox.web.board.urls import board_routes

__all__ = ["Live", "board_routes"]

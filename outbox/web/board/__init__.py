"""The operators' board: sign-in and pages. What is decided there is done by the modules of the commands.

    signing      authentication by the token or a trusted proxy; tokens of forms
    sessions     sign-ins, as rows in Postgres
    routes       all that it answers
    desk         what every page stands on: the frame, the words, who decides

    live         one poller for all who look on; hour: the minutes of the last hour, as a line
    overview     /: how it stands, now; /events: the same as it changes
    editions     /editions: what became of each; /pauses and /decisions
    emails       /emails: the list, and the story of one; browsing: page by page; mail: a message for a browser
    deciding     /confirm and /decide; meant: what was shown, and is the same still

A page is `async def page(request, user) -> Response` behind `Authenticator.shown`, a decision one behind `decided`.
"""

from outbox.web.board.live import Live
from outbox.web.board.routes import board_routes

__all__ = ["Live", "board_routes"]

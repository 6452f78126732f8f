"""The operators' board: who may come in, and its pages. It decides nothing of its own: the commands' rooms do.

    signing      who somebody is: a cookie that we signed, or a proxy that is trusted; and the token of each form
    routes       all that it answers
    desk         what every page stands on: the frame, the words, who decides

    live         one poller for all who look on; hour: the minutes of the last hour, as a line
    overview     /: how it stands, now; /events: the same as it changes
    editions     /editions: what became of each; /pauses and /decisions
    emails       /emails: the list, and the story of one; browsing: page by page; mail: a message for a browser
    deciding     /confirm and /decide; meant: what was shown, and is the same still

A page is `async def page(request, visitor) -> Response` behind `Door.shown`, a decision one behind `Door.decided`.
"""

from outbox.web.board.live import Live
from outbox.web.board.routes import board_routes

__all__ = ["Live", "board_routes"]

"""The operators' board: who may come in, and its pages.

    signing      who somebody is: a cookie that we signed, or a proxy that is trusted; and the token of each form
    overview     /: how it stands

A page is `async def page(request, visitor) -> Response` behind `shown`, a decision one behind `decided`; both are named
in `board_routes`, and a page that has a section of its own in SECTIONS.
"""

from outbox.web.board.overview import board_routes

__all__ = ["board_routes"]

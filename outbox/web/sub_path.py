"""The address under which browsers reach the pages, where a proxy serves them below a path of its own host.

A proxy may pass the path on (`/outbox/emails`) or take it off (`/emails`), as nginx does with `proxy_pass http://…/;`.
Both arrive here as the same request: routes see the path below, and links, redirects and cookies carry the whole one.
"""

from typing import Final
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

ORIGIN: Final = "outbox.origin"
"""Key of an ASGI scope: scheme, host and port of the address, as a browser writes them in `Origin`."""


class SubPath:
    """The application below the path of `url`; an application that is mounted in another one stays as it is."""

    def __init__(self, app: ASGIApp, url: str) -> None:
        self.app = app
        parts = urlsplit(url)
        self.base = parts.path.rstrip("/")
        self.origin = f"{parts.scheme}://{parts.netloc}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its whole path."""
        if scope["type"] == "http":
            scope = {**scope, ORIGIN: self.origin, **self._paths(scope)}
        await self.app(scope, receive, send)

    def _paths(self, scope: Scope) -> dict[str, str]:
        path: str = scope["path"]
        if not self.base or scope.get("root_path"):
            return {}
        below = path.removeprefix(self.base) if path == self.base or path.startswith(f"{self.base}/") else path
        return {"root_path": self.base, "path": f"{self.base}{below or '/'}"}

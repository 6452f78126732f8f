"""Answers with a page: a template, its headers, and a policy that runs nothing but the template's own script."""

import re
import secrets
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

if TYPE_CHECKING:
    from jinja2 import Environment

NOT_FOUND: Final = "Not found"
NO_PAGE: Final = "This link is incomplete, or it has expired."

TEMPLATES: Final = Path(__file__).parent / "templates"

# Style and script only of elements that carry this answer's nonce, never of attributes; nothing from elsewhere.
POLICY: Final = (
    "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


# As text it could only confuse: a browser drops it, draws a box, or moves what follows.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
TEXT_MAX: Final = 200_000  # characters of any one value on a page
_BIGINT: Final = re.compile(r"-?[0-9]{1,19}")
BIGINT_MAX: Final = 2**63 - 1


def bigint(text: str) -> int | None:
    """Return the number that a form or an address says, if Postgres can hold it as a bigint."""
    number = int(text) if _BIGINT.fullmatch(text) else None
    return number if number is not None and -BIGINT_MAX - 1 <= number <= BIGINT_MAX else None


def printable(value: Any) -> Any:
    """Return a value as a page can show it: without control characters, and cut where it would fill the page."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    shown = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", value[:TEXT_MAX])
    return shown if len(value) <= TEXT_MAX else f"{shown}…"


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def rendered(template: str, root: str, **context: Any) -> str:
    """Return a template's text; in it `at(path)` is a link within the application, which is mounted below `root`."""
    return _environment().get_template(template).render(at=lambda path: root + path, **context)


def page(request: Request, template: str, *, status: int = 200, **context: Any) -> Response:
    """Return a page of ours. The template has `nonce` for its style and script elements, and `at(path)` for its links.

    The referrer policy is `same-origin`, since under `no-referrer` the Origin of a form would be null.
    """
    nonce = secrets.token_urlsafe(16)
    html = rendered(template, request.scope.get("root_path", ""), nonce=nonce, **context)
    headers = {"Content-Security-Policy": POLICY.format(nonce=nonce), "Referrer-Policy": "same-origin"}
    return HTMLResponse(html, status, headers)


def notice(request: Request, status: int, title: str, words: str, *, language: str = "en", **headers: str) -> Response:
    """Return a page that says one thing, in a language with this tag."""
    response = page(request, "notice.html.j2", status=status, title=title, words=words, language=language)
    response.headers["Referrer-Policy"] = "no-referrer"
    for name, value in headers.items():
        response.headers[name.replace("_", "-")] = value
    return response

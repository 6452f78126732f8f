"""How a page is answered: a template, the headers, and a policy under which only what the template itself says runs."""

import secrets
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES: Final = Path(__file__).parent / "templates"

# Style and script only of elements that carry this answer's nonce, never of attributes; nothing from elsewhere.
POLICY: Final = (
    "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def rendered(template: str, root: str, **context: Any) -> str:
    """A template's text; in it `at(path)` is a link within the application, which is mounted below `root`."""
    return _environment().get_template(template).render(at=lambda path: root + path, **context)


def page(request: Request, template: str, *, status: int = 200, **context: Any) -> Response:
    """A page of ours. The template has `nonce` for its style and script elements, and `at(path)` for its links.

    Whoever posts a form from it is told from where by the browser, hence `same-origin`: under `no-referrer` a form's
    Origin would be null.
    """
    nonce = secrets.token_urlsafe(16)
    html = rendered(template, request.scope.get("root_path", ""), nonce=nonce, **context)
    headers = {"Content-Security-Policy": POLICY.format(nonce=nonce), "Referrer-Policy": "same-origin"}
    return HTMLResponse(html, status, headers)


def notice(request: Request, status: int, title: str, words: str, **headers: str) -> Response:
    """A page that says one thing, and says it alike whoever asks."""
    response = page(request, "notice.html.j2", status=status, title=title, words=words)
    response.headers["Referrer-Policy"] = "no-referrer"
    for name, value in headers.items():
        response.headers[name.replace("_", "-")] = value
    return response

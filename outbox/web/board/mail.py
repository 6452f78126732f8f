"""A message taken apart for a browser: its text, and its page with the pictures that came with it alone."""

import base64
import re
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from typing import Final

PICTURES_MAX: Final = 5_000_000  # bytes, of all that is put into a page
_CID: Final = re.compile(r"cid:([^\s\"'<>)]+)", re.IGNORECASE)

# A page of a stranger's making: nothing of it runs, nothing is loaded, and it is shown in a frame of ours only.
POLICY: Final = (
    "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'"
)


def parts_of(message: bytes) -> dict[str, str]:
    """What there is of `plain` and `html`; what cannot be decoded says so."""
    parsed = message_from_bytes(message, _class=EmailMessage, policy=default)
    found: dict[str, str] = {}
    for kind in ("plain", "html"):
        part = parsed.get_body(preferencelist=(kind,))
        if part is None:
            continue
        try:
            found[kind] = str(part.get_content())
        except (LookupError, ValueError, AttributeError) as error:
            found[kind] = f"This part cannot be decoded ({error}); look at the source."
    if "html" in found:
        found["html"] = _with_pictures(found["html"], parsed)
    return found


def _with_pictures(html: str, message: EmailMessage) -> str:
    """The page with what it names by `cid:` put in its place, as far as that is a picture and not too much."""
    pictures: dict[str, str] = {}
    for part in message.walk():
        name = str(part.get("Content-ID", "")).strip().strip("<>")
        if not name or part.get_content_maintype() != "image":
            continue
        content = part.get_payload(decode=True)
        if isinstance(content, bytes) and len(content) <= PICTURES_MAX:
            pictures[name] = f"data:{part.get_content_type()};base64,{base64.b64encode(content).decode()}"
    left = PICTURES_MAX * 4 // 3

    def in_its_place(found: re.Match[str]) -> str:
        """The picture each time that it is named, until all of them are too much."""
        nonlocal left
        picture = pictures.get(found[1], "")
        if not picture or len(picture) > left:
            return found[0]
        left -= len(picture)
        return picture

    return _CID.sub(in_its_place, html)


def has_remote_pictures(html: str) -> bool:
    """Whether the page would load something from elsewhere, which is not shown here."""
    return re.search(r"(?:src\s*=|url\()[\s\"']*(?:https?:)?//", html, re.IGNORECASE) is not None

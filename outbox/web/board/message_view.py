"""Stored messages for a browser: the text, and the page with the pictures that came with it and no others.

They are untrusted, so the bounded reader of `stored_message` reads them, in a thread of its own, which keeps the board
responsive.
"""

import asyncio
import base64
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Final

from outbox.mail.stored_message import Attachment, read_message

PICTURES_MAX: Final = 5_000_000  # bytes of all pictures in a page
PICTURE_PARTS_MAX: Final = 100
NAMES_MAX: Final = 2_000  # references to pictures in a page
REMOTE_MAX: Final = 500_000  # characters that are searched for remote content
READERS: Final = 1  # messages that are read at once: each takes CPU time from the event loop, and memory
_REMOTE: Final = re.compile(r"(?:src\s*=|url\()[\s\"']*(?:https?:)?//", re.IGNORECASE)
_CID: Final = re.compile(r"cid:([^\s\"'<>)]{1,300})", re.IGNORECASE)

# For an untrusted page: no script runs, nothing is loaded, and only a page of the board may frame it.
POLICY: Final = (
    "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'"
)


@dataclass(frozen=True, slots=True)
class Mail:
    """Parts of a message that a browser may show."""

    text: str | None = None
    html: str | None = None
    is_remote: bool = False
    """True if the page names remote pictures, which are not loaded."""
    notes: list[str] = field(default_factory=list)
    """Parts that were left out of a message that is too large or too complex, as clauses."""


async def read_mail(message: bytes) -> Mail:
    """Read a message off the event loop, after those that came before it."""
    return await asyncio.get_running_loop().run_in_executor(_readers(), mail_of, message)


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, thread_name_prefix="board-mail")


def mail_of(message: bytes) -> Mail:
    """Read a message. Never raises for what it holds."""
    found = read_message(message)
    html = found.html
    if html is None:
        return Mail(found.text, notes=found.notes)
    return Mail(found.text, _with_pictures(html, found.attachments), has_remote_pictures(html), found.notes)


def _with_pictures(html: str, attachments: Sequence[Attachment]) -> str:
    """Return the page with the pictures that it names by `cid:` as data URLs, within the limits."""
    named = {one.cid: one for one in attachments if one.cid and one.type.startswith("image/")}
    if not named:
        return html
    pictures: dict[str, str] = {}
    left = PICTURES_MAX * 4 // 3

    def in_its_place(found: re.Match[str]) -> str:
        """Return the picture as a data URL, or the reference if the limits are reached."""
        nonlocal left
        part = named.get(found[1])
        if part is None or part.size > PICTURES_MAX:
            return found[0]
        if found[1] not in pictures:
            if len(pictures) >= PICTURE_PARTS_MAX:
                return found[0]
            kind = part.type if re.fullmatch(r"image/[a-z0-9.+-]{1,60}", part.type) else "image/unknown"
            pictures[found[1]] = f"data:{kind};base64,{base64.b64encode(part.content()).decode()}"
        picture = pictures[found[1]]
        if len(picture) > left:
            return found[0]
        left -= len(picture)
        return picture

    return _CID.sub(in_its_place, html, count=NAMES_MAX)


def has_remote_pictures(html: str) -> bool:
    """Return True if the page would load remote content, which is not shown here.

    Only the beginning of the page is searched: a regular expression holds the interpreter lock until it ends.
    """
    return _REMOTE.search(html, 0, REMOTE_MAX) is not None

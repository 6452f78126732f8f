"""Classification of SMTP replies: the subject of a refusal. Pure.

The first digit shows if a later try may succeed. It does not show whose problem the refusal is: 550 answers an unknown
user, a sender over its daily limit and a host on a blocklist. Only a refusal of the recipient or of the message may be
charged to the email. `reply_table` has the rules.
"""

import re
from typing import Final

from outbox.smtp.refusal import About, Stage
from outbox.smtp.reply_table import DEFAULTS, TABLE, Row

TEXT_CHARACTERS_MAX: Final = 1000  # of a reply are read; some patterns take the square of the length

# Addresses and the paths of links name things in all words there are: "550 <rate@example.com>: User unknown".
_QUOTED_ADDRESS: Final = re.compile(
    r"<[^<>\s]{0,320}@[^<>\s]{0,320}>|[^\s<>\[\](){},;\"']{1,320}@[^\s<>\[\](){},;\"']+"
)
_LINK: Final = re.compile(r"(https?://[^\s/?#]+)[/?#]\S*")
_ENHANCED: Final = re.compile(r"[245]\.\d{1,3}\.\d{1,3}\b")


def normal_words(text: str) -> str:
    """Return the beginning of a text in small letters, "<>" for each address, and links without their paths."""
    return _LINK.sub(r"\1", _QUOTED_ADDRESS.sub("<>", " ".join(text[:TEXT_CHARACTERS_MAX].lower().split())))


def row_of(stage: str, code: int, text: str) -> Row | None:
    """Return the row of the table that decides a reply; None if the defaults do."""
    words = normal_words(text)
    found = _ENHANCED.match(words)
    enhanced = found[0] if found else ""
    rest = words[len(enhanced) :].strip()
    return next((row for row in TABLE if row.matches(stage, str(code), enhanced, rest)), None)


def classify(stage: str, code: int, text: str) -> About:
    """Return what a 4xx or 5xx reply is about. `text` is the reply without its code; its enhanced code is optional."""
    row = row_of(stage, code, text)
    about = DEFAULTS.get((stage, code // 100), About.CLOSING) if row is None else row.about
    return About.ROUTE if about is About.RELAYING and stage == Stage.MAIL else about


_TRAIL: Final = re.compile(r"(?:redirected to \S+: )?(\d{3}) (.*?)(?: \(to ([A-Z]+)\))?", re.DOTALL)


def is_server_trouble(reply: str) -> bool:
    """Return True if a reply as the trail keeps it reports temporary trouble of the server before a recipient is named.

    It is answered like a rate limit, although it says nothing of a rate.
    """
    found = _TRAIL.fullmatch(reply)
    row = None if found is None else row_of(found[3] or Stage.DOT, int(found[1]), found[2])
    return row is not None and row.about is About.RATE and not row.words and not row.codes.startswith("421")


def names_recipient(reply: str) -> bool:
    """Return True if a reply as the trail keeps it says that it is about the recipient, as a full mailbox does.

    A reply that says nothing of its subject is not: by default one to RCPT counts as the recipient's.
    """
    found = _TRAIL.fullmatch(reply)
    if found is None:
        return False
    row = row_of(found[3] or Stage.DOT, int(found[1]), found[2])
    return row is not None and row.about is About.RECIPIENT

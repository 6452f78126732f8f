"""Tokens that are sent with emails and returned with bounces, so that a bounce proves which email it is about.

A token is in the return path if the settings ask for it (VERP), and in ENVID if the server offers DSN (RFC 3461).
Postgres makes and checks it (`outbox.bounce_tokens`, `outbox.bounce_email`) with a key that only the schema's owner
reads, so a token cannot be forged.
"""

import re
from hashlib import blake2b
from typing import Final

TOKEN_MAX: Final = 40  # characters: 19 digits, k, 3 digits, t, 16 digits; letters are lower-case
_TOKEN: Final = re.compile(
    r"(?<![0-9a-z])[1-9][0-9]{0,18}k[1-9][0-9]{0,2}t[0-9a-f]{16}(?![0-9a-z])", re.IGNORECASE | re.ASCII
)
# Tokens of versions without the key: needed until all relays are upgraded, and as long as such emails bounce.
_FORMER: Final = re.compile(r"(?<![0-9a-z])([1-9][0-9]{0,18})-([0-9a-f]{12})(?![0-9a-z])", re.IGNORECASE | re.ASCII)


def tokens_in(text: str) -> list[str]:
    """Return the distinct tokens in a text, valid or not."""
    return list(dict.fromkeys(found[0].lower() for found in _TOKEN.finditer(text)))


def email_of(token: str) -> int:
    """Return the email id in a token."""
    return int(token.partition("k")[0])


def former_tokens_in(text: str) -> list[tuple[int, str]]:
    """Return the tokens without a key in a text, each with its email id."""
    return list(dict.fromkeys((int(found[1]), found[0].lower()) for found in _FORMER.finditer(text)))


def former_token_of(email: int, message_id: str) -> str:
    """Return an email's token without a key: a digest of its Message-ID, which proves no more than the Message-ID."""
    return f"{email}-{blake2b(message_id.encode(), digest_size=6).hexdigest()}"

"""Tokens that go out with emails and come back with bounces, so that a bounce proves which email it is about.

A token stands in the return path where the settings want it (VERP), and in ENVID where the server offers DSN (RFC
3461). Postgres makes and checks it (`outbox.bounce_tokens`, `outbox.bounce_email`) with a key that only the schema's
owner reads: who has not seen a token cannot make one up.
"""

import re
from hashlib import blake2b
from typing import Final

TOKEN_MAX: Final = 40  # characters: 19 digits, k, 3 digits, t, 16 digits; letters are lower-case
_TOKEN: Final = re.compile(
    r"(?<![0-9a-z])[1-9][0-9]{0,18}k[1-9][0-9]{0,2}t[0-9a-f]{16}(?![0-9a-z])", re.IGNORECASE | re.ASCII
)
# Written by versions before the key, until all relays of a fleet are upgraded, and for as long as such emails bounce.
_FORMER: Final = re.compile(r"(?<![0-9a-z])([1-9][0-9]{0,18})-([0-9a-f]{12})(?![0-9a-z])", re.IGNORECASE | re.ASCII)


def tokens_in(text: str) -> list[str]:
    """Return the tokens in any text, valid or not, each once."""
    return list(dict.fromkeys(found[0].lower() for found in _TOKEN.finditer(text)))


def email_of(token: str) -> int:
    """Return the id of the email that a token says it is of."""
    return int(token.partition("k")[0])


def former_tokens_in(text: str) -> list[tuple[int, str]]:
    """Return the tokens without a key in any text, each with the id of the email that it says it is of."""
    return list(dict.fromkeys((int(found[1]), found[0].lower()) for found in _FORMER.finditer(text)))


def former_token_of(email: int, message_id: str) -> str:
    """Return an email's token without a key: a digest of its Message-ID, which proves what the Message-ID proves."""
    return f"{email}-{blake2b(message_id.encode(), digest_size=6).hexdigest()}"

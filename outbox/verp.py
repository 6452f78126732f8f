"""Which email a bounce is about: a token that goes out with each email and comes back with what went wrong.

It stands in the return path where the settings want it (VERP), and in ENVID where the server offers DSN (RFC 3461). It
holds a digest of the Message-ID, which only those know who got the email: nobody can make up a bounce of another's.
"""

import re
from hashlib import blake2b

TOKEN_MAX = 32  # characters
_TOKEN = re.compile(r"(?<![0-9a-z])([1-9][0-9]{0,18})-([0-9a-f]{12})(?![0-9a-z])", re.IGNORECASE)


def token_of(email: int, message_id: str) -> str:
    """`4711-0123456789ab`: letters, digits, a hyphen; at most `TOKEN_MAX` of them; for ever the same of one email."""
    return f"{email}-{blake2b(message_id.encode(), digest_size=6).hexdigest()}"


def emails_in(text: str) -> list[tuple[int, str]]:
    """The tokens in any text, each with the id of the email that it claims to be of; `token_of` tells whether it is."""
    return [(int(found[1]), found[0].lower()) for found in _TOKEN.finditer(text)]

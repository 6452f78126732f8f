"""Proof of the email that a bounce is about.

A bounce proves it by the token that was sent with the email (`verp`), which Postgres checks with a key that only the
schema's owner reads, or by its Message-ID, if outbox made that unpredictably. An address or a guessable Message-ID
proves nothing: otherwise anyone could stop the mail of another person.

A token belongs to one recipient. All recipients of a copy share the Message-ID, so each could forge the bounce of
another: such a proof is `shared`.
"""

import re
from dataclasses import dataclass
from typing import Final

from outbox.database.connection import Connection
from outbox.feedback.notice import Bounce
from outbox.feedback.reported_address import normal_address
from outbox.mail.verp import former_token_of, former_tokens_in, tokens_in

ID_MAX: Final = 2**63 - 1
TOKENS_MAX: Final = 20
COPIES_MAX: Final = 1000  # of one message to further recipients that are searched

# As `outbox.put` and `generate` make one: the email's id, or that of the first copy, and 64 random bits.
_UNPREDICTABLE: Final = re.compile(r"<([1-9][0-9]{0,18})\.[0-9a-f]{16}@[^<>\s]{1,900}>")


@dataclass(frozen=True, slots=True)
class Sent:
    """Email that a bounce may be about."""

    id: int
    key: str
    recipient: str
    message_id: str


@dataclass(frozen=True, slots=True)
class Proof:
    """Email that a bounce proves to be about. `shared` is True if recipients of other copies have the same proof."""

    email: Sent
    shared: bool


# $1: tokens. The first that is valid counts.
PROVED: Final = """
SELECT m.id, m.key, m.recipient, m.message_id FROM unnest($1::text[]) WITH ORDINALITY AS t (token, place)
  JOIN outbox.email m ON m.id = outbox.bounce_email(t.token) ORDER BY t.place LIMIT 1
"""

EMAILS: Final = "SELECT id, key, recipient, message_id FROM outbox.email WHERE id = ANY ($1::bigint[])"
# All copies of one message have the same Message-ID, which begins with the id of the first.
COPIES: Final = """
SELECT m.id, m.key, m.recipient, m.message_id FROM generate_series(2, $3::integer) AS n
 CROSS JOIN LATERAL (SELECT id, key, recipient, message_id FROM outbox.email WHERE key = $1 || '#' || n OFFSET 0) m
 WHERE m.message_id = $2
"""


STATEMENTS: Final = (PROVED, EMAILS, COPIES)


async def prove(connection: Connection, bounce: Bounce) -> Proof | None:
    """Return the email that a bounce proves to be about; None if it proves nothing."""
    if tokens := tokens_in(bounce.evidence)[:TOKENS_MAX]:
        row = await connection.fetchrow(PROVED, tokens)
        if row is not None:
            return Proof(Sent(*row), shared=False)
    return await _by_message_id(connection, bounce)


async def _by_message_id(connection: Connection, bounce: Bounce) -> Proof | None:
    """Return the email whose unpredictable Message-ID a bounce shows, or a digest of it (a token without a key)."""
    former = dict(former_tokens_in(bounce.evidence)[:TOKENS_MAX])
    wanted = {*former, *(number for one in bounce.message_ids if (number := _first_of(one)) is not None)}
    rows = [Sent(*row) for row in await connection.fetch(EMAILS, [number for number in wanted if number <= ID_MAX])]
    for one in rows:
        shown = one.message_id in bounce.message_ids
        digest = former.get(one.id) == former_token_of(one.id, one.message_id)
        number = _first_of(one.message_id)
        first: Sent | None = one
        if not (shown or digest) or number is None or number > ID_MAX:
            continue
        if number != one.id:
            row = await connection.fetchrow(EMAILS, [number])
            first = Sent(*row) if row is not None and row["message_id"] == one.message_id else None
        if first is not None:
            return await _of_copies(connection, first, one if digest else None, bounce)
    return None


def _first_of(message_id: str) -> int | None:
    """Return the id that an unpredictable Message-ID begins with; None if it is another kind of Message-ID."""
    found = _UNPREDICTABLE.fullmatch(message_id)
    return int(found[1]) if found is not None else None


async def _of_copies(connection: Connection, first: Sent, one: Sent | None, bounce: Bounce) -> Proof | None:
    """Return which copy of a message a bounce is about; if there are several, it has to name the recipient."""
    copies = [Sent(*row) for row in await connection.fetch(COPIES, first.key, first.message_id, COPIES_MAX)]
    if one is None and copies:
        named = {address for notice in bounce.notices for address in notice.addresses}
        one = next((copy for copy in (first, *copies) if normal_address(copy.recipient) in named), None)
    if one is None and not copies:
        one = first
    return Proof(one, shared=bool(copies)) if one is not None else None

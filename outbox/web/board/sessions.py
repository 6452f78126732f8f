"""Sign-ins to the board: rows of `outbox.board_session`, so that a sign-out ends one on every server.

The cookie is a random value, signed with a key that is derived from the board's token. So a forged cookie costs no
query, a new token ends every session of the former one, and write access to the table is not enough to sign in. The
table holds only the SHA-256 of the random value.
"""

import hashlib
import secrets
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import asyncpg
from itsdangerous import BadSignature, Signer

from outbox.database.connection import Connection
from outbox.errors import DatabaseUnavailableError
from outbox.web.queries import Store

SESSION_S: Final = 12 * 3600
RANDOM_SIZE: Final = 32  # bytes
CLEAN_S: Final = 600.0  # between two removals of expired rows by one process
# A session that was valid is accepted for this long while Postgres is down: the board then shows why it is out of date.
BELIEVED_S: Final = 600.0
KNOWN_MAX: Final = 1000

BEGIN: Final = """
INSERT INTO outbox.board_session (id, name, expires_at) VALUES ($1, $2, now() + $3 * interval '1 second')
"""
FIND: Final = "SELECT name FROM outbox.board_session WHERE id = $1 AND expires_at > now()"
END: Final = "DELETE FROM outbox.board_session WHERE id = $1"
CLEAN: Final = "DELETE FROM outbox.board_session WHERE expires_at <= now()"


@dataclass(frozen=True, slots=True)
class Session:
    """Session of one sign-in. `value` is the random part of the cookie, which proves the session."""

    value: str
    name: str

    @property
    def id(self) -> bytes:
        """Return the key of its row."""
        return _row_id(self.value)

    @property
    def csrf(self) -> str:
        """Return the token of the session's forms."""
        return form_token(self.value, self.name)


class Sessions:
    """Sessions that were made with one token."""

    def __init__(self, store: Store, token: str) -> None:
        self.store = store
        # SHA-384, since base64 writes its 48 bytes without unused bits: one cookie has one spelling.
        key = token.encode("utf-8", "surrogatepass")
        self._signer = Signer(key, salt="outbox board session", key_derivation="hmac", digest_method=hashlib.sha384)
        self._known: OrderedDict[bytes, tuple[str, float]] = OrderedDict()  # name, and when it was last valid
        self._clean_at = 0.0

    async def begin(self, name: str) -> Session:
        """Make a session for a user who has presented the token."""
        session = Session(secrets.token_urlsafe(RANDOM_SIZE), name)
        async with self.store.connection() as connection:
            await self._clean(connection)
            await connection.execute(BEGIN, session.id, name, float(SESSION_S))
        self._remember(session)
        return session

    async def find(self, cookie: str) -> Session | None:
        """Return the session of a cookie; None if there is none, or it has ended.

        Raises:
            DatabaseUnavailableError: Postgres is down, and this process has not seen the session within BELIEVED_S.
        """
        value = self._value(cookie)
        return None if value is None else await self._find(value)

    async def is_valid(self, session: Session) -> bool:
        """Return True if a session that was found has not ended since."""
        try:
            return await self._find(session.value) is not None
        except DatabaseUnavailableError:
            return False

    async def _find(self, value: str) -> Session | None:
        row_id = _row_id(value)
        try:
            async with self.store.connection() as connection:
                await self._clean(connection)
                name = await connection.fetchval(FIND, row_id)
        except DatabaseUnavailableError:
            known, valid_at = self._known.get(row_id, ("", 0.0))
            if not known or time.monotonic() - valid_at > BELIEVED_S:
                raise
            return Session(value, known)
        if name is None:
            self._known.pop(row_id, None)
            return None
        session = Session(value, name)
        self._remember(session)
        return session

    async def end(self, session: Session) -> None:
        """End a session by removing its row. It raises, and the session lives on, if Postgres is down."""
        async with self.store.connection() as connection:
            await connection.execute(END, session.id)
        self._known.pop(session.id, None)

    def cookie(self, session: Session) -> str:
        """Return the cookie of a session."""
        return self._signer.sign(session.value).decode()

    def _value(self, cookie: str) -> str | None:
        """Return the random part of a cookie that was made with this token."""
        with suppress(BadSignature):
            return self._signer.unsign(cookie).decode()
        return None

    def _remember(self, session: Session) -> None:
        self._known[session.id] = session.name, time.monotonic()
        self._known.move_to_end(session.id)
        while len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)

    async def _clean(self, connection: Connection) -> None:
        """Remove expired rows, at most every `CLEAN_S`."""
        if time.monotonic() >= self._clean_at:
            self._clean_at = time.monotonic() + CLEAN_S
            with suppress(asyncpg.PostgresError):  # a standby cannot; expired rows have no effect anyway
                await connection.execute(CLEAN)


def form_token(secret: str, name: str) -> str:
    """Return the token of a user's forms. It is tied to a secret of their browser, which it does not reveal."""
    key = secret.encode("utf-8", "replace")
    signer = Signer(key, salt="outbox board form", key_derivation="hmac", digest_method=hashlib.sha256)
    return signer.get_signature(name.encode("utf-8", "replace")).decode()


def _row_id(value: str) -> bytes:
    return hashlib.sha256(value.encode()).digest()

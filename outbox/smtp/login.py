"""Login by SMTP (RFC 4954): one mechanism per try, and the server's reply in every error.

A login is sent inside verified TLS only, where PLAIN is as safe as CRAM-MD5 and works with passwords that the server
has hashed. Each further mechanism would be another wrong password to a server that counts them.
"""

import base64
import binascii
import hmac
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Final

import aiosmtplib

from outbox.smtp.opening import ERRORS, describe, reply_of

MECHANISMS: Final = ("plain", "login", "cram-md5")
_SUCCESS: Final = 235
_CONTINUE: Final = 334
_CHALLENGES_MAX: Final = 5
_LINE_MAX: Final = 512  # RFC 5321 §4.5.3.1.4; longer initial responses wait for the challenge (RFC 4954 §4)
# RFC 4954 §6: mechanism unknown; encryption required for it. 500 to 503: the server did not understand the dialogue.
_NOT_THIS_WAY: Final = frozenset({500, 501, 502, 503, 504, 538})
_TOO_WEAK: Final = 534  # "mechanism is too weak"; Gmail says it also of accounts that need another password
_PERMANENT: Final = 500
# Servers lock accounts and hosts that give a wrong password too often: fail2ban counts over 10 minutes by default,
# Exchange locks for 15 to 30.
LOGIN_PAUSE_FIRST_S: Final = 60.0
LOGIN_PAUSE_MAX_S: Final = 1800.0


def login_pause_s(refusals: int) -> float:
    """Return how long a login is not tried again after so many refusals in a row, at least one."""
    return min(LOGIN_PAUSE_FIRST_S * 2.0 ** min(refusals - 1, 30), LOGIN_PAUSE_MAX_S)


class LoginError(Exception):
    """The login failed. `code` and `text` are the server's reply; 0 and "" if it said nothing.

    `is_lost` says that the connection ended, or the server fell silent, in the dialogue.
    """

    def __init__(
        self, message: str, *, code: int = 0, text: str = "", mechanism: str = "", is_lost: bool = False
    ) -> None:
        super().__init__(message)
        self.code, self.text, self.mechanism, self.is_lost = code, text, mechanism, is_lost

    @property
    def is_judged(self) -> bool:
        """Return True after a refusal of user and password, or of further tries: trying on may lock the account."""
        return self.code >= _PERMANENT or (self.code > 0 and "too many" in self.text.lower())

    @property
    def is_about_the_mechanism(self) -> bool:
        """Return True if the server would judge the same login in another mechanism."""
        return self.code in _NOT_THIS_WAY or (self.code == _TOO_WEAK and "mechanism" in self.text.lower())


async def log_in(smtp: aiosmtplib.SMTP, username: str, password: str, *, passed: Collection[str] = ()) -> str:
    """Log in with the first mechanism that both sides know, and return its name.

    Another one follows only if the server refuses the mechanism instead of the login. `passed` are the mechanisms with
    which the server refused this login before; they come last.

    Raises:
        LoginError: the server offers no such mechanism, refuses the login, or breaks off.

    """
    if not smtp.supports_extension("auth"):
        raise LoginError("the server offers no AUTH")
    common = [name for name in MECHANISMS if name in smtp.server_auth_methods]
    if not common:
        offered = ", ".join(smtp.server_auth_methods).upper()
        raise LoginError(f"the server offers AUTH {offered}, and outbox knows PLAIN, LOGIN and CRAM-MD5 only")
    common.sort(key=lambda name: name in passed)
    for name in common:
        try:
            await _try(smtp, name, username.encode(), password.encode())
        except LoginError as error:
            if name is common[-1] or not error.is_about_the_mechanism or not smtp.is_connected:
                raise
        else:
            return name
    raise AssertionError


async def _try(smtp: aiosmtplib.SMTP, name: str, username: bytes, password: bytes) -> None:
    """Hold the dialogue of one mechanism.

    Raises:
        LoginError: it does not end in success.

    """
    dialogue = _DIALOGUES[name](username, password)
    words = [b"AUTH", name.upper().encode()]
    if (first := dialogue.first()) is not None:
        words.append(base64.b64encode(first))
    try:
        reply = await smtp.execute_command(*words)
        for _ in range(_CHALLENGES_MAX):
            if reply.code != _CONTINUE:
                break
            reply = await smtp.execute_command(base64.b64encode(dialogue.answer(_decoded(reply.message))))
    except ERRORS as error:
        said = describe(error) or "no answer"
        raise LoginError(f"{said} (to AUTH {name.upper()})", mechanism=name, is_lost=True) from error
    if reply.code == _SUCCESS:
        return
    code, text = reply_of_response(reply)
    raise LoginError(f"{reply.code} {reply.message}", code=code, text=text, mechanism=name)


def reply_of_response(reply: aiosmtplib.SMTPResponse) -> tuple[int, str]:
    """Return code and text of a reply; 0 and "" if it is not an SMTP reply."""
    return reply_of(aiosmtplib.SMTPResponseException(reply.code, reply.message)) or (0, "")


def _decoded(challenge: str) -> bytes:
    """Return a decoded challenge; some servers send their prompts without base64."""
    raw = challenge.encode("utf-8", "surrogateescape")
    try:
        return base64.b64decode(raw, validate=True)
    except binascii.Error:
        return raw


class _Dialogue(ABC):
    """The client's side of a mechanism: its initial response, if it has one, and its answers to challenges."""

    def __init__(self, username: bytes, password: bytes) -> None:
        self.username, self.password = username, password

    def first(self) -> bytes | None:
        return None

    @abstractmethod
    def answer(self, challenge: bytes) -> bytes: ...


class _Plain(_Dialogue):
    """PLAIN (RFC 4616). A server that ignores the initial response asks for it, and gets it again."""

    def first(self) -> bytes | None:
        response = self.answer(b"")
        fits = len(response) * 4 // 3 + len(b"AUTH PLAIN ==\r\n") <= _LINE_MAX
        return response if fits else None

    def answer(self, challenge: bytes) -> bytes:  # noqa: ARG002 - the challenge is empty
        return b"\0" + self.username + b"\0" + self.password


class _Login(_Dialogue):
    """LOGIN (draft-murchison-sasl-login), without an initial response, which some servers ignore.

    Each prompt gets what it asks for; prompts that name neither get user and password in this order.
    """

    def __init__(self, username: bytes, password: bytes) -> None:
        super().__init__(username, password)
        self._asked = 0

    def answer(self, challenge: bytes) -> bytes:
        self._asked += 1
        prompt = challenge.lower()
        if (b"pass" in prompt) is not (b"user" in prompt):
            return self.password if b"pass" in prompt else self.username
        return self.username if self._asked == 1 else self.password


class _CramMd5(_Dialogue):
    """CRAM-MD5 (RFC 2195)."""

    def answer(self, challenge: bytes) -> bytes:
        return self.username + b" " + hmac.new(self.password, challenge, "md5").hexdigest().encode()


_DIALOGUES: Final[dict[str, type[_Dialogue]]] = {"plain": _Plain, "login": _Login, "cram-md5": _CramMd5}

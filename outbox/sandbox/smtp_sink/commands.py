"""SMTP commands of one connection (RFC 5321, 3207, 4954): pure, without I/O.

A command ends in a `Step`: either a reply and nothing else, or a stage with its usual reply. A stage takes effect only
when its reply has been sent, since a script may replace it.
"""

import ssl
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Final, NamedTuple

from outbox.sandbox.smtp_sink import replies
from outbox.sandbox.smtp_sink.auth import MECHANISMS, LoginDialogue
from outbox.sandbox.smtp_sink.script import Stage, Visit

RECIPIENTS_MAX: Final = 1000
EXTENSIONS: Final = ("SMTPUTF8", "DSN")

_PARAMETERS: Final = {  # which an extension brings: RFC 1870, 6152, 6531, 3461
    "MAIL": {"SIZE": {b"SIZE"}, "8BITMIME": {b"BODY"}, "SMTPUTF8": {b"SMTPUTF8"}, "DSN": {b"RET", b"ENVID"}},
    "RCPT": {"DSN": {b"NOTIFY", b"ORCPT"}},
}


@dataclass(frozen=True)
class Offer:
    """What the sink offers to one connection."""

    pipelining: bool
    tls: ssl.SSLContext | None
    login: tuple[str, str] | None
    """User and password; AUTH is mandatory with them."""
    size_max: int
    eight_bit: bool
    extensions: Collection[str]

    def extension_words(self, *, tls_active: bool) -> list[bytes]:
        """Return the lines of the EHLO reply behind the host's name."""
        words = [b"PIPELINING"] if self.pipelining else []
        words.append(b"SIZE %d" % self.size_max)
        if self.eight_bit:
            words.append(b"8BITMIME")
        words += [word.encode() for word in self.extensions]
        if self.tls is not None and not tls_active:
            words.append(b"STARTTLS")
        elif self.login is not None:
            words.append(b"AUTH " + b" ".join(MECHANISMS))
        return words

    @cached_property
    def parameters(self) -> dict[str, set[bytes]]:
        """Names of the parameters that MAIL and RCPT may have."""
        offered = {"SIZE", *self.extensions, *(("8BITMIME",) if self.eight_bit else ())}
        return {
            command: set().union(*(names for extension, names in brought.items() if extension in offered))
            for command, brought in _PARAMETERS.items()
        }


class Step(NamedTuple):
    """Outcome of a command line."""

    stage: Stage | None
    """Stage that is reached; None if the reply is all."""
    reply: bytes


_MAIL: Final = Step(Stage.MAIL, replies.SENDER_OK)
_RCPT: Final = Step(Stage.RCPT, replies.RECIPIENT_OK)
_DATA: Final = Step(Stage.DATA, replies.GO_AHEAD)


class Commands:
    """Command dialogue of one connection; its state is the visit."""

    def __init__(self, offer: Offer, visit: Visit) -> None:
        self._offer = offer
        self._visit = visit
        self._login: LoginDialogue | None = None
        """AUTH dialogue in progress: the next line is an answer, not a command."""

    def take(self, line: bytes) -> Step:
        """Return the outcome of a command line."""
        if self._login is not None:
            return self._take_answer(self._login, line)
        command = self._COMMANDS.get(line.partition(b" ")[0].upper())
        return Step(None, replies.UNKNOWN) if command is None else command(self, line)

    def take_effect(self, stage: Stage) -> None:
        """Change the visit after the usual reply to EHLO, RSET or AUTH."""
        if stage is Stage.EHLO or stage is Stage.RSET:
            self._visit.end_transaction()
        elif stage is Stage.AUTH:
            self._visit.authenticated = True

    def take_back(self, stage: Stage) -> None:
        """Undo what the command did to the visit, since its reply was not the usual one."""
        if stage is Stage.MAIL or stage is Stage.DOT:
            self._visit.end_transaction()
        elif stage is Stage.RCPT:
            self._visit.drop_recipient()

    def _ehlo(self, line: bytes) -> Step:
        words = [b"sink.invalid"]
        if line[:4].upper() != b"HELO":
            words += self._offer.extension_words(tls_active=self._visit.tls)
        return Step(Stage.EHLO, b"".join(b"250-%s\r\n" % word for word in words[:-1]) + b"250 %s\r\n" % words[-1])

    def _mail(self, line: bytes) -> Step:
        visit = self._visit
        sender, parameters = _path(line, b"MAILFROM:")
        if self._offer.login is not None and not visit.authenticated:
            return Step(None, replies.LOGIN_FIRST)
        if visit.sender is not None:
            return Step(None, replies.NESTED_MAIL)
        if sender is None:
            return Step(None, replies.SYNTAX)
        if parameters and (refusal := self._refuse_parameters(parameters, "MAIL")):
            return refusal
        if not sender.isascii() and b"SMTPUTF8" not in parameters.upper():
            return Step(None, replies.NOT_ASCII)
        visit.begin_transaction(sender, parameters)
        return _MAIL

    def _rcpt(self, line: bytes) -> Step:
        visit = self._visit
        recipient, parameters = _path(line, b"RCPTTO:")
        if visit.sender is None:
            return Step(None, replies.MAIL_FIRST)
        if not recipient:
            return Step(None, replies.SYNTAX)
        if len(visit.recipients) >= RECIPIENTS_MAX:
            return Step(None, replies.TOO_MANY_RECIPIENTS)
        if parameters and (refusal := self._refuse_parameters(parameters, "RCPT")):
            return refusal
        if not recipient.isascii() and b"SMTPUTF8" not in visit.mail_parameters.upper():
            return Step(None, replies.NOT_ASCII)
        visit.add_recipient(recipient, parameters)
        return _RCPT

    def _refuse_parameters(self, parameters: bytes, command: str) -> Step | None:
        """Refuse a parameter that was not offered, and a declared size that is too much (RFC 1870)."""
        known = self._offer.parameters[command]
        for parameter in parameters.upper().split():
            name, _, value = parameter.partition(b"=")
            if name not in known:
                return Step(None, replies.UNKNOWN_PARAMETER)
            if name == b"SIZE" and value.isdigit() and int(value) > self._offer.size_max:
                return Step(None, replies.TOO_BIG)
        return None

    def _data(self, _: bytes) -> Step:
        if self._visit.recipients:
            return _DATA
        return Step(None, replies.MAIL_FIRST if self._visit.sender is None else replies.RECIPIENT_FIRST)

    def _rset(self, _: bytes) -> Step:
        return Step(Stage.RSET, replies.OK)

    def _noop(self, _: bytes) -> Step:
        return Step(None, replies.OK)

    def _vrfy(self, _: bytes) -> Step:
        return Step(None, replies.CANNOT_VERIFY)

    def _quit(self, _: bytes) -> Step:
        return Step(Stage.QUIT, replies.BYE)

    def _starttls(self, _: bytes) -> Step:
        if self._tls_on_offer:
            return Step(Stage.STARTTLS, replies.TLS_GO_AHEAD)
        return Step(None, replies.SEQUENCE if self._visit.tls else replies.UNKNOWN)

    @property
    def _tls_on_offer(self) -> bool:
        return self._offer.tls is not None and not self._visit.tls

    def _auth(self, line: bytes) -> Step:
        mechanism, *initial = line.split()[1:] or [b""]
        if self._offer.login is None:
            return Step(None, replies.UNKNOWN)
        if self._tls_on_offer:
            return Step(None, replies.TLS_FIRST)
        if self._visit.authenticated or self._visit.sender is not None:
            return Step(None, replies.SEQUENCE)
        if mechanism.upper() not in MECHANISMS:
            return Step(None, replies.NO_MECHANISM)
        self._login = LoginDialogue(mechanism.upper(), initial)
        return self._prompt_or_judge(self._login)

    def _take_answer(self, login: LoginDialogue, line: bytes) -> Step:
        if line == b"*":
            self._login = None
            return Step(None, replies.LOGIN_CANCELLED)
        login.answer(line)
        return self._prompt_or_judge(login)

    def _prompt_or_judge(self, login: LoginDialogue) -> Step:
        if (prompt := login.prompt()) is not None:
            return Step(None, prompt)
        self._login = None
        if login.credentials() == self._offer.login:
            return Step(Stage.AUTH, replies.LOGIN_OK)
        self._visit.refused_logins += 1
        return Step(None, replies.LOGIN_REFUSED)

    _COMMANDS: ClassVar[dict[bytes, "Callable[[Commands, bytes], Step]"]] = {
        b"MAIL": _mail,
        b"RCPT": _rcpt,
        b"DATA": _data,
        b"EHLO": _ehlo,
        b"HELO": _ehlo,
        b"LHLO": _ehlo,
        b"RSET": _rset,
        b"NOOP": _noop,
        b"VRFY": _vrfy,
        b"QUIT": _quit,
        b"AUTH": _auth,
        b"STARTTLS": _starttls,
    }


def _path(line: bytes, words: bytes) -> tuple[str | None, bytes]:
    """Return the address between the angle brackets and the parameters behind; no address if the words differ."""
    head, opened, rest = line.partition(b"<")
    address, closed, parameters = rest.partition(b">")
    if not (opened and closed) or head.replace(b" ", b"").upper() != words:
        return None, b""
    return address.decode(errors="backslashreplace"), parameters

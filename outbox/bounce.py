"""What a bounce or a complaint says, taken apart; knows nothing of emails that were sent, and believes nothing.

Read are delivery status notifications (RFC 3464), feedback reports (RFC 5965), and the plain texts of Exim and qmail.
What comes in is hostile: anybody may write to the address that bounces go to.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from typing import Final

from outbox import mime

READ_MAX: Final = 2_000_000  # bytes of a message: what a bounce says stands before what it returns
REPORT_MAX: Final = 256 * 1024  # bytes of a part with fields
TEXT_MAX: Final = 256 * 1024  # bytes of a part with text
NOTICES_MAX: Final = 1000
SAID_MAX: Final = 400
IDS_MAX: Final = 20

# RFC 3463 §3: what says that nobody has that mailbox. Not 5.1.7 and 5.1.8, which are about the sender, nor 5.4.4, which
# a resolver of ours that is out of order gives for everybody; 5.1.0 and 5.7.1 are whatever a server does not like.
HARD: Final = frozenset(("5.1.1", "5.1.2", "5.1.3", "5.1.6", "5.1.10", "5.2.1"))

_STATUS: Final = re.compile(r"(?<![\d.])([245]\.\d{1,3}\.\d{1,3})(?!\.?\d)")
_MESSAGE_ID: Final = re.compile(r"(?im)^message-id:[ \t]*(?:\r?\n[ \t]+)?(<[^<>\s]{1,900}>)")
_ID: Final = re.compile(r"<[^<>\s]{1,900}>")
# Anybody may send such a text: each expression begins where a word or a line does, and looks a bounded way ahead.
_ADDRESS: Final = re.compile(r"(?<![^\s<>,;\"])[^\s<>,;\"@]{1,64}@[^\s<>,;\"]{1,255}")
_ADDRESS_ALONE: Final = re.compile(r"(?m)^[ \t]{0,80}<?[^\s<>@]{1,64}@[^\s<>]{1,255}>?:?[ \t\r]{0,80}$")
_BLANK_LINES: Final = re.compile(rb"\n(?:[ \t\r]*+\n)++")
_QMAIL: Final = re.compile(r"\s*Hi\. This is the ")  # QSBMF, https://cr.yp.to/proto/qsbmf.txt
_COPY: Final = re.compile(r"(?im)^(?:-+ ?(?:below this line|this is a copy)|return-path:|received:).*$")
_ADDRESSED: Final = ("To", "Delivered-To", "X-Original-To", "Envelope-To", "X-Envelope-To", "X-Delivered-To")
_SENT_WITH: Final = ("Original-Envelope-Id", "X-Postfix-Sender", "Original-Mail-From")
_UNDELIVERED: Final = frozenset(("failed", "delayed"))
_UNWANTED: Final = frozenset(("abuse", "fraud", "opt-out", "complaint", "virus"))


class Kind(StrEnum):
    """What follows: nobody has that address, only this email did not come in, or the reader wants no more."""

    HARD = "hard"
    SOFT = "soft"
    COMPLAINED = "complained"


@dataclass(frozen=True, slots=True)
class Notice:
    """What is said about one recipient; `addresses` are that recipient's, as sent to and as it came out in the end."""

    addresses: frozenset[str]
    kind: Kind
    status: str | None
    said: str


@dataclass(frozen=True, slots=True)
class Bounce:
    """`identity` is the same however often this message is read. In `evidence` a token may stand."""

    identity: str
    notices: tuple[Notice, ...]
    evidence: str
    message_ids: tuple[str, ...]

    def about(self, recipient: str) -> Notice | None:
        """What it says about a recipient: the only thing that it says, else what is said by name."""
        if len(self.notices) == 1:
            return self.notices[0]
        return next((one for one in self.notices if recipient.lower() in one.addresses), None)


def take_apart(raw: bytes) -> Bounce | None:
    """Return the content of a bounce or a complaint; None for other messages. Reads at most `READ_MAX` bytes.

    Raises:
        ValueError: no bounce was found in the part that was read, and the rest exceeds a limit of `mime`.

    """
    raw = raw[:READ_MAX]
    message = mime.parse(raw)
    found = _taken_apart(raw, message)
    if found is None and message.notes:
        raise ValueError(f"it cannot be read whole: {'; '.join(message.notes)}")
    return found


def _taken_apart(raw: bytes, message: mime.Message) -> Bounce | None:
    notices: list[Notice] = []
    head = message.head
    evidence = [value for name in _ADDRESSED for value in _values(head, name)]
    ids = [*_ID.findall(" ".join(_values(head, "In-Reply-To") + _values(head, "References")))]
    texts: list[str] = []
    for part in message.parts:
        match part.type:
            case "message/delivery-status" | "message/global-delivery-status":
                blocks = _blocks(part)
                evidence += [value for block in blocks for name in _SENT_WITH for value in _values(block, name)]
                notices += [found for block in blocks if (found := _notice(block)) is not None]
            case "message/feedback-report":
                for block in _blocks(part):
                    evidence += [value for name in _SENT_WITH for value in _values(block, name)]
                    notices += _complaint(block)
            case (
                "message/rfc822"
                | "message/global"
                | "text/rfc822-headers"
                | "message/rfc822-headers"
                | "message/global-headers"
            ):
                returned = mime.read_head(part.content(mime.HEAD_MAX).lstrip())
                evidence += _values(returned, "Return-Path")
                ids += [found for value in _values(returned, "Message-ID") for found in _ID.findall(value)]
            case kind if kind.startswith("text/"):
                texts.append(part.text(TEXT_MAX))
    if not notices:
        notices = _plain(head, texts)
        ids += [found for text in texts for found in _MESSAGE_ID.findall(text)] if notices else []
    if not notices:
        return None
    said = " ".join(_values(head, "Message-ID")).strip()
    identity = blake2b(said.encode("utf-8", "replace") or raw, digest_size=16).hexdigest()
    return Bounce(identity, tuple(notices[:NOTICES_MAX]), " ".join(evidence), tuple(dict.fromkeys(ids))[:IDS_MAX])


def _values(head: mime.Head, name: str) -> list[str]:
    return [_line(value) for value in head.values(name, at_most=IDS_MAX)]


def _line(text: str) -> str:
    return " ".join(text.encode("utf-8", "replace").decode().split())


def _blocks(part: mime.Part) -> list[mime.Head]:
    """Return the first `NOTICES_MAX` groups of fields of a report, which blank lines separate (RFC 3464 §2.1)."""
    groups = (group.lstrip() for group in _BLANK_LINES.split(part.content(REPORT_MAX).strip(), NOTICES_MAX))
    return [mime.read_head(group) for group in groups][:NOTICES_MAX]


def _field(block: mime.Head, name: str) -> str:
    """A field without its type: `rfc822; ann@example.com` is the address (RFC 3464 §2.1.2)."""
    value = next(iter(_values(block, name)), "")
    kind, typed, rest = value.partition(";")
    return rest.strip() if typed and re.fullmatch(r"[\w -]+", kind) else value


def _notice(block: mime.Head) -> Notice | None:
    """What a group of fields says about its recipient; None where the email came in, or it is no such group."""
    action = _field(block, "Action").partition(" ")[0].lower()
    if action not in _UNDELIVERED:
        return None
    addresses = {_field(block, name).strip("<>").lower() for name in ("Original-Recipient", "Final-Recipient")}
    diagnostic = _field(block, "Diagnostic-Code")
    status = _status(_field(block, "Status"), diagnostic)
    said = f"{'delayed' if action == 'delayed' else ''} {status or ''} {diagnostic}".strip()
    return _judged(frozenset(addresses - {""}), status, said, failed=action == "failed")


def _status(stated: str, diagnostic: str) -> str | None:
    """The stated one, unless what the server said tells more: many state 5.0.0 whatever it was."""
    found = _STATUS.search(stated)
    more = _STATUS.search(diagnostic)
    if found is None or (found[1].endswith(".0.0") and more is not None and more[1][0] == found[1][0]):
        found = more
    return found[1] if found is not None else None


def _judged(addresses: frozenset[str], status: str | None, said: str, *, failed: bool) -> Notice:
    kind = Kind.HARD if failed and status in HARD else Kind.SOFT
    return Notice(addresses, kind, status, _line(said)[:SAID_MAX])


def _complaint(block: mime.Head) -> list[Notice]:
    about = _field(block, "Feedback-Type").lower()
    if about not in _UNWANTED:
        return []
    addresses = frozenset(value.strip("<>").lower() for value in _values(block, "Original-Rcpt-To"))
    by = _field(block, "User-Agent") or _field(block, "Reporting-MTA")
    return [Notice(addresses, Kind.COMPLAINED, None, _line(f"{about} {f'({by})' if by else ''}")[:SAID_MAX])]


def _plain(head: mime.Head, texts: list[str]) -> list[Notice]:
    """What Exim and qmail write without a report in it: one notice, since they do not say what is about whom."""
    failed = ", ".join(_values(head, "X-Failed-Recipients"))
    text = next((one for one in texts if failed or _QMAIL.match(one)), None)
    if text is None:
        return []
    said = _COPY.split(text, maxsplit=1)[0]
    addresses = frozenset(one.lower() for one in _ADDRESS.findall(failed or " ".join(re.findall(r"(?m)^<.*>:", said))))
    statuses = {found for found in _STATUS.findall(said) if found.startswith("5")}
    status = statuses.pop() if len(statuses) == 1 and len(addresses) <= 1 else None
    reason = next((line for line in said.splitlines() if status and status in line), "") or _reason(said)
    return [_judged(addresses, status, reason, failed=True)]


def _reason(said: str) -> str:
    """Where the text comes to the point: what follows the first line that is an address alone."""
    found = _ADDRESS_ALONE.search(said)
    return said[found.end() :] if found else said

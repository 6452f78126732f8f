"""Parser of bounces and complaints. Knows nothing of the emails that were sent, and believes nothing.

It reads delivery status notifications (RFC 3464, RFC 6533), feedback reports (RFC 5965), and the texts of Exim and
qmail (`text_notices`). The input is hostile: anyone may write to a bounce address.
"""

import re
from hashlib import blake2b
from typing import Final

from outbox.feedback.notice import Bounce, Notice
from outbox.feedback.report_fields import IDS_MAX, NOTICES_MAX, groups, untyped, values, with_lf
from outbox.feedback.text_notices import is_from_a_person, notices_in_text, with_transcript
from outbox.mail import mime

READ_MAX: Final = 2_000_000  # bytes of a message: what a bounce says stands before what it returns
TEXT_MAX: Final = 256 * 1024  # bytes of a part with text
FORWARDS_MAX: Final = 3  # messages within messages that are searched for a bounce

_MESSAGE_ID: Final = re.compile(r"(?im)^message-id:[ \t]*(?:\r?\n[ \t]+)?(<[^<>\s]{1,900}>)")
_ID: Final = re.compile(r"<[^<>\s]{1,900}>")

_REPORT: Final = re.compile(r"(?:message|text|application)/(?:x-)?(?:global-)?delivery[-_]?status(?:-notification)?")
_RETURNED: Final = re.compile(r"(?:message|text)/(?:rfc-?822|global)(?:-?headers?)?")
_WHOLE: Final = re.compile(r"message/(?:rfc-?822|global)")
_REPORT_IN_TEXT: Final = re.compile(r"(?im)^final-recipient[ \t]{0,80}:")

_STATUS: Final = re.compile(r"(?<![\d.])([245])\.\d{1,3}\.\d{1,3}(?!\.?\d)")
_ADDRESSED: Final = ("To", "Delivered-To", "X-Original-To", "Envelope-To", "X-Envelope-To", "X-Delivered-To")
_SENT_WITH: Final = ("Original-Envelope-Id", "X-Postfix-Sender", "Original-Mail-From")
_UNWANTED: Final = frozenset(("abuse", "fraud", "opt-out", "complaint", "virus"))

# RFC 3464 §2.3.3 has failed, delayed, delivered, relayed and expanded; servers write these for them.
_FAILED: Final = re.compile(r"(?i)fail|undeliver|bounc|reject|return|refus|error|expire|perman|not[ -]?deliver")
_DELAYED: Final = re.compile(r"(?i)delay|defer|warn|queue|retr|trans|temp")
_DELIVERED: Final = re.compile(r"(?i)deliver|relay|expan|succe|sent|none")


def parse_bounce(raw: bytes) -> Bounce | None:
    """Return the content of a bounce or a complaint; None for other messages. Reads at most `READ_MAX` bytes.

    Raises:
        ValueError: no bounce was found in the part that was read, and the rest exceeds a limit of `mime`.

    """
    raw = raw[:READ_MAX]
    message = mime.parse(with_lf(raw).lstrip(b"\n"))
    found = _Reading(message).bounce(raw)
    if found is None and message.notes:
        raise ValueError(f"it cannot be read whole: {'; '.join(message.notes)}")
    return found


class _Reading:
    """Reading of one message: what its parts say, and what may prove which email it is about."""

    def __init__(self, message: mime.Message, depth: int = 0) -> None:
        self._message = message
        self._depth = depth
        head = message.head
        self._evidence = [value for name in _ADDRESSED for value in values(head, name)]
        self._ids = _ID.findall(" ".join(values(head, "In-Reply-To") + values(head, "References")))
        self._notices: list[Notice] = []
        self._texts: list[str] = []
        self._returned: list[bytes] = []

    def bounce(self, raw: bytes) -> Bounce | None:
        """Return what was found; None if it is no bounce."""
        for part in self._message.parts:
            self._read(part)
        text = self._texts[0] if self._texts else ""
        if not self._notices:
            self._notices = notices_in_text(self._message.head, text)
        if not self._notices:
            return self._forwarded()
        if any(not (one.diagnostic or one.complaint) for one in self._notices):
            self._notices = with_transcript(self._notices, text)
        self._ids += [found for text in self._texts for found in _MESSAGE_ID.findall(text)]
        message_id = " ".join(values(self._message.head, "Message-ID")).strip()
        identity = blake2b(message_id.encode("utf-8", "replace") or raw, digest_size=16).hexdigest()
        ids = tuple(dict.fromkeys(self._ids))[:IDS_MAX]
        return Bounce(identity, tuple(self._notices[:NOTICES_MAX]), " ".join(self._evidence), ids)

    def _read(self, part: mime.Part) -> None:
        if _REPORT.fullmatch(part.type):
            self._read_report(groups(part))
        elif part.type == "message/feedback-report":
            for group in groups(part):
                self._note_evidence(group)
                self._notices += _complaint(group)
        elif _RETURNED.fullmatch(part.type):
            content = with_lf(part.content()).lstrip() if _WHOLE.fullmatch(part.type) else b""
            if content and len(self._returned) < FORWARDS_MAX:
                self._returned.append(content)
            returned = mime.read_head(content[: mime.HEAD_MAX] or with_lf(part.content(mime.HEAD_MAX)).lstrip())
            self._evidence += values(returned, "Return-Path")
            self._ids += [found for value in values(returned, "Message-ID") for found in _ID.findall(value)]
        elif part.type.startswith(("text/", "multipart/")):  # the latter if it has no boundary of its own
            text = part.text(TEXT_MAX)
            self._texts.append(text)
            # Some writers put the report into the text, and some gateways turn it into text.
            if _REPORT_IN_TEXT.search(text) and not is_from_a_person(self._message.head):
                self._read_report(groups(part, in_text=True))

    def _read_report(self, groups: list[mime.Head]) -> None:
        for group in groups:
            self._note_evidence(group)
            notice = _notice(group)
            if notice is not None:
                self._notices.append(notice)

    def _note_evidence(self, group: mime.Head) -> None:
        self._evidence += [value for name in _SENT_WITH for value in values(group, name)]

    def _forwarded(self) -> Bounce | None:
        """Return the bounce that this message carries as an attachment, as when a person forwards it."""
        if self._depth == FORWARDS_MAX:
            return None
        for content in self._returned:
            inner = _Reading(mime.parse(content), self._depth + 1)
            found = inner.bounce(content)
            if found is not None:
                evidence = " ".join([found.evidence, *self._evidence])
                return Bounce(found.identity, found.notices, evidence, found.message_ids)
        return None


def _notice(group: mime.Head) -> Notice | None:
    """Return what a group of fields says about its recipient; None if the email arrived, or it is no such group."""
    final, original, actual = (
        next(iter(values(group, name)), "") for name in ("Final-Recipient", "Original-Recipient", "X-Actual-Recipient")
    )
    actions = [untyped(value) for value in values(group, "Action")] or [""]
    stated = " ".join(values(group, "Status"))  # of several the mildest counts
    effects = [_has_failed(action, stated) for action in actions]
    has_failed = False if False in effects else effects[0]
    if has_failed is None or not (actions[0] or final or original):
        return None
    diagnostics = values(group, "Diagnostic-Code") + values(group, "X-Supplementary-Info")  # Exchange has the latter
    diagnostic = " ".join(untyped(value) for value in diagnostics)
    return Notice(final, original, actual, has_failed, stated, diagnostic)


def _has_failed(action: str, status: str) -> bool | None:
    """Return True for a failure, False for a delay, None if the email arrived. Without an action the status decides."""
    if _FAILED.match(action):
        return True
    if _DELAYED.match(action):
        return False
    found = _STATUS.search(status)
    if _DELIVERED.match(action) or found is None or found[1] == "2":
        return None
    return found[1] == "5"


def _complaint(group: mime.Head) -> list[Notice]:
    about = untyped(next(iter(values(group, "Feedback-Type")), "")).lower()
    if about not in _UNWANTED:
        return []
    by = " ".join((values(group, "User-Agent") or values(group, "Reporting-MTA"))[:1])
    complaint = f"{about} ({untyped(by)})" if by else about
    final = next(iter(values(group, "Original-Rcpt-To")), "")
    return [Notice(final, complaint=complaint)]

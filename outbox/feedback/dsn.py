"""Parser of bounces and complaints. Knows nothing of the emails that were sent, and believes nothing.

It reads delivery status notifications (RFC 3464, RFC 6533), feedback reports (RFC 5965), and the texts of Exim and
qmail. `bounce_class` decides what a failure weighs. The input is hostile: anyone may write to a bounce address.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from hashlib import blake2b
from itertools import islice, zip_longest
from typing import Final
from unicodedata import category, normalize

from outbox.feedback.bounce_class import HARD, Judged, judge
from outbox.mail import mime

__all__ = ["HARD", "READ_MAX", "Bounce", "Finding", "Kind", "Notice", "normal_address", "take_apart"]

READ_MAX: Final = 2_000_000  # bytes of a message: what a bounce says stands before what it returns
REPORT_MAX: Final = 256 * 1024  # bytes of a part with fields
TEXT_MAX: Final = 256 * 1024  # bytes of a part with text
LINES_MAX: Final = 50_000  # of a part with fields
NOTICES_MAX: Final = 1000
JUDGED_MAX: Final = 100  # notices about one recipient
SAID_MAX: Final = 400
IDS_MAX: Final = 20
FORWARDS_MAX: Final = 3  # messages within messages that are searched for a bounce

_MESSAGE_ID: Final = re.compile(r"(?im)^message-id:[ \t]*(?:\r?\n[ \t]+)?(<[^<>\s]{1,900}>)")
_ID: Final = re.compile(r"<[^<>\s]{1,900}>")
# Anyone may send such a text: each expression begins where a word or a line does, and looks a bounded way ahead.
_ADDRESS: Final = re.compile(r"(?<![^\s<>,;\"])[^\s<>,;\"@]{1,64}@[^\s<>,;\"]{1,255}")
_ADDRESS_ALONE: Final = re.compile(r"(?m)^[ \t]{0,80}<?([^\s<>@]{1,64}@[^\s<>:]{1,255})>?:?[ \t\r]{0,80}$")
_COPY: Final = re.compile(
    r"(?im)^(?:-+ ?(?:below this line|this is a copy|original message|the header of)|return-path:|received:"
    r"|dkim-signature:).*$"
)
_LINE_ENDS: Final = re.compile(rb"\r++(\n?)")
# QSBMF, https://cr.yp.to/proto/qsbmf.txt: the first paragraph, one paragraph for each recipient, and a line with "-".
_QMAIL: Final = re.compile(r"\s{0,200}Hi\. This is the ")
_QMAIL_END: Final = re.compile(r"(?m)^-")
_QMAIL_RECIPIENT: Final = re.compile(r"(?m)(?:\A|\n[ \t\r]{0,80}\n)<([^<>\n]{1,320})>:[ \t\r]{0,80}\n")

_REPORT: Final = re.compile(r"(?:message|text|application)/(?:x-)?(?:global-)?delivery[-_]?status(?:-notification)?")
_RETURNED: Final = re.compile(r"(?:message|text)/(?:rfc-?822|global)(?:-?headers?)?")
_WHOLE: Final = re.compile(r"message/(?:rfc-?822|global)")
_REPORT_IN_TEXT: Final = re.compile(r"(?im)^final-recipient[ \t]{0,80}:")

# The fields of a report. A line that begins with anything else goes on with the line before it, folded or not.
_FIELD: Final = re.compile(
    rb"(?i)(reporting-mta|dsn-gateway|received-from-mta|arrival-date|(?:original-)?envelope-id|final-recipient"
    rb"|original-recipient|action|status|remote-mta|diagnostic-code|last-attempt-date|final-log-id|will-retry-until"
    rb"|original-mail-from|original-rcpt-to|feedback-type|user-agent|version|source-ip|reported-[a-z]+"
    rb"|localized-diagnostic|x-[a-z0-9_-]{1,60})[ \t]*:"
)
_RECIPIENT_FIELDS: Final = ("original-recipient", "final-recipient")
# `rfc822;`, `utf-8;`, `x-unix;`, `rfc/822;`, `rfc822 (SMTP);`; some writers put it twice.
_TYPE: Final = re.compile(r"(?:\s*[A-Za-z][\w./-]{0,40}\s*(?:\([^()]{0,80}\)\s*)?;\s*){1,2}", re.ASCII)
_STATUS: Final = re.compile(r"(?<![\d.])([245])\.\d{1,3}\.\d{1,3}(?!\.?\d)")
_REPLY_LINE: Final = re.compile(r"(?m)^.{0,200}?\b([45]\d\d[ -]\S.{0,300})$")
_ADDRESSED: Final = ("To", "Delivered-To", "X-Original-To", "Envelope-To", "X-Envelope-To", "X-Delivered-To")
_SENT_WITH: Final = ("Original-Envelope-Id", "X-Postfix-Sender", "Original-Mail-From")
_UNWANTED: Final = frozenset(("abuse", "fraud", "opt-out", "complaint", "virus"))
_DAEMONS: Final = re.compile(r"(?i)mailer[-_. ]?daemon|post-?master|mail[-_. ]?delivery|no-?reply|bounce")

# RFC 3464 §2.3.3 has failed, delayed, delivered, relayed and expanded; servers write these for them.
_FAILED: Final = re.compile(r"(?i)fail|undeliver|bounc|reject|return|refus|error|expire|perman|not[ -]?deliver")
_DELAYED: Final = re.compile(r"(?i)delay|defer|warn|queue|retr|trans|temp")
_DELIVERED: Final = re.compile(r"(?i)deliver|relay|expan|succe|sent|none")

_AFTER_ADDRESS: Final = ".:!?'()[]"
_HELP: Final = re.compile(
    r"(?i)(?:mailto:)?(?:post-?master|hostmaster|abuse|support|help|helpdesk|contact|noc|security)@"
)
_QUOTED_DOMAIN: Final = re.compile(
    r"(?i)\b(?:domain|such host):? {0,2}[<'(\[]?([a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63}){1,9})"
)
_XTEXT: Final = re.compile(r"\+([2-6][0-9A-F]|7[0-9A-E])")  # RFC 3461 §4, without control characters
_NOT_IN_ADDRESSES: Final = frozenset(("Cc", "Cs", "Zl", "Zp"))  # control characters, surrogates, separators of lines
_UNITEXT: Final = re.compile(r"\\x\{([0-9A-Fa-f]{1,6})\}")  # RFC 6533 §3


class Kind(StrEnum):
    """Effect of a bounce: the address does not exist, only this email did not arrive, or the reader complained."""

    HARD = "hard"
    SOFT = "soft"
    COMPLAINED = "complained"


@dataclass(frozen=True)
class Notice:
    """Statement of a report about one recipient.

    `final`, `original` and `actual` are the values of the fields of these names, "" if they are missing: the address
    that failed, the one that the email was sent to, and the one that an alias of the reporting server led to.
    """

    final: str
    original: str = ""
    actual: str = ""
    has_failed: bool = True
    stated: str = ""
    diagnostic: str = ""
    transcript: str = ""
    complaint: str = ""

    @cached_property
    def addresses(self) -> frozenset[str]:
        """Return the addresses that it names, in the forms in which they can be compared."""
        return frozenset(form for value in (self.final, self.original) for form in _forms(value))

    @cached_property
    def judged(self) -> Judged:
        """Return what it weighs against the recipient that it names."""
        return judge(self.stated, self.diagnostic, quoted=self.transcript)

    @property
    def kind(self) -> Kind:
        """Return what follows for the recipient that it names."""
        if self.complaint:
            return Kind.COMPLAINED
        return Kind.HARD if self.has_failed and self.judged.is_hard else Kind.SOFT

    @property
    def status(self) -> str | None:
        """Return the status that decided (RFC 3463)."""
        return None if self.complaint else self.judged.status

    @property
    def said(self) -> str:
        """Return the status and the server's words on one line."""
        delayed = "" if self.has_failed else "delayed"
        return _line(self.complaint or f"{delayed} {self.status or ''} {self.diagnostic or self.transcript}")[:SAID_MAX]

    def is_about(self, recipient: str) -> bool:
        """Return True if it is this recipient's address that failed, and not one that the address leads to.

        An alias forwards to other addresses. When one of them fails, a report names it as its Final-Recipient, as
        X-Actual-Recipient (Sendmail) or in the words of the server ("550 <left@example.com>: User unknown"), and the
        alias at most as Original-Recipient: the alias itself works.
        """
        ours = normal_address(recipient)
        local, _, domain = ours.rpartition("@")
        if self.actual and not _is_same_mailbox(self.actual, ours):
            return False
        said = (self.diagnostic or self.transcript)[:SAID_MAX]
        quoted = [one for one in _ADDRESS.findall(said) if not _HELP.match(one)]
        if quoted and not any(_is_same_mailbox(one.rstrip(_AFTER_ADDRESS), ours) for one in quoted):
            return False
        domains = [one.lower() for one in _QUOTED_DOMAIN.findall(said)]
        if domains and not any(_is_same_domain(one, domain) for one in domains):
            return False
        named = next((value for value in (self.final, self.original) if _untyped(value)), "")
        if not named:
            return any(normal_address(one.rstrip(_AFTER_ADDRESS)) == ours for one in quoted)
        return ours in _forms(named) or ("@" not in named and _address_in(named).lower() == local != "")

    def is_related(self, recipient: str) -> bool:
        """Return True if it names this recipient at all."""
        return normal_address(recipient) in self.addresses

    def is_from(self, recipient: str) -> bool:
        """Return True if a complaint can be this recipient's.

        Feedback reports may hide the name before the @ (RFC 6590), but an address of another domain is someone
        else's, to whom the email was passed on.
        """
        domains = {form.rpartition("@")[2] for form in _forms(self.final) if "@" in form}
        return not domains or normal_address(recipient).rpartition("@")[2] in domains


@dataclass(frozen=True, slots=True)
class Finding:
    """What a bounce says about the recipient of an email.

    `counts` is True if it is a failure that counts towards `bounces_max`.
    """

    kind: Kind
    status: str | None
    said: str
    counts: bool


@dataclass(frozen=True, slots=True)
class Bounce:
    """Content of a bounce or a complaint. In `evidence` a token may stand.

    `identity` is the same each time that this message is read.
    """

    identity: str
    notices: tuple[Notice, ...]
    evidence: str
    message_ids: tuple[str, ...]

    def about(self, recipient: str) -> Finding:
        """Return what it says about the recipient of the email that it is about; of several notices the mildest.

        A notice about another address never says more than that this email did not arrive there.
        """
        if complaint := next((one for one in self.notices if one.complaint), None):
            if complaint.is_from(recipient):
                return Finding(Kind.COMPLAINED, None, complaint.said, counts=False)
            return _of_another(complaint, recipient)
        ours = [one for one in self.notices if one.is_about(recipient)][:JUDGED_MAX]
        if not ours:
            related = (one for one in self.notices if one.is_related(recipient))
            return _of_another(next(related, self.notices[0]), recipient)
        failed = [one for one in ours if one.has_failed]
        one = next((one for one in failed or ours if one.kind is Kind.SOFT), (failed or ours)[0])
        counts = one.kind is Kind.SOFT and one.has_failed and one.judged.counts
        return Finding(one.kind, one.status, one.said, counts=counts)


def _of_another(notice: Notice, recipient: str) -> Finding:
    other = _line(_untyped(notice.actual or notice.final))
    is_known = other and normal_address(_address_in(other)) != normal_address(recipient)
    said = f"{other}: {notice.said}" if is_known else notice.said
    return Finding(Kind.SOFT, notice.status, said[:SAID_MAX], counts=False)


def take_apart(raw: bytes) -> Bounce | None:
    """Return the content of a bounce or a complaint; None for other messages. Reads at most `READ_MAX` bytes.

    Raises:
        ValueError: no bounce was found in the part that was read, and the rest exceeds a limit of `mime`.

    """
    raw = raw[:READ_MAX]
    message = mime.parse(_with_lf(raw).lstrip(b"\n"))
    found = _Reading(message).bounce(raw)
    if found is None and message.notes:
        raise ValueError(f"it cannot be read whole: {'; '.join(message.notes)}")
    return found


def _with_lf(raw: bytes) -> bytes:
    """Return the message with LF at the end of each line, whatever mixture of CR, CRLF and LF it has."""
    if b"\r" not in raw:
        return raw
    raw = raw.replace(b"\r\n", b"\n")
    return _LINE_ENDS.sub(lambda run: b"\n" if run[1] else b"\n" * len(run[0]), raw) if b"\r" in raw else raw


class _Reading:
    """One message on its way to a `Bounce`: what its parts say, and what may prove which email it is about."""

    def __init__(self, message: mime.Message, depth: int = 0) -> None:
        self._message = message
        self._depth = depth
        head = message.head
        self._evidence = [value for name in _ADDRESSED for value in _values(head, name)]
        self._ids = _ID.findall(" ".join(_values(head, "In-Reply-To") + _values(head, "References")))
        self._notices: list[Notice] = []
        self._texts: list[str] = []
        self._returned: list[bytes] = []

    def bounce(self, raw: bytes) -> Bounce | None:
        """Return what was found; None if it is no bounce."""
        for part in self._message.parts:
            self._read(part)
        if not self._notices:
            self._read_text()
        if not self._notices:
            return self._forwarded()
        if any(not (one.diagnostic or one.complaint) for one in self._notices):
            self._add_transcript()
        self._ids += [found for text in self._texts for found in _MESSAGE_ID.findall(text)]
        said = " ".join(_values(self._message.head, "Message-ID")).strip()
        identity = blake2b(said.encode("utf-8", "replace") or raw, digest_size=16).hexdigest()
        ids = tuple(dict.fromkeys(self._ids))[:IDS_MAX]
        return Bounce(identity, tuple(self._notices[:NOTICES_MAX]), " ".join(self._evidence), ids)

    def _read(self, part: mime.Part) -> None:
        if _REPORT.fullmatch(part.type):
            self._read_report(_groups(part))
        elif part.type == "message/feedback-report":
            for group in _groups(part):
                self._note_evidence(group)
                self._notices += _complaint(group)
        elif _RETURNED.fullmatch(part.type):
            content = _with_lf(part.content()).lstrip() if _WHOLE.fullmatch(part.type) else b""
            if content and len(self._returned) < FORWARDS_MAX:
                self._returned.append(content)
            returned = mime.read_head(content[: mime.HEAD_MAX] or _with_lf(part.content(mime.HEAD_MAX)).lstrip())
            self._evidence += _values(returned, "Return-Path")
            self._ids += [found for value in _values(returned, "Message-ID") for found in _ID.findall(value)]
        elif part.type.startswith(("text/", "multipart/")):  # the latter if it has no boundary of its own
            text = part.text(TEXT_MAX)
            self._texts.append(text)
            # Some writers put the report into the text, and some gateways turn it into text.
            if _REPORT_IN_TEXT.search(text) and not _is_from_a_person(self._message.head):
                self._read_report(_groups(part, in_text=True))

    def _read_report(self, groups: list[mime.Head]) -> None:
        for group in groups:
            self._note_evidence(group)
            notice = _notice(group)
            if notice is not None:
                self._notices.append(notice)

    def _note_evidence(self, group: mime.Head) -> None:
        self._evidence += [value for name in _SENT_WITH for value in _values(group, name)]

    def _read_text(self) -> None:
        """Read what Exim and qmail write without a report in it."""
        text = self._texts[0] if self._texts else ""
        failed = _values(self._message.head, "X-Failed-Recipients")
        if failed:
            self._notices = _of_exim(failed, text)
        elif _QMAIL.match(text) and not _is_from_a_person(self._message.head):
            self._notices = _of_qmail(text)

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

    def _add_transcript(self) -> None:
        """Give notices without words of the server those that the text quotes, as Sendmail's transcript does."""
        text = _COPY.split(self._texts[0], maxsplit=1)[0] if self._texts else ""
        quoted = _line(" ".join(_REPLY_LINE.findall(text[:REPORT_MAX])[:10]))
        if quoted:
            self._notices = [
                one
                if one.diagnostic or one.complaint
                else Notice(one.final, one.original, one.actual, one.has_failed, one.stated, "", quoted)
                for one in self._notices
            ]


def _values(head: mime.Head, name: str) -> list[str]:
    return [_line(value) for value in head.values(name, at_most=IDS_MAX)]


def _line(text: str) -> str:
    return " ".join(text.encode("utf-8", "replace").decode().split())


def _groups(part: mime.Part, *, in_text: bool = False) -> list[mime.Head]:
    """Return the groups of fields of a report: one for the message, then one for each recipient (RFC 3464 §2.1).

    Blank lines separate them, but some writers leave them out, add some, or break a diagnostic into lines that are not
    folded. So a group also begins where a field of the recipient comes again, a group without a recipient belongs to
    the one before it, and a line that begins with no field of reports goes on with the line before it.
    """
    chunks: list[list[bytes]] = [[]]
    names: set[str] = set()
    after_blank = False
    is_indented = False
    for line in _with_lf(part.content(REPORT_MAX)).split(b"\n", LINES_MAX)[:LINES_MAX]:
        if not line.strip():
            after_blank = True
            continue
        # A gateway may indent the whole report.
        dedented = line.lstrip() if is_indented or after_blank or not chunks[-1] else line
        found = _FIELD.match(dedented)
        is_indented = found is not None and dedented != line
        if found is None:
            if in_text and names and line.startswith(b"--"):
                break  # what follows the report in the text, or in a multipart that has lost its boundary
            if chunks[-1]:
                chunks[-1].append(b" " + line.strip())
            continue
        name = found[1].decode("ascii").lower()
        if chunks[-1] and (after_blank or (name in _RECIPIENT_FIELDS and name in names)):
            if len(chunks) > NOTICES_MAX:
                break
            chunks.append([])
            names = set()
        after_blank = False
        names.add(name)
        chunks[-1].append(dedented)
    found_groups = [group for group in map(_head_of, chunks) if group.fields]
    # The blank line after the part's own header may be missing: then the first fields stand there.
    if any(part.head.value(name) for name in ("Final-Recipient", "Action", "Original-Envelope-Id")):
        found_groups.insert(0, part.head)
    return _joined(found_groups)


def _head_of(lines: list[bytes]) -> mime.Head:
    return mime.read_head(b"\n".join(lines))


def _joined(groups: list[mime.Head]) -> list[mime.Head]:
    """Return the groups, each that has no recipient joined to the recipient before it."""
    made: list[mime.Head] = []
    for group in groups:
        if made and _names_a_recipient(made[-1]) and not _names_a_recipient(group):
            made[-1] = mime.Head(made[-1].fields + group.fields)
        else:
            made.append(group)
    return made


def _names_a_recipient(group: mime.Head) -> bool:
    return any(group.value(name) for name in _RECIPIENT_FIELDS)


def _untyped(value: str) -> str:
    """Return a field's value without its type: `rfc822; ann@example.com` is the address (RFC 3464 §2.1.2)."""
    found = _TYPE.match(value)
    return value[found.end() :].strip() if found is not None else value.strip()


def _notice(group: mime.Head) -> Notice | None:
    """Return what a group of fields says about its recipient; None if the email arrived, or it is no such group."""
    final, original, actual = (
        next(iter(_values(group, name)), "") for name in ("Final-Recipient", "Original-Recipient", "X-Actual-Recipient")
    )
    actions = [_untyped(value) for value in _values(group, "Action")] or [""]
    stated = " ".join(_values(group, "Status"))  # of several the mildest counts
    effects = [_has_failed(action, stated) for action in actions]
    has_failed = False if False in effects else effects[0]
    if has_failed is None or not (actions[0] or final or original):
        return None
    said = _values(group, "Diagnostic-Code") + _values(group, "X-Supplementary-Info")  # Exchange has the latter
    diagnostic = " ".join(_untyped(value) for value in said)
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
    about = _untyped(next(iter(_values(group, "Feedback-Type")), "")).lower()
    if about not in _UNWANTED:
        return []
    by = " ".join((_values(group, "User-Agent") or _values(group, "Reporting-MTA"))[:1])
    said = f"{about} ({_untyped(by)})" if by else about
    final = next(iter(_values(group, "Original-Rcpt-To")), "")
    return [Notice(final, complaint=said)]


def _of_exim(failed: list[str], text: str) -> list[Notice]:
    """Return what Exim says: each address stands alone on a line, and what was said about it on the next ones."""
    said = _COPY.split(text, maxsplit=1)[0]
    addresses = list(dict.fromkeys(_ADDRESS.findall(", ".join(failed))))[:NOTICES_MAX] or [""]
    about = {one[1].lower(): rest for one, rest in _each_with_rest(_ADDRESS_ALONE, said)}
    whole = about.get(addresses[0].lower(), said) if len(addresses) == 1 else ""
    return [Notice(one, diagnostic=_line(about.get(one.lower(), whole)), stated="") for one in addresses]


def _of_qmail(text: str) -> list[Notice]:
    """Return what qmail says: after its first paragraph, one that begins with `<address>:` for each recipient."""
    said = text[: end.start()] if (end := _QMAIL_END.search(text)) is not None else text
    return [
        Notice(one[1], diagnostic=_line(rest.split("\n\n", 1)[0]))
        for one, rest in _each_with_rest(_QMAIL_RECIPIENT, said)
    ]


def _each_with_rest(pattern: re.Pattern[str], text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Yield each match with the text between it and the next one."""
    found = list(islice(pattern.finditer(text), NOTICES_MAX))
    for one, following in zip_longest(found, found[1:]):
        yield one, text[one.end() : following.start() if following is not None else len(text)]


def _is_from_a_person(head: mime.Head) -> bool:
    """Return True if the message answers another one, or is from no mail system and has no null return path."""
    if head.value("In-Reply-To") or head.value("References"):
        return True
    return_path = head.value("Return-Path").strip()
    if return_path in ("<>", "<#@[]>"):  # qmail's double bounce has the second one
        return False
    return not (_DAEMONS.search(head.value("From")) or _DAEMONS.search(return_path))


def _forms(value: str) -> Iterator[str]:
    """Yield the address in a field's value, and what it is if it is encoded as RFC 3461 or RFC 6533 encode one."""
    address = _address_in(value)
    if not address:
        return
    yield normal_address(address)
    if "+" in address:
        decoded = _XTEXT.sub(lambda found: chr(int(found[1], 16)), address)
        yield normal_address(_UNITEXT.sub(_character, decoded))
    if "\\x{" in address:
        yield normal_address(_UNITEXT.sub(_character, address))


def _character(found: re.Match[str]) -> str:
    code = int(found[1], 16)
    if code > sys.maxunicode or category(chr(code)) in _NOT_IN_ADDRESSES:
        return found[0]
    return chr(code)


def _address_in(value: str) -> str:
    value = _untyped(value)[:2000].rstrip(";, ")
    _, opened, rest = value.partition("<")
    if opened:
        return rest.partition(">")[0].strip()
    return value.partition(" ")[0].strip() if '"' not in value else value.strip()


def normal_address(address: str) -> str:
    """Return an address in the one form in which addresses are compared, as `message.comparable` does where it can."""
    local, at, domain = normalize("NFC", address.strip()).rpartition("@")
    if not at:
        return address.strip().lower()
    local = local.rpartition(":")[2] if local.startswith("@") else local  # a source route (RFC 5321 §C)
    if len(local) > 1 and local[0] == local[-1] == '"':
        local = re.sub(r"\\(.)", r"\1", local[1:-1])
    return f"{local.encode('utf-8', 'replace').lower().decode()}@{_ascii_domain(domain.rstrip('.').lower())}"


def _ascii_domain(domain: str) -> str:
    if domain.isascii() or len(domain) > 255:  # noqa: PLR2004
        return domain
    import idna

    try:
        return idna.encode(domain, uts46=True).decode("ascii")
    except (idna.IDNAError, UnicodeError):
        return domain


def _is_same_mailbox(actual: str, ours: str) -> bool:
    """Return True if X-Actual-Recipient is the recipient's own mailbox: the address, or the same name on its host."""
    local, _, domain = ours.rpartition("@")
    for form in _forms(actual):
        name, at, host = form.rpartition("@")
        if form in (ours, local) or (at and name == local and _is_same_domain(host, domain)):
            return True
    return False


def _is_same_domain(host: str, domain: str) -> bool:
    """Return True if one of the two is the other or a part of it."""
    return host == domain or host.endswith(f".{domain}") or domain.endswith(f".{host}")

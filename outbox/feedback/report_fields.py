"""Fields of a report (RFC 3464 §2.1): read with bounds, joined to groups, one for each recipient.

The input is hostile: each expression begins where a word or a line does, and looks a bounded way ahead.
"""

import re
from typing import Final

from outbox.mail import mime

REPORT_MAX: Final = 256 * 1024  # bytes of a part with fields
LINES_MAX: Final = 50_000  # of a part with fields
NOTICES_MAX: Final = 1000
IDS_MAX: Final = 20

_LINE_ENDS: Final = re.compile(rb"\r++(\n?)")

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


def values(head: mime.Head, name: str) -> list[str]:
    """Return the first values of a field, at most `IDS_MAX`, each on one line."""
    return [one_line(value) for value in head.values(name, at_most=IDS_MAX)]


def one_line(text: str) -> str:
    """Return the text with single spaces for white space, and without surrogates that stand alone."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def with_lf(raw: bytes) -> bytes:
    """Return the message with LF at the end of each line, whatever mixture of CR, CRLF and LF it has."""
    if b"\r" not in raw:
        return raw
    raw = raw.replace(b"\r\n", b"\n")
    return _LINE_ENDS.sub(lambda run: b"\n" if run[1] else b"\n" * len(run[0]), raw) if b"\r" in raw else raw


def untyped(value: str) -> str:
    """Return a field's value without its type: `rfc822; ann@example.com` is the address (RFC 3464 §2.1.2)."""
    found = _TYPE.match(value)
    return value[found.end() :].strip() if found is not None else value.strip()


def groups(part: mime.Part, *, in_text: bool = False) -> list[mime.Head]:
    """Return the groups of fields of a report: one for the message, then one for each recipient (RFC 3464 §2.1).

    Blank lines separate them, but some writers leave them out, add some, or break a diagnostic into lines that are not
    folded. So a group also begins where a field of the recipient comes again, a group without a recipient belongs to
    the one before it, and a line that begins with no field of reports goes on with the line before it.
    """
    chunks: list[list[bytes]] = [[]]
    names: set[str] = set()
    after_blank = False
    is_indented = False
    for line in with_lf(part.content(REPORT_MAX)).split(b"\n", LINES_MAX)[:LINES_MAX]:
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

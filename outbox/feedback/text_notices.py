"""Texts of mail systems that write no report: Exim, qmail, and the transcript that Sendmail quotes.

Anyone may send such a text: each expression begins where a word or a line does, and looks a bounded way ahead.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, zip_longest
from typing import Final

from outbox.feedback.notice import Notice
from outbox.feedback.report_fields import NOTICES_MAX, REPORT_MAX, one_line, values
from outbox.feedback.reported_address import ADDRESS
from outbox.mail import mime

_ADDRESS_ALONE: Final = re.compile(r"(?m)^[ \t]{0,80}<?([^\s<>@]{1,64}@[^\s<>:]{1,255})>?:?[ \t\r]{0,80}$")
_COPY: Final = re.compile(
    r"(?im)^(?:-+ ?(?:below this line|this is a copy|original message|the header of)|return-path:|received:"
    r"|dkim-signature:).*$"
)
# QSBMF, https://cr.yp.to/proto/qsbmf.txt: the first paragraph, one paragraph for each recipient, and a line with "-".
_QMAIL: Final = re.compile(r"\s{0,200}Hi\. This is the ")
_QMAIL_END: Final = re.compile(r"(?m)^-")
_QMAIL_RECIPIENT: Final = re.compile(r"(?m)(?:\A|\n[ \t\r]{0,80}\n)<([^<>\n]{1,320})>:[ \t\r]{0,80}\n")
_REPLY_LINE: Final = re.compile(r"(?m)^.{0,200}?\b([45]\d\d[ -]\S.{0,300})$")
_DAEMONS: Final = re.compile(r"(?i)mailer[-_. ]?daemon|post-?master|mail[-_. ]?delivery|no-?reply|bounce")


def notices_in_text(head: mime.Head, text: str) -> list[Notice]:
    """Return what Exim or qmail says in a text without a report; nothing for other texts."""
    failed = values(head, "X-Failed-Recipients")
    if failed:
        return _of_exim(failed, text)
    if _QMAIL.match(text) and not is_from_a_person(head):
        return _of_qmail(text)
    return []


def with_transcript(notices: list[Notice], text: str) -> list[Notice]:
    """Return the notices; those without words of the server have those that the text quotes, as Sendmail does."""
    quoted = one_line(" ".join(_REPLY_LINE.findall(_COPY.split(text, maxsplit=1)[0][:REPORT_MAX])[:10]))
    if not quoted:
        return notices
    return [
        one if one.diagnostic or one.complaint else replace(one, diagnostic="", transcript=quoted) for one in notices
    ]


def is_from_a_person(head: mime.Head) -> bool:
    """Return True if the message answers another one, or is from no mail system and has no null return path."""
    if head.value("In-Reply-To") or head.value("References"):
        return True
    return_path = head.value("Return-Path").strip()
    if return_path in ("<>", "<#@[]>"):  # qmail's double bounce has the second one
        return False
    return not (_DAEMONS.search(head.value("From")) or _DAEMONS.search(return_path))


def _of_exim(failed: list[str], text: str) -> list[Notice]:
    """Return what Exim says: each address stands alone on a line, and the server's words about it on the next ones."""
    body = _COPY.split(text, maxsplit=1)[0]
    addresses = list(dict.fromkeys(ADDRESS.findall(", ".join(failed))))[:NOTICES_MAX] or [""]
    about = {one[1].lower(): rest for one, rest in _each_with_rest(_ADDRESS_ALONE, body)}
    whole = about.get(addresses[0].lower(), body) if len(addresses) == 1 else ""
    return [Notice(one, diagnostic=one_line(about.get(one.lower(), whole)), stated="") for one in addresses]


def _of_qmail(text: str) -> list[Notice]:
    """Return what qmail says: after its first paragraph, one that begins with `<address>:` for each recipient."""
    body = text[: end.start()] if (end := _QMAIL_END.search(text)) is not None else text
    return [
        Notice(one[1], diagnostic=one_line(rest.split("\n\n", 1)[0]))
        for one, rest in _each_with_rest(_QMAIL_RECIPIENT, body)
    ]


def _each_with_rest(pattern: re.Pattern[str], text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Yield each match with the text between it and the next one."""
    found = list(islice(pattern.finditer(text), NOTICES_MAX))
    for one, following in zip_longest(found, found[1:]):
        yield one, text[one.end() : following.start() if following is not None else len(text)]

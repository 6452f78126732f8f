"""Further header fields, each written in its own syntax (RFC 5322 §2.2, RFC 2047 §5).

Programs read structured fields: an encoded message id or URL means nothing to them. So these fields are folded, and
text is encoded only in a phrase or a comment of theirs. Every other field is free text. `outbox.header_field` in
`schema.sql` is the same rule in SQL; the tests run one table of cases through both.
"""

import re
from collections.abc import Mapping
from typing import Final

from outbox.mail.header_fields import (
    CARRIERS,
    FIELD_NAME,
    HARD_LINE_MAX,
    LINE_MAX,
    OURS,
    encoded_words,
    folded,
    one_line,
    text_field,
)
from outbox.mail.mailbox import listed, mailbox_words, parse_mailbox, phrase

_ONE_MAILBOX: Final = frozenset({"sender", "resent-sender"})
_MAILBOXES: Final = _ONE_MAILBOX | {
    "from", "to", "cc", "bcc", "reply-to", "resent-from", "resent-to", "resent-cc", "resent-bcc", "errors-to",
    "disposition-notification-to", "return-receipt-to", "mail-followup-to", "mail-reply-to",
}  # fmt: skip
_PHRASES: Final = frozenset({"keywords"})
_LIST_ID: Final = "list-id"
# Ids, URLs, dates and keywords of protocols: ASCII, with comments at most.
_TOKENS: Final = frozenset({
    "message-id", "in-reply-to", "references", "resent-message-id", "content-id", "original-message-id", "supersedes",
    "obsoletes", "date", "resent-date", "expires", "expiry-date", "reply-by", "deferred-delivery",
    "latest-delivery-time", "list-help", "list-unsubscribe", "list-unsubscribe-post", "list-subscribe", "list-post",
    "list-owner", "list-archive", "archived-at", "feedback-id", "auto-submitted", "precedence", "importance",
    "priority", "sensitivity", "content-language", "accept-language", "content-location", "content-base",
    "content-disposition", "content-type", "content-transfer-encoding", "mime-version", "original-recipient",
    "authentication-results", "received-spf", "arc-seal", "arc-message-signature", "arc-authentication-results",
    "require-recipient-valid-since", "mt-priority", "tls-required", "bimi-selector", "autocrypt",
})  # fmt: skip

# No two alternatives begin with the same character, so that Postgres, which takes the longest, finds the same.
_BALANCED: Final = re.compile(r'(?:[^"\\]|\\.|"(?:[^"\\]|\\.)*")*')
_ITEM: Final = re.compile(r'(?:[^",\\]|\\.|"(?:[^"\\]|\\.)*")+')
_PIECE: Final = re.compile(r'<[^<>]*>|"[^"]*"|\([^()]*\)|[^<"(]+|[<"(]')
_BETWEEN: Final = re.compile(r">(,?)<")
_NAMED_ID: Final = re.compile(r'(?P<name>"(?:[^"\\]|\\.)*" *|[^"<>]*)<(?P<id>[!-;=?-~]+)>')
_BARE_ID: Final = re.compile(r"[!-;=?-~]+")


def extra_field(field: str, value: str) -> str:
    """Return a header field that others than `message` ask for, folded, without its last CRLF.

    ValueError if the name is not valid or not theirs to write, or if the value cannot be written in the field's syntax.
    """
    if not FIELD_NAME.fullmatch(field):
        raise ValueError(f"{field!r} cannot be a header's name: use letters, digits and hyphens.")
    if field.lower() in OURS | CARRIERS:
        raise ValueError(f"The header {field} is written by outbox itself or by mail servers, and cannot be given.")
    return header_field(field, value)


def extra_fields(headers: Mapping[str, str]) -> list[str]:
    """Return these fields as `extra_field` writes them.

    ValueError as there, and if a field is given twice, in small and in capital letters.
    """
    names: dict[str, str] = {}
    for name in headers:
        other = names.setdefault(name.lower(), name)
        if other != name:
            raise ValueError(f"The header {name} is given twice, also as {other}; give it once.")
    return [extra_field(name, value) for name, value in headers.items()]


def is_free_text(field: str) -> bool:
    """Return True if text in any language may stand in the field, as in Comments and X-Order."""
    return field.lower() not in _MAILBOXES | _PHRASES | _TOKENS | {_LIST_ID}


def header_field(field: str, value: str) -> str:
    """Return a header field in the syntax that its name has, folded, without its last CRLF.

    Runs of white space and control characters are one space. ValueError if the value cannot be written.
    """
    name, text = field.lower(), one_line(value)
    if name in _MAILBOXES:
        words = _mailboxes(field, text, one=name in _ONE_MAILBOX)
    elif name in _PHRASES:
        words = listed([_unquoted_phrase(field, item) for item in _items(field, text) or [""]])
    elif name == _LIST_ID:
        words = _list_id(field, text)
    elif name in _TOKENS:
        words = _tokens(field, text)
    else:
        # A long word may be a URL, which has to stay readable for programs.
        return text_field(field, text, word_max=_word_max(field))
    if max(map(len, words)) > _word_max(field):
        raise ValueError(
            f"The header {field} has a part of more than {_word_max(field)} octets without a space, so it cannot be "
            f"folded into lines of {HARD_LINE_MAX} octets (RFC 5322 §2.1.1); shorten it."
        )
    return folded(field, words)


def _word_max(field: str) -> int:
    return HARD_LINE_MAX - len(field) - len(": ")


def _items(field: str, text: str) -> list[str]:
    """Return the items of a list with commas between them; a comma in quotes is text."""
    if not _BALANCED.fullmatch(text):
        raise ValueError(f'The header {field} has a quotation mark without its pair; write "…", and \\" within it.')
    return [item.strip(" ") for item in _ITEM.findall(text)]


def _mailboxes(field: str, text: str, *, one: bool) -> list[str]:
    items = _items(field, text)
    if not items or (one and len(items) > 1):
        raise ValueError(
            f"The header {field} has {len(items)} addresses and needs {'one' if one else 'one or more'}; write "
            f"{field}: Name <user@example.com>, and put a name with a comma into quotation marks."
        )
    return listed([mailbox_words(field, parse_mailbox(item)) for item in items])


def _unquoted_phrase(field: str, text: str) -> list[str]:
    words = phrase(_unquoted(text))
    if not words:
        raise ValueError(f"The header {field} has an empty phrase; write words with commas between them.")
    return words


def _unquoted(text: str) -> str:
    text = text.strip(" ")
    return re.sub(r"\\(.)", r"\1", text[1:-1]) if re.fullmatch(r'"(?:[^"\\]|\\.)*"', text) else text


def _list_id(field: str, text: str) -> list[str]:
    """Return the words of `Name <id>` or of an id alone (RFC 2919 §3)."""
    if _BARE_ID.fullmatch(text):
        return [f"<{text}>"]
    found = _NAMED_ID.fullmatch(text)
    if found is None:
        raise ValueError(f"The header {field} is not a list's id; write Name <list.example.com> (RFC 2919).")
    return [*phrase(_unquoted(found["name"])), f"<{found['id']}>"]


def _tokens(field: str, text: str) -> list[str]:
    """Return the words of a field that has only ASCII, but in comments (RFC 2047 §5 (2))."""
    if not text.isascii():
        text = "".join(map(_encoded_comment, _PIECE.findall(text)))
    if not text or not text.isascii():
        raise ValueError(
            f"The header {field} is empty; leave it out."
            if not text
            else f"The header {field} has a character beyond ASCII, which it may have in a comment in parentheses only "
            "(RFC 2047 §5); percent-encode it in a URL, as %C3%BC, or leave it out."
        )
    if max(map(len, text.split(" "))) >= LINE_MAX:
        # Ids and URLs that stand side by side: white space may be put between them (RFC 5322 §3.6.4, RFC 2369 §2).
        text = _BETWEEN.sub(r">\1 <", text)
    return text.split(" ")


def _encoded_comment(piece: str) -> str:
    if piece.isascii() or not piece.startswith("("):
        return piece
    return f"({' '.join(encoded_words(piece[1:-1]))})"

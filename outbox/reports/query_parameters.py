"""Parameters of the user's queries: the one parser that decides what `:key` is, and what a colon is otherwise.

It reads SQL as Postgres does (PostgreSQL docs, 4.1): string literals, also `E''` and dollar quotes, quoted identifiers
and nested comments are copied as they are, `::` is a cast, and `a[1:n]` is a slice of an array.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

NAMES: Final = ("period", "starts_at", "ends_at", "key", "keys")

# Types that a parameter has by itself. The bounds have none: compared with a `date` column they are dates.
# In parentheses, since `:keys[1]` would read as a type behind a bare cast.
_TYPED: Final = {"key": "pg_catalog.text", "keys": "pg_catalog.text[]", "period": "pg_catalog.text"}

_TOKENS: Final = re.compile(
    r"""
    (?P<space>\s+)
  | (?P<comment>--[^\r\n]*|/\*)
  | (?P<literal>[eE]'(?:[^'\\]|\\.|'')*(?:'|\Z) | '(?:[^']|'')*(?:'|\Z) | "(?:[^"]|"")*(?:"|\Z)
      | \$(?P<tag>(?:[^\W\d]\w*)?)\$.*?(?:\$(?P=tag)\$|\Z))
  | (?P<cast>::|:=)
  | (?P<escape>\\:[\w$]*)
  | (?P<parameter>:(?P<name>[^\W\d]\w*))
  | (?P<position>\$\d+)
  | (?P<word>[^\W\d][\w$]*|\d[\w.]*)
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_EDGE: Final = re.compile(r"/\*|\*/")
_ESCAPE: Final = re.compile(r"\\(:[\w$]*)(?![:\w$])")

# Words that no operand ends with: a colon behind them begins a parameter, also in a subscript.
_KEYWORDS: Final = frozenset(
    {"all", "and", "any", "array", "as", "between", "by", "case", "distinct", "else", "from", "having", "ilike", "in"}
    | {"is", "like", "limit", "not", "offset", "on", "or", "returning", "select", "similar", "some", "then", "using"}
    | {"values", "when", "where"}
)


@dataclass(frozen=True, slots=True)
class Query:
    """A query as Postgres takes it, with `$1` for the first of `names`."""

    text: str
    names: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    """Parameters that the query itself wrote as `$1`; there is no value for them."""

    def values(self, given: Mapping[str, Any]) -> list[Any]:
        """Return the values of `$1`, `$2` and so on, in this order."""
        return [given[name] for name in self.names]


def objection(query: Query, known: Mapping[str, Any]) -> str | None:
    """Return why a query cannot be run with these parameters; the escape is shown for both kinds of TOML strings."""
    if query.positions:
        return f"it uses {query.positions[0]}, but parameters have names: {_listed(known)}"
    for name in query.names:
        if name not in known:
            return (
                f"it uses :{name}, but there are only {_listed(known)}; for a colon that begins no parameter write "
                f"\\:{name} in a '…' string of outbox.toml, or \\\\:{name} in a \"…\" string"
            )
    return None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f":{name}" for name in names)


@lru_cache(64)
def parse(sql: str) -> Query:
    """Return the query with its parameters found and numbered; a name that comes twice has one number."""
    names: list[str] = []
    positions: list[str] = []
    written: list[str] = []
    for kind, piece in _pieces(sql):
        if kind == "parameter":
            if piece not in names:
                names.append(piece)
            written.append(_placeholder(piece, names.index(piece) + 1))
        else:
            written.append(piece)
            if kind == "position":
                positions.append(piece)
    return Query("".join(written), tuple(names), tuple(positions))


# A cast of a bound to the type that it has, as `apart` writes the bound.
_OWN_CAST: Final = re.compile(
    r"\bcast\s*\(\s*(\$\d+)\s+as\s+(?:timestamptz|timestamp\s+with\s+time\s+zone)\s*\)"
    r"|(\$\d+)\s*::\s*(?:timestamptz|timestamp\s+with\s+time\s+zone)\b",
    re.IGNORECASE,
)


def apart(sql: str) -> Query:
    """Return the query with a number for each place of a parameter, and without casts of a bound to its own type.

    It is only prepared, to learn the types that Postgres would give each place by itself.
    """
    names: list[str] = []
    written: list[str] = []
    for kind, piece in _pieces(sql):
        if kind == "parameter":
            names.append(piece)
        written.append(_placeholder(piece, len(names)) if kind == "parameter" else piece)
    return Query(_OWN_CAST.sub(lambda found: f" {found[1] or found[2]}", "".join(written)), tuple(names))


def _placeholder(name: str, number: int) -> str:
    typed = _TYPED.get(name)
    return f" ${number}" if typed is None else f"(${number}::{typed})"


def _pieces(sql: str) -> Iterator[tuple[str, str]]:
    """Yield each token with its kind: parameters by their names alone, everything else as Postgres reads it."""
    place = _Place()
    at = 0
    while at < len(sql):
        found = _TOKENS.match(sql, at)
        assert found is not None  # `other` takes any character
        kind, piece, at = found.lastgroup or "other", found[0], found.end()
        if kind == "comment":
            at = at if piece != "/*" else _end_of_comment(sql, at)
            piece = sql[found.start() : at]
        elif kind == "parameter" and place.has_slice_before(found["name"]):
            kind, piece, at = "other", ":", found.start() + 1
        elif kind == "parameter":
            piece = found["name"]
        elif kind in ("escape", "literal"):
            piece = _ESCAPE.sub(r"\1", piece)
        yield kind, piece
        if kind not in ("space", "comment"):
            place.move(kind, piece)


@dataclass(slots=True)
class _Place:
    """Place in a query: the open brackets, the last token, and whether an operand can end with it."""

    brackets: list[str] = field(default_factory=list)
    last: str = ""
    is_operand: bool = False

    def has_slice_before(self, name: str) -> bool:
        """Return True if a colon here, with this name behind it, is that of `a[1:n]` or `a[:n]`."""
        in_subscript = bool(self.brackets) and self.brackets[-1] == "subscript"
        return in_subscript and (self.is_operand or (self.last == "[" and name not in NAMES))

    def move(self, kind: str, piece: str) -> None:
        """Go on behind a token."""
        if piece == "[":
            self.brackets.append("subscript" if self.is_operand else "array")
        elif piece == "(":
            self.brackets.append("parenthesis")
        elif piece in ("]", ")") and self.brackets:
            self.brackets.pop()
        self.last = piece
        self.is_operand = (
            piece in ("]", ")")
            or kind in ("literal", "parameter", "position")
            or (kind == "word" and piece.lower() not in _KEYWORDS)
        )


def _end_of_comment(sql: str, at: int) -> int:
    """Return where a block comment ends that began before `at`; comments nest, and an open one takes the rest."""
    depth = 1
    for edge in _COMMENT_EDGE.finditer(sql, at):
        depth += 1 if edge[0] == "/*" else -1
        if not depth:
            return edge.end()
    return len(sql)

"""The earlier editions of a report for the same recipient, with a line through their figures, put at a page's end.

The figures are those that the packaged page says in its head (`Table.figures`); a page of a template without them is
named without a line.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape, unescape
from math import isfinite
from typing import Final

from outbox.database.connection import Connection

EDITIONS_MAX: Final = 12
HEAD_MAX: Final = 4096  # characters of a page in which its figures stand

# Of each edition by the unique key, one at a time: a join may be planned as a walk over all reports.
EARLIER: Final = """
SELECT o.title, o.token, o.head, e.id = this.edition AS is_this
  FROM (SELECT r.edition, r.recipient_key, m.report, m.starts_at
          FROM outbox.report r JOIN outbox.edition m ON m.id = r.edition WHERE r.id = $1) this
 CROSS JOIN LATERAL (SELECT e.id, e.starts_at FROM outbox.edition e
                      WHERE e.report = this.report AND e.starts_at <= this.starts_at
                      ORDER BY e.starts_at DESC LIMIT 5 * $3) e
 CROSS JOIN LATERAL (SELECT r.title, r.token, substr(r.html, 1, $4) AS head FROM outbox.report r
                      WHERE r.edition = e.id AND r.recipient_key = this.recipient_key AND r.html <> ''
                        AND ($2::float8 IS NULL OR r.created_at > now() - $2 * interval '1 second') LIMIT 1) o
 ORDER BY e.starts_at DESC LIMIT $3
"""

_FIGURES: Final = re.compile(r'<meta name="outbox-figures" content="([^"]*)">')
_END: Final = re.compile(r"</body\s*>", re.IGNORECASE)

STYLE: Final = """
.outbox-history { max-width: 52rem; margin: 1.25rem auto 0; font-size: .9rem; }
.outbox-history h2 { margin: 0 0 .5rem; font-size: 1rem; }
.outbox-history ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0; padding: 0; list-style: none; }
.outbox-history dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 0 0 .75rem; }
.outbox-history dd { margin: 0; }
.outbox-history svg { display: block; overflow: visible; color: var(--bar, currentColor); }
@media print { .outbox-history { display: none; } }
"""


@dataclass(frozen=True, slots=True)
class Earlier:
    """An edition: what its page is called, its token, and the figures that it says first."""

    title: str
    token: str
    figures: dict[str, float]


async def read_history(connection: Connection, report: int, expires_s: float | None) -> list[Earlier]:
    """This edition and up to `EDITIONS_MAX` - 1 before it whose pages may be shown, the latest first."""
    rows = await connection.fetch(EARLIER, report, expires_s, EDITIONS_MAX, HEAD_MAX)
    return [Earlier(row["title"], row["token"], _figures(row["head"])) for row in rows]


def _figures(head: str) -> dict[str, float]:
    """What a page says for programs; nothing if that is not as ours say it."""
    found = _FIGURES.search(head)
    try:
        told = json.loads(unescape(found[1])) if found else []
        figures = {str(title): float(figure) for title, figure in told}
    except (ValueError, TypeError, OverflowError, RecursionError):
        return {}
    return {title: figure for title, figure in figures.items() if isfinite(figure)}


def with_history(html: str, editions: Sequence[Earlier]) -> str:
    """The page with what came before it at its end; as it is, if nothing did."""
    if len(editions) < 2:  # noqa: PLR2004 - this one alone
        return html
    at = max((end.start() for end in _END.finditer(html)), default=len(html))
    return html[:at] + _drawn(editions) + html[at:]


def _drawn(editions: Sequence[Earlier]) -> str:
    lines = "".join(_line(title, editions) for title in editions[0].figures)
    links = "".join(f'<li><a href="{escape(one.token)}">{escape(one.title)}</a></li>' for one in editions[1:])
    return (
        f"<style>{STYLE}</style>"
        '<nav class="outbox-history" lang="en" dir="ltr" aria-label="Earlier editions"><h2>Earlier editions</h2>'
        f"{f'<dl>{lines}</dl>' if lines else ''}<ul>{links}</ul></nav>\n"
    )


def _line(title: str, editions: Sequence[Earlier]) -> str:
    """One figure over the editions that say it, from the oldest on; nothing if only one does."""
    values = [one.figures[title] for one in reversed(editions) if title in one.figures]
    if len(values) < 2:  # noqa: PLR2004 - a line has two ends
        return ""
    low, high = min(values), max(values)
    span = high - low or 1.0
    points = " ".join(
        f"{120 * at / (len(values) - 1):.1f},{26 - 24 * (value - low) / span:.1f}" for at, value in enumerate(values)
    )
    said = f"from {values[0]:g} to {values[-1]:g} over {len(values)} editions, {low:g} at least and {high:g} at most"
    return (
        f"<div><dt>{escape(title)}</dt><dd>"
        f'<svg role="img" aria-label="{escape(said)}" viewBox="0 0 120 28" width="120" height="28">'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="2" stroke-linejoin="round"/>'
        "</svg></dd></div>"
    )

"""Explanation of an edition whose source names no recipient, for generate and doctor."""

from typing import TYPE_CHECKING, Final

from sqlalchemy import text

from outbox.errors import OutboxError
from outbox.settings import EditionSettings, ReportSettings, table_of

if TYPE_CHECKING:
    from outbox.generate.session import GenerateSession

TABLES_MAX: Final = 3  # named

# Tables whose rows this role sees only as far as a policy allows it (PostgreSQL docs, 5.9 Row Security Policies).
POLICED: Final = text(f"""
SELECT current_user, ARRAY(SELECT CAST(CAST(c.oid AS regclass) AS text) FROM pg_class c
                            WHERE c.relrowsecurity AND row_security_active(c.oid) ORDER BY 1 LIMIT {TABLES_MAX})
""")


class NoRecipientsError(OutboxError):
    """An edition has no recipients, and its report does not allow that."""


async def explain_no_recipients(session: "GenerateSession", name: str, report: EditionSettings) -> tuple[str, str]:
    """Return what is wrong and the fix, as two parts of a sentence. The tables with row level security are named."""
    ((role, tables),) = await session.fetch(POLICED)
    policed = f"row level security (it limits what role {role} sees of {', '.join(tables)})"
    usual = [policed if tables else "row level security", "a filter that no row passes", "an empty table"]
    of_class = isinstance(report, ReportSettings) and report.source is not None
    what = "recipients() names no recipient" if of_class else "the recipients query returns no row"
    allow = f"set may_be_empty = true in [{table_of(name)}] if it is right"
    return what, f"usual reasons are {', '.join(usual[:-1])} or {usual[-1]}; correct that, or {allow}"

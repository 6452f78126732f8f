"""Queries of generate on the reports that an edition has, and on the suppression list."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from sqlalchemy import ARRAY, Text, bindparam, text

if TYPE_CHECKING:
    from outbox.generate.session import GenerateSession

# One look at the unique index for each key: as NOT EXISTS it would be a join, which the planner does by walking over
# the whole edition while the statistics say that it is small.
MISSING: Final = text("""
SELECT n.key FROM unnest(:keys) AS n (key)
 WHERE (SELECT r.id FROM outbox.report r WHERE r.edition = :edition AND r.recipient_key = n.key) IS NULL
""").bindparams(bindparam("keys", type_=ARRAY(Text)))

# Asked after the bucket's lock is held: in the same statement the snapshot could be older than the lock, and what
# its last holder committed would look missing. Ids are reserved here because a message's bytes carry its id.
RESERVE: Final = text("""
SELECT n.key, nextval(pg_get_serial_sequence('outbox.email', 'id')) AS email FROM unnest(:keys) AS n (key)
 WHERE (SELECT r.id FROM outbox.report r WHERE r.edition = :edition AND r.recipient_key = n.key) IS NULL
""").bindparams(bindparam("keys", type_=ARRAY(Text)))

# Shows if any server makes reports of an edition.
COUNT: Final = text("SELECT count(*) FROM outbox.report WHERE edition = :edition")

# For most fleets the first returns false, and the second is never run.
LISTED: Final = text("SELECT EXISTS (SELECT FROM outbox.suppression WHERE report = ANY (:reports))").bindparams(
    bindparam("reports", type_=ARRAY(Text))
)
SUPPRESSED: Final = text("""
SELECT count(*) FROM unnest(:addresses) AS n (address)
 WHERE (SELECT s.address FROM outbox.suppression s
         WHERE s.address = lower(n.address COLLATE "C") AND s.report = ANY (:reports) LIMIT 1) IS NOT NULL
""").bindparams(bindparam("addresses", type_=ARRAY(Text)), bindparam("reports", type_=ARRAY(Text)))


class EditionReports:
    """The reports of one edition."""

    def __init__(self, session: "GenerateSession", edition: int) -> None:
        self._session = session
        self._edition = edition

    async def missing(self, keys: Sequence[str]) -> list[str]:
        """Return the keys of the recipients who have no report."""
        rows = await self._session.fetch(MISSING, {"edition": self._edition, "keys": keys}, by_index=True)
        return [row.key for row in rows]

    async def reserve(self, keys: Sequence[str]) -> dict[str, int]:
        """Return the keys of the recipients who have no report, each with a new email id."""
        rows = await self._session.fetch(RESERVE, {"edition": self._edition, "keys": keys}, by_index=True)
        return {row.key: row.email for row in rows}

    async def count(self) -> int:
        """Return the number of reports, also of recipients whom the source no longer names."""
        return int((await self._session.fetch(COUNT, {"edition": self._edition}))[0][0])


class SuppressionList:
    """Entries of the suppression list under one of the names `reports`; the name "" holds for all reports."""

    def __init__(self, session: "GenerateSession", reports: Sequence[str]) -> None:
        self._session = session
        self._reports = reports
        self._is_empty: bool | None = None

    async def count(self, addresses: Sequence[str]) -> int:
        """Return how many of these addresses are on the list."""
        if self._is_empty is None:
            self._is_empty = not (await self._session.fetch(LISTED, {"reports": self._reports}))[0][0]
        if self._is_empty:
            return 0
        wanted = {"addresses": addresses, "reports": self._reports}
        return int((await self._session.fetch(SUPPRESSED, wanted, by_index=True))[0][0])

"""Bucket locks: recipients are hashed into buckets, and a server makes a bucket's reports while it holds its lock.

The locks divide the work; the unique keys keep reports from being made twice. So a lock that is held by a role that may
not write reports is ignored: any role that may connect can take an advisory lock.
"""

import zlib
from collections.abc import Iterable, Sequence
from typing import Final

from sqlalchemy import ARRAY, Integer, bindparam, text

from outbox.database.lock_wait import MAY_GENERATE
from outbox.database.locks import BUCKET_LOCKS, NAMESPACE_MASK
from outbox.generate.session import GenerateSession

BUCKETS: Final = 64

# From an unfiltered unnest of chosen numbers: in a filtered or limited scan the planner may take unwanted
# locks (PostgreSQL docs, 13.3.5).
TAKE: Final = text("SELECT n, pg_try_advisory_lock(:ns, n) AS taken FROM unnest(:numbers) AS n").bindparams(
    bindparam("numbers", type_=ARRAY(Integer))
)
GIVE: Final = text("SELECT pg_advisory_unlock(:ns, n) FROM unnest(:numbers) AS n").bindparams(
    bindparam("numbers", type_=ARRAY(Integer))
)


def bucket_of(key: str) -> int:
    """Return the bucket of a recipient, 0 ≤ n < `BUCKETS`; the same on every server and in every version."""
    return zlib.crc32(key.encode()) % BUCKETS


class BucketLocks:
    """Locks of one edition's buckets, on one session."""

    def __init__(self, session: GenerateSession, edition: int) -> None:
        self.holders: dict[int, str] = {}
        """Session that was last seen to hold each wanted bucket, as `pid 4711 (role app)`."""
        self._session = session
        self._edition = edition
        self._held: set[int] = set()

    async def take(self, buckets: Sequence[int], *, ignore_outsiders: bool) -> set[int]:
        """Lock those that are free; return the buckets to work on.

        With `ignore_outsiders` these include buckets whose lock is held by roles that may not write reports: another
        server may work on them at the same time.
        """
        numbers = {self._number(bucket): bucket for bucket in buckets}
        rows = await self._session.fetch(TAKE, {"ns": BUCKET_LOCKS, "numbers": list(numbers)})
        taken = {numbers[row.n] for row in rows if row.taken}
        self._held |= taken
        refused = [number for number, bucket in numbers.items() if bucket not in taken]
        if not (refused and ignore_outsiders):
            return taken
        found = await self._session.holders(BUCKET_LOCKS, refused, MAY_GENERATE)
        for number in refused:
            self.holders[numbers[number]] = found.get(number, "")
        return taken | {numbers[number] for number in refused if number not in found}

    async def give(self, buckets: Iterable[int]) -> None:
        """Release the locks. After an exception the session ends instead, and its locks with it."""
        held = self._held.intersection(buckets)
        if held:
            await self._session.fetch(GIVE, {"ns": BUCKET_LOCKS, "numbers": [self._number(b) for b in held]})
            self._held -= held

    def _number(self, bucket: int) -> int:
        return (self._edition * BUCKETS + bucket) & NAMESPACE_MASK

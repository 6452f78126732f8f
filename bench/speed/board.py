"""Latency of the operators' board among so many emails: the overview, the searches, an email's story."""

import random
from collections.abc import Callable, Sequence
from typing import Final

from bench.harness.environment import open_environment
from bench.harness.figures import Target, keep, show
from bench.speed.report_page import SHOWN, once, serving

TARGET_P95_MS: Final = 150.0
EDITION_OF: Final = 100_000
FILLED_AT_ONCE: Final = 100_000
RATE: Final = 20.0  # requests a second: some people who click

# Emails as they are after some weeks: nearly all sent, some dead, the newest of them still to be sent.
FILL: Final = """
WITH edition AS (
    INSERT INTO outbox.edition (report, period, starts_at, ends_at, expected)
    SELECT 'progress', 'p' || n, date '2020-01-06' + 7 * n, date '2020-01-13' + 7 * n, $2::int - $1::int + 1
      FROM (SELECT count(*)::int AS n FROM outbox.edition) e RETURNING id
), report AS (
    INSERT INTO outbox.report (edition, recipient_key, token, title, html)
    SELECT edition.id, n, lpad(n::text, 22, '0'), 'Progress', 'page' FROM edition, generate_series($1::int, $2::int) n
    RETURNING id, edition, recipient_key::int AS n
), email AS (
    INSERT INTO outbox.email (id, key, report, sender, recipient, message_id, message)
    SELECT n, 'progress/p' || edition || '/' || n, id, 'reports@example.com', 'p' || n % 50000 || '@example.com',
           '<' || n || '@example.com>', convert_to('Subject: Progress' || repeat(E'\r\nX: y', 300), 'UTF8')
      FROM report RETURNING id
), delivery AS (
    INSERT INTO outbox.delivery (email, state, attempt, relay, marked_at, settled_at, due_at)
    SELECT id, CASE WHEN id > $3::bigint THEN 'pending' WHEN id % 1000 = 0 THEN 'dead' ELSE 'sent' END, 1, 1, now(),
           CASE WHEN id <= $3::bigint THEN now() END, now() + (id > $3::bigint)::int * interval '1 hour'
      FROM email RETURNING email
)
INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply)
SELECT email, 1, 1, CASE WHEN email % 1000 = 0 THEN 'refused' ELSE 'accepted' END,
       CASE WHEN email % 1000 = 0 THEN '550 5.1.1 no such user' ELSE '250 2.0.0 Ok: queued as ' || email END
  FROM delivery
"""
PENDING: Final = 2000


def pages(emails: int) -> dict[str, Callable[[], str]]:
    """Return the pages that people open, by name."""
    chance = random.Random(emails)
    return {
        "overview": lambda: "/",
        "address": lambda: f"/emails?q=p{chance.randrange(50_000)}@",
        "domain": lambda: "/emails?q=*@example.net",
        "reply": lambda: "/emails?where=reply&q=550+5.1.1",
        "pending": lambda: "/emails?state=pending",
        "dead": lambda: "/emails?state=dead",
        "story": lambda: f"/emails/{chance.randint(1, emails)}",
        "editions": lambda: "/editions",
    }


async def measure(url: str, *, emails: Sequence[int], seconds: float) -> None:
    """Measure each page among each number of emails; a table and board.json."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    async with open_environment(url, connections=4) as environment:
        await environment.reset(1)
        there = 0
        for count in sorted(emails):
            for first in range(there + 1, count + 1, FILLED_AT_ONCE):
                last = min(first + FILLED_AT_ONCE - 1, count)
                await environment.connection.execute(FILL, first, last, count - PENDING, timeout=3600)
            there = count
            await environment.connection.execute("SELECT setval('outbox.email_id_seq', $1)", count)
            await environment.connection.execute("VACUUM ANALYZE", timeout=3600)
            await environment.connection.execute("CHECKPOINT", timeout=3600)
            async with serving(environment) as client:
                found[str(count)] = {
                    name: await once(client, path, RATE, seconds) for name, path in pages(count).items()
                }
    show(
        f"Pages of the board at {RATE:g} requests/s for {seconds:g} s each, ms",
        ("emails", "page", *SHOWN.values()),
        [
            (f"{int(count):,}", name, *(f"{waits[what]:,.1f}" for what in SHOWN))
            for count, by_page in found.items()
            for name, waits in by_page.items()
        ],
    )
    targets = [
        Target(f"the board's {name} among {int(count):,}, p95", waits["p95_ms"], TARGET_P95_MS, "ms")
        for count, by_page in found.items()
        for name, waits in by_page.items()
        if name in ("overview", "address")
    ]
    keep("board", {"rate": RATE, "seconds": seconds, "found": found}, targets)

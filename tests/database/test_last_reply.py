"""The last reply of an email is the same one wherever it is shown."""

from datetime import UTC

import pytest

from outbox.generate.session import GenerateSession
from outbox.operations.audit import LOOK
from outbox.operations.email_filter import Selection
from outbox.operations.email_list import list_emails
from outbox.operations.status import read_status
from outbox.settings import load
from outbox.web.board.search import Wanted, browse

EMAILS = """
WITH e AS (INSERT INTO outbox.edition (report, period, starts_at, ends_at)
           VALUES ('progress', '2026-W48', '2026-11-23', '2026-11-30') RETURNING id),
     r AS (INSERT INTO outbox.report (edition, recipient_key, token, title, html)
           SELECT id, n, 'token' || n, 't', 'h' FROM e, generate_series(1, 2) n RETURNING id, recipient_key),
     m AS (INSERT INTO outbox.email (key, report, sender, recipient, message_id, message)
           SELECT 'progress/2026-W48/' || recipient_key, id, 'a@example.com', 'b@example.com',
                  '<' || id || '@example.com>', 'x' FROM r RETURNING id)
INSERT INTO outbox.delivery (email, state, settled_at, attempt) SELECT id, 'dead', now(), 2 FROM m
"""
# One transaction may write two lines of a trail at the same time. They are written in either order.
TRAIL = """
INSERT INTO outbox.attempt (email, attempt, verdict, reply, settled_at)
SELECT id, n, 'refused', 'reply ' || n, timestamptz '2026-11-30 12:00Z' FROM outbox.email, generate_series(1, 2) n
 ORDER BY CASE WHEN key LIKE '%1' THEN n ELSE -n END
"""


@pytest.fixture
async def session(database, tmp_path):
    path = tmp_path / "outbox.toml"
    path.write_text(f'database_url = "{database}"\nsender = "a@example.com"\n')
    async with GenerateSession.open(load(path, {})) as opened:
        yield opened


async def test_of_two_replies_of_one_moment_all_lists_show_that_of_the_later_try(session, connection):
    await connection.execute(EMAILS)
    await connection.execute(TRAIL)
    listed = (await list_emails(connection, Selection(), limit=10)).emails
    found = (await browse(connection, Wanted(), UTC)).rows
    troubles = (await read_status(connection)).troubles
    of = {
        "edition": await connection.fetchval("SELECT id FROM outbox.edition"),
        "prefix": "progress/2026-W48/",
        "keys": ["1", "2"],
    }
    audited = await session.fetch(LOOK, of)
    for shown in (listed, found, troubles, audited):
        assert [one.said for one in shown] == ["reply 2", "reply 2"]

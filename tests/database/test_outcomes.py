"""The views that say what became of emails, reports and editions, and what needs a person."""

import pytest

from outbox.operations.attention import Kind, concerns_of
from outbox.operations.snapshot import EditionOutcome, read_outcomes, read_snapshot

# Reports 1 to 14 of edition 1, each with an email of its own unless a digest took it up, or it has none.
FILL = """
INSERT INTO outbox.edition (report, period, starts_at, ends_at, expected, looked_at)
VALUES ('progress', '2026-W47', '2026-11-16', '2026-11-23', 17, now()),
       ('digest', '2026-W47', '2026-11-16', '2026-11-23', 1, now());
INSERT INTO outbox.report (edition, recipient_key, token, title, html)
SELECT 1, n::text, n::text, 't', 'h' FROM generate_series(1, 14) n UNION ALL SELECT 2, 'd', 'd', 't', 'h';
INSERT INTO outbox.digest_item (report, address, link, digest) VALUES (12, 'a@x.de', '', NULL), (13, 'a@x.de', '', 15);
INSERT INTO outbox.email (id, key, report, sender, recipient, message_id, message)
SELECT id, id, id, 'a@x.de', 'b@x.de', '', '' FROM outbox.report WHERE id NOT IN (12, 13, 14);
INSERT INTO outbox.email (id, key, sender, recipient, message_id, message)
VALUES (16, 'own', 'a@x.de', 'b@x.de', '', '');
INSERT INTO outbox.attempt (email, attempt, verdict, reply) VALUES
    (6, 1, 'resolved', ''), (9, 0, 'cancelled', ''), (10, 0, 'suppressed', '');
INSERT INTO outbox.delivery (email, state, attempt, relay, marked_at, settled_at, doubted_at)
SELECT email, state, 1, 1, now(), CASE WHEN state NOT IN ('pending', 'sending', 'in_doubt') THEN now() END,
       CASE WHEN state = 'in_doubt' THEN now() END
  FROM unnest(array[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 15, 16],
              array['pending', 'sending', 'sent', 'in_doubt', 'dead', 'dead', 'expired', 'expired', 'cancelled',
                    'cancelled', 'sent', 'sent', 'expired']) AS d (email, state);
INSERT INTO outbox.bounce (email, message, kind) VALUES (3, 'm', 'soft'), (11, 'm', 'hard'), (5, 'm', 'hard');
INSERT INTO outbox.unreached (edition, recipient_key, reason)
VALUES (1, 'none', 'no address'), (1, 'waived', 'no address'), (1, '1', 'has a report since');
INSERT INTO outbox.waiver (edition, recipient_key, who, why) VALUES (1, '8', 'ann', ''), (1, 'waived', 'ann', '');
"""
OUTCOMES = [
    "waiting", "waiting", "sent", "in_doubt", "failed", "cancelled", "failed", "cancelled", "cancelled", "suppressed",
    "sent", "collected", "sent", "failed",
]  # fmt: skip


@pytest.fixture
async def filled(connection):
    await connection.execute(FILL)
    return connection


async def test_each_report_has_one_outcome_and_one_in_a_digest_is_what_the_digest_is(filled):
    rows = await filled.fetch("SELECT report, outcome FROM outbox.report_outcome WHERE edition = 1 ORDER BY report")
    assert [tuple(row) for row in rows] == list(enumerate(OUTCOMES, 1))


async def test_an_edition_counts_each_report_once_and_recipients_without_one(filled):
    assert await read_outcomes(filled, [1]) == {
        1: EditionOutcome(
            made=14, sent=3, waiting=2, in_doubt=1, failed=3, cancelled=3, missing=1, waived=1, collected=1,
            suppressed=1, bounced=1,
        )
    }  # fmt: skip


async def test_what_is_decided_or_as_its_application_asked_needs_no_person(filled):
    rows = await filled.fetch(
        "SELECT kind, email, state, recipient_key FROM outbox.needs_attention ORDER BY kind, email"
    )
    assert [tuple(row) for row in rows] == [
        ("failed", 5, "dead", "5"),
        ("failed", 7, "expired", "7"),
        ("in_doubt", 4, "in_doubt", None),
        ("missing", None, None, "none"),
    ]


async def test_an_old_edition_is_history_for_its_failures_and_missing_reports(filled):
    await filled.execute("UPDATE outbox.edition SET created_at = now() - interval '41 days'")
    assert [(one.kind, one.count) for one in concerns_of(await read_snapshot(filled))] == [(Kind.IN_DOUBT, 1)]
    assert (await read_outcomes(filled, [1]))[1].failed == 3, "its counts stay"


async def test_recipients_of_a_look_that_recorded_no_names_are_counted(filled):
    await filled.execute("UPDATE outbox.edition SET looked_at = NULL, expected = 20 WHERE id = 1")
    rows = await filled.fetch("SELECT recipient_key FROM outbox.needs_attention WHERE kind = 'missing' AND edition = 1")
    assert [tuple(row) for row in rows] == [(None,)] * 5  # of 20, 14 have a report and one has a waiver


async def test_a_new_edition_is_counted_without_reading_the_large_one_that_statistics_know(connection):
    await connection.execute(
        """
        INSERT INTO outbox.edition (report, period, starts_at, ends_at)
        VALUES ('progress', '2026-W46', '2026-11-09', '2026-11-16'),
               ('progress', '2026-W47', '2026-11-16', '2026-11-23');
        INSERT INTO outbox.report (edition, recipient_key, token, title, html)
        SELECT 1, n, n, 't', 'h' FROM generate_series(1, 20000) n;
        ANALYZE outbox.report;
        INSERT INTO outbox.report (edition, recipient_key, token, title, html)
        SELECT 2, n, 'new' || n, 't', 'h' FROM generate_series(1, 10) n
        """
    )
    read = "SELECT seq_scan FROM pg_stat_user_tables WHERE relid = 'outbox.report'::regclass"
    await connection.execute("SELECT pg_stat_force_next_flush()")
    before = await connection.fetchval(read)
    assert (await read_outcomes(connection, [2]))[2].made == 10
    await connection.execute("SELECT pg_stat_force_next_flush()")
    assert await connection.fetchval(read) == before
    async with connection.transaction():
        await read_outcomes(connection, [2])
        assert await connection.fetchval("SHOW enable_seqscan") == "on", "what comes after is planned as usual"

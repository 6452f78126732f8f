"""An edition is complete when everybody has got theirs: then it is noted, and the dead man's switch is called."""

import json

import pytest

from outbox.monitoring.completion import COMPLETE, Candidate, is_complete
from outbox.sandbox.smtp_sink import Reply, Stage
from tests.support.fault_levers import At
from tests.support.fleet import until
from tests.support.http_receiver import receiver


async def completed(fleet):
    return await fleet.connection.fetchval("SELECT completed_at FROM outbox.edition")


async def test_the_switch_is_called_when_the_last_email_is_sent_or_discarded_and_not_before(fleet):
    await fleet.hire(2)
    assert (await fleet.run("generate")).code == 0
    period, key = await fleet.connection.fetchrow(
        "SELECT e.period, m.key FROM outbox.edition e, outbox.email m WHERE m.recipient = 'p1@example.com'"
    )
    fleet.sink.script = At(
        Stage.RCPT, Reply("550 no such user"), when=lambda visit: "p1@example.com" in visit.recipients
    )
    with receiver() as called:
        fleet.top = f'dead_man_url = "{called.url}/{{report}}/{{period}}?edition={{edition}}"'
        assert (await fleet.run("relay", "--until-empty")).code == 0
        assert called.requests == []
        assert await completed(fleet) is None

        assert (await fleet.run("resolve", key, "--discard")).code == 0
        called.answers[:] = [500]
        ended = await fleet.run("relay", "--until-empty")
        assert called.paths == [f"/progress/{period}?edition=progress%20{period}"] * 2, "again, since it failed"
        events = [json.loads(line)["event"] for line in ended.err.splitlines()]
        assert {"dead_man_called", "edition_complete"} <= set(events)
        assert await completed(fleet) is not None

        await fleet.run("relay", "--until-empty")
        assert len(called.requests) == 2, "once it is noted nobody calls again"
        await fleet.hire(1, first=1000)
        assert (await fleet.run("generate")).code == 0
        assert await completed(fleet) is None, "one more is owed it"


async def test_a_relay_that_stays_sees_an_edition_complete_and_a_failing_switch_does_not_stop_it(fleet):
    await fleet.hire(3)
    fleet.top = 'dead_man_url = "http://127.0.0.1:9/secret"'
    relay = await fleet.relay()
    assert (await fleet.run("generate")).code == 0
    await relay.says("dead_man_failed")
    assert await completed(fleet) is None
    assert not any("secret" in line for line in relay.log)
    await fleet.put_emails(1)
    await until(lambda: fleet.sink.addresses.get("p1@example.com") == 2, "it sends on")


EDITION = """
INSERT INTO outbox.edition (report, period, starts_at, ends_at, expected)
VALUES ('progress', '2026-W48', '2026-11-23', '2026-11-30', 2) RETURNING id
"""
REPORT = """
WITH r AS (INSERT INTO outbox.report (edition, recipient_key, token, title, html)
           VALUES ($1, $2, $2, '', '') RETURNING id)
INSERT INTO outbox.email (key, report, sender, recipient, message_id, message)
SELECT $2, id, 'a@b', 'a@b', '', '' FROM r RETURNING id
"""
SETTLED = "settled_at = now(), attempt = 1"
STATES = {
    "sent": (f"state = 'sent', relay = 1, marked_at = now(), {SETTLED}", True),
    "cancelled by a person": ("state = 'cancelled', settled_at = now()", True),
    "discarded by a person": (f"state = 'dead', {SETTLED}", True),
    "dead": (f"state = 'dead', {SETTLED}", False),
    "expired": ("state = 'expired', settled_at = now()", False),
    "pending": ("due_at = 'infinity'", False),
    "in doubt": ("state = 'in_doubt', relay = 1, attempt = 1, marked_at = now(), doubted_at = now()", False),
}


@pytest.mark.parametrize("what", STATES)
async def test_what_counts_as_done_is_sent_or_decided_by_a_person(connection, what):
    edition = await connection.fetchval(EDITION)
    how, done = STATES[what]
    seen = Candidate(edition, "progress", "2026-W48", 2)
    for key, as_it_is in (("1", STATES["sent"][0]), ("2", how)):
        assert not await is_complete(connection, seen), "a report is missing"
        email = await connection.fetchval(REPORT, edition, key)
        await connection.execute("INSERT INTO outbox.delivery (email) VALUES ($1)", email)
        async with connection.transaction():
            if what == "discarded by a person":  # as `outbox resolve` does it, whose one statement writes both
                await connection.execute("INSERT INTO outbox.attempt VALUES ($1, 1, NULL, 'resolved', '')", email)
            await connection.execute(f"UPDATE outbox.delivery SET {as_it_is} WHERE email = $1", email)
    assert await is_complete(connection, seen) is done
    assert not await is_complete(connection, Candidate(edition, "progress", "2026-W48", None)), "who is owed is unknown"
    if done:
        await connection.execute("DELETE FROM outbox.delivery WHERE email = $1", email)
        await connection.execute("DELETE FROM outbox.email WHERE id = $1", email)
        assert not await is_complete(connection, seen), "a report without an email waits for a digest"
        await connection.execute(
            "INSERT INTO outbox.digest_item (report, address, link, digest)"
            " SELECT id, 'a@b', '', NULL FROM outbox.report WHERE recipient_key = '2'"
        )
        assert not await is_complete(connection, seen), "no digest has taken it up"
        digest = await connection.fetchval(
            "UPDATE outbox.digest_item SET digest = (SELECT id FROM outbox.report WHERE recipient_key = '1')"
            " RETURNING digest"
        )
        assert await is_complete(connection, seen)
        await connection.execute(
            "UPDATE outbox.delivery SET state = 'pending', settled_at = NULL"
            " WHERE email = (SELECT id FROM outbox.email WHERE report = $1)",
            digest,
        )
        assert not await is_complete(connection, seen), "the digest's email is not sent"
    await connection.execute("UPDATE outbox.edition SET expected = 3")
    await connection.execute(COMPLETE, edition, seen.expected)
    assert await connection.fetchval("SELECT completed_at FROM outbox.edition") is None, "one more is owed it since"

"""Recipients without a report, and waivers, on real Postgres."""

import json

import pytest

from outbox.generate.session import GenerateSession
from outbox.generate.waiver import read_waived, write_unreached
from outbox.monitoring.completion import Candidate, is_complete
from outbox.operations.waive import Owed, unreached_of, waive
from outbox.settings import load

WEEK = ("progress", "2026-W48")


@pytest.fixture
async def session(database, tmp_path):
    path = tmp_path / "outbox.toml"
    path.write_text(f'database_url = "{database}"\nsender = "a@example.com"\n')
    async with GenerateSession.open(load(path, {})) as opened:
        yield opened


@pytest.fixture
async def edition(connection):
    return await connection.fetchval(
        "INSERT INTO outbox.edition (report, period, starts_at, ends_at, expected)"
        " VALUES ('progress', '2026-W48', '2026-11-23', '2026-11-30', 3) RETURNING id"
    )


async def put(connection, edition, key, state="sent"):
    settled = "now()" if state not in ("pending", "sending", "in_doubt") else "NULL"
    await connection.execute(
        f"""
        WITH r AS (INSERT INTO outbox.report (edition, recipient_key, token, title, html)
                   VALUES ($1, $2, 'token' || $2, 't', 'h') RETURNING id),
             m AS (INSERT INTO outbox.email (key, report, sender, recipient, message_id, message)
                   SELECT 'progress/2026-W48/' || $2, id, 'a@example.com', $2 || '@example.com', '<1@example.com>', 'x'
                     FROM r RETURNING id)
        INSERT INTO outbox.delivery (email, state, settled_at, attempt, relay, marked_at, doubted_at)
        SELECT id, $3, {settled}, 1, 1, now(), CASE WHEN $3 = 'in_doubt' THEN now() END FROM m""",
        edition, key, state,
    )  # fmt: skip


async def record(session, edition, failed):
    async with session.ours() as connection, connection.begin():
        await write_unreached(connection, edition, failed)


def owed(*keys):
    return [Owed(*WEEK, key) for key in keys]


async def complete(connection, edition, expected=3):
    return await is_complete(connection, Candidate(edition, *WEEK, expected))


async def recorded(connection):
    return dict(await connection.fetch("SELECT recipient_key, reason FROM outbox.unreached"))


async def test_a_look_records_who_has_no_report_and_the_next_one_forgets_who_was_reached(session, connection, edition):
    await record(session, edition, {"2": "no address", "3": "\0 of the template"})
    assert await recorded(connection) == {"2": "no address", "3": " of the template"}
    await record(session, edition, {"3": "another reason"})
    assert await recorded(connection) == {"3": "another reason"}
    await record(session, edition, {})
    assert await recorded(connection) == {}


async def test_a_waiver_completes_an_edition_and_undone_it_is_open_again(session, connection, edition):
    await put(connection, edition, "1")
    await put(connection, edition, "2")
    await record(session, edition, {"3": "no address"})
    assert not await complete(connection, edition)
    assert await waive(connection, owed("3"), who="ann", why="left") == (owed("3"), {})
    assert await complete(connection, edition)
    assert await read_waived(session, edition) == {"3"}
    assert await unreached_of(connection, *WEEK) == []
    row = await connection.fetchrow("SELECT who, what, target, why, emails FROM outbox.operation")
    assert tuple(row) == ("ann", "waive", "progress/2026-W48/3", "left", 1)
    await connection.execute("UPDATE outbox.edition SET completed_at = now()")
    assert await waive(connection, owed("3"), who="ann", why="", undo=True) == (owed("3"), {})
    assert not await complete(connection, edition)
    assert await connection.fetchval("SELECT completed_at FROM outbox.edition") is None
    assert await unreached_of(connection, *WEEK) == owed("3")


async def test_a_waiver_of_somebody_whom_the_source_no_longer_names_stands_for_nobody_else(
    session, connection, edition
):
    await put(connection, edition, "1")
    await record(session, edition, {"2": "no address", "3": "no address"})
    await waive(connection, owed("3"), who="ann", why="left")
    await record(session, edition, {"2": "no address"})  # 3 is gone, so 2 are expected
    assert not await complete(connection, edition, expected=2)


async def test_a_waiver_settles_a_dead_letter_and_an_expired_email(connection, edition):
    for key, state in {"1": "sent", "2": "dead", "3": "expired"}.items():
        await put(connection, edition, key, state)
    assert not await complete(connection, edition)
    done, left = await waive(connection, owed("2", "3"), who="ann", why="left")
    assert (done, left) == (owed("2", "3"), {})
    assert await complete(connection, edition)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("sent", "has an email, which is sent; nothing is owed already."),
        ("pending", "has an email, which is pending; use `outbox cancel` to stop it."),
        ("sending", "has an email, which is sending; use `outbox cancel` to stop it."),
        ("in_doubt", "has an email, which is in doubt; use `outbox resolve`."),
        ("cancelled", "has an email, which is cancelled; nothing is owed already."),
    ],
)
async def test_what_may_still_arrive_is_not_waived(connection, edition, state, says):
    await put(connection, edition, "1", state)
    done, left = await waive(connection, owed("1"), who="ann", why="left")
    assert (done, left) == ([], {"progress/2026-W48/1": f"progress/2026-W48/1 {says}"})
    assert await connection.fetchval("SELECT count(*) FROM outbox.waiver") == 0


async def test_a_recipient_whom_a_complete_look_did_not_name_is_not_waived(session, connection, edition):
    await record(session, edition, {"3": "no address"})
    done, left = await waive(connection, owed("3", "33"), who="ann", why="left")
    assert done == owed("3")
    (sentence,) = left.values()
    assert sentence == (
        "progress/2026-W48/33: the latest run of generate did not name this recipient; check the key, or run "
        "`outbox generate progress --period 2026-W48` first."
    )
    await connection.execute("UPDATE outbox.edition SET expected = NULL")  # no look was complete
    assert await waive(connection, owed("33"), who="ann", why="") == (owed("33"), {})


async def test_what_cannot_be_waived_is_named_and_the_others_are(session, connection, edition):
    await record(session, edition, {"1": "no address", "2": "no address"})
    ours, other = owed("1", "2"), Owed("progress", "2026-W47", "1")
    await waive(connection, ours[:1], who="ann", why="left")
    done, left = await waive(connection, [*ours, other], who="bob", why="")
    assert done == ours[1:]
    assert left == {
        "progress/2026-W48/1": "progress/2026-W48/1: ann has decided already that nothing is owed.",
        "progress/2026-W47/1": (
            "progress/2026-W47/1: there is no edition progress 2026-W47; `outbox status` shows the latest."
        ),
    }
    done, left = await waive(connection, owed("9"), who="bob", why="", undo=True)
    assert (done, left) == ([], {"progress/2026-W48/9": "progress/2026-W48/9: there is no waiver to undo."})


@pytest.mark.parametrize(
    ("key", "recipient"),
    [("progress/2026-W48/a/b", "a/b"), ("progress/2026-W48/", None), ("mail1", None), ("/2026-W48/1", None),
     ("progress/2026-W48/\0", None)],
)  # fmt: skip
def test_a_recipient_is_named_by_the_key_of_the_email(key, recipient):
    found = Owed.parse(key)
    assert (found and found.recipient) == recipient
    assert found is None or found.key == key


async def test_generate_names_who_has_no_report_and_makes_none_for_whom_nothing_is_owed(fleet):
    await fleet.hire(3)
    await fleet.connection.execute("UPDATE people SET email = 'nobody' WHERE id = 2")
    first = await fleet.run("generate", "--period", "2026-W46")
    assert first.code == 1
    assert list(await recorded(fleet.connection)) == ["2"]
    await waive(fleet.connection, [Owed("progress", "2026-W46", "2")], who="ann", why="left")
    again = await fleet.run("generate", "--period", "2026-W46")
    assert again.code == 0, again
    assert "1 of 3 are owed nothing" in again.out
    assert await recorded(fleet.connection) == {"2": "it was waived when generate last ran"}
    await fleet.connection.execute("UPDATE people SET email = 'p2@example.com' WHERE id = 2")
    assert (await fleet.run("generate", "--period", "2026-W46")).code == 0
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.report") == 2
    await waive(fleet.connection, [Owed("progress", "2026-W46", "2")], who="ann", why="", undo=True)
    assert (await fleet.run("generate", "--period", "2026-W46")).code == 0
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.report") == 3
    assert await recorded(fleet.connection) == {}
    assert json.loads((await fleet.run("status", "--json")).out)["pending"] == 3

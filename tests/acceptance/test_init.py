"""`outbox init`, and what the other commands say when the schema is not theirs."""

import asyncpg
import pytest

from tests.support.fleet import until

COMMANDS = {
    "generate": ("generate",),
    "relay": ("relay", "--until-empty"),
    "status": ("status",),
    "resolve": ("resolve", "progress/2026-W47/1", "--resend"),
}


@pytest.fixture
async def bare(fleet):
    """A fleet whose database has no outbox yet."""
    await fleet.connection.execute("DROP SCHEMA outbox CASCADE")
    return fleet


async def test_init_makes_the_schema_and_again_changes_nothing(bare):
    first, again = await bare.run("init"), await bare.run("init")
    assert (first.code, first.err, again.code, again.err) == (0, "", 0, "")
    assert first.out != again.out
    assert "already" in again.out
    await bare.hire(2)
    assert (await bare.run("generate")).code == 0
    assert (await bare.run("init")).code == 0
    assert await bare.connection.fetchval("SELECT count(*) FROM outbox.email") == 2


async def test_eight_inits_at_once_make_one_schema(bare):
    commands = [await bare.start("init") for _ in range(8)]
    ends = [await command.ended() for command in commands]
    assert [(end.code, end.err) for end in ends] == [(0, "")] * 8
    assert sum("is there now" in end.out for end in ends) == 1
    assert await bare.connection.fetchval("SELECT count(*) FROM outbox.schema_version") == 1


async def all_say(fleet):
    """The one sentence that every command ends with when the schema is not right."""
    started = {name: await fleet.start(*words) for name, words in COMMANDS.items()}
    said = {}
    for name, process in started.items():
        ended = await process.ended()
        assert (ended.code, ended.out) == (1, ""), (name, ended)
        (said[name],) = ended.sentences
    assert len(set(said.values())) == 1, said
    return said["status"]


async def test_without_a_schema_every_command_says_how_to_make_it(bare):
    assert await all_say(bare) == "The database has no outbox schema yet; run `outbox init`."


async def test_an_older_schema_is_told_apart_and_init_is_the_mend(fleet):
    await fleet.connection.execute("UPDATE outbox.schema_version SET version = 0, compatible = 0")
    said = await all_say(fleet)
    assert "older (version 0)" in said
    assert "`outbox init`" in said


async def test_a_newer_schema_is_told_apart_and_init_does_not_touch_it(fleet):
    await fleet.connection.execute("INSERT INTO outbox.schema_version (version, compatible) VALUES (99, 99)")
    said = await all_say(fleet)
    assert "newer (version 99)" in said
    assert "upgrade outbox-mail" in said
    ended = await fleet.run("init")
    assert ended.code == 1
    assert ended.sentences == [said]


async def test_a_schema_of_that_name_that_is_somebody_elses_is_left_alone(bare):
    await bare.connection.execute("CREATE SCHEMA outbox; CREATE TABLE outbox.letters (n int)")
    said = await all_say(bare)
    assert "not this program's" in said
    ended = await bare.run("init")
    assert (ended.code, ended.sentences) == (1, [said])
    assert await bare.connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'outbox'") == 1


async def test_an_init_that_is_killed_leaves_no_half_schema(bare):
    """Another session holds the name, so that init stops in the middle of its transaction."""
    other = await asyncpg.connect(bare.database)
    transaction = other.transaction()
    await transaction.start()
    await other.execute("CREATE SCHEMA outbox")
    command = await bare.start("init")

    async def it_waits():
        return await bare.connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'outbox init'"
            " AND datname = current_database() AND wait_event_type = 'Lock'"
        )

    await until(it_waits, "init waits for the name")
    await command.kill()
    await transaction.rollback()
    await other.close()
    ended = await bare.run("init")
    assert (ended.code, ended.err) == (0, ""), ended


async def test_a_role_without_rights_is_told_so_in_one_sentence(fleet):
    await fleet.connection.execute(
        "DO $$ BEGIN CREATE ROLE stranger LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$"
    )
    fleet.database = fleet.database.replace("postgres@", "stranger@")
    said = await all_say(fleet)
    assert "permission denied for schema outbox" in said
    ended = await fleet.run("init")
    assert ended.code == 1
    assert len(ended.sentences) == 1


async def test_init_writes_the_size_of_messages_into_the_database_and_says_so(fleet):
    limit = "SELECT outbox.message_bytes_max()"
    assert await fleet.connection.fetchval(limit) == 20_971_520
    await fleet.put_emails(1)
    await fleet.connection.execute("UPDATE outbox.email SET message = '\r\n\r\n' || repeat('x', 200000)::bytea")
    fleet.top += "\nmessage_bytes_max = 100000"
    said = await fleet.run("init")
    assert (said.code, said.err) == (0, "")
    assert "The limit on messages is now 100,000 octets; it was 20,971,520." in said.out
    assert "Older emails violate email_message_size; they stay as they are, and new ones are refused." in said.out
    assert await fleet.connection.fetchval(limit) == 100_000
    again = await fleet.run("init")
    assert "octets" not in again.out
    assert "break" not in again.out
    with pytest.raises(asyncpg.InvalidParameterValueError, match="at most 100000 are accepted"):
        await fleet.connection.execute(
            "SELECT outbox.enqueue(key => 'k', sender => 's@example.com', recipient => 'a@example.com',"
            " body_text => repeat('x', 90000))"
        )
    fleet.top = fleet.top.replace("100000", "104857601")
    assert (await fleet.run("init")).sentences == [
        "message_bytes_max: 104857601 is too large; write 104857600 or less."
    ]

"""`outbox init --roles`: each role does its part with the real commands, and everything else is refused by Postgres."""

import asyncio
import re
from pathlib import Path

import asyncpg
import pytest

from outbox.database.roles import ROLES, together
from outbox.doctor.rights import look_at_rights
from outbox.relay import statements
from tests.support.bounce_samples import ROWS, of_row
from tests.support.web_client import link_of, opened, settled_web

PARTS = [name.removeprefix("outbox_") for name in ROLES]
V1 = Path(__file__).parents[1] / "database/schema_1.sql"


@pytest.fixture
async def staffed(fleet):
    """A fleet whose server has no roles of ours yet; those that a test makes, and `app_…` for them, go at its end."""
    owner = fleet.database

    async def drop(*roles):
        there = await fleet.connection.fetch("SELECT rolname FROM pg_roles WHERE rolname = ANY ($1::text[])", roles)
        for (name,) in there:
            await fleet.connection.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")

    names = (*ROLES, *(f"app_{part}" for part in (*PARTS, "owner")))
    await drop(*names)
    yield fleet
    await fleet.stop_all()
    fleet.database = owner
    await drop(*names)


async def hire(fleet, *parts):
    """A role that logs in and is in nothing but the group of its part."""
    for part in parts:
        await fleet.connection.execute(f"CREATE ROLE app_{part} LOGIN; GRANT outbox_{part} TO app_{part}")


def of(fleet, part):
    """The database's address for that role."""
    return re.sub("//[^@]*@", f"//app_{part}@", fleet.database)


async def as_role(fleet, part, *words, code=0):
    ended = await fleet.run(*words, environment={"OUTBOX_DATABASE_URL": of(fleet, part)})
    assert ended.code == code, ended
    return ended


# What each must not do; besides DDL, which nobody may.
FORBIDDEN = {
    "enqueue": (
        "SELECT id FROM outbox.email",
        "SELECT key FROM outbox.email",
        "SELECT recipient FROM outbox.email",
        "SELECT message FROM outbox.email",
        "SELECT state FROM outbox.delivery",
        "SELECT token FROM outbox.report",
        "SELECT route FROM outbox.rule",
        "INSERT INTO outbox.email (key, sender, recipient, message_id, message) VALUES ('x', 'a', 'b', '', '')",
        "INSERT INTO outbox.email (id) VALUES (9223372036854775807)",
        "INSERT INTO outbox.email (report) VALUES (1)",
        "INSERT INTO outbox.delivery (email) VALUES (1)",
        "INSERT INTO outbox.delivery (email, state, settled_at) VALUES (1, 'cancelled', now())",
        "SELECT nextval('outbox.email_id_seq')",
        "UPDATE outbox.email SET key = 'x'",
        "UPDATE outbox.delivery SET due_at = 'infinity'",
        "DELETE FROM outbox.email",
        "INSERT INTO outbox.report (edition, recipient_key, token, title, html) VALUES (1, 'x', 'x', '', '')",
        "SELECT outbox.bounce_token(1)",
        "SELECT outbox.unsubscribe('x')",
        "SELECT outbox.suppressed('x', '')",
    ),
    "generate": (
        "SELECT html FROM outbox.report",
        "SELECT token FROM outbox.report",
        "SELECT message FROM outbox.email",
        "SELECT state FROM outbox.delivery",
        "UPDATE outbox.report SET html = ''",
        "UPDATE outbox.email SET message = ''",
        "UPDATE outbox.email SET recipient = 'x'",
        "UPDATE outbox.email SET report = NULL",
        "UPDATE outbox.delivery SET due_at = now()",
        "UPDATE outbox.definition SET timezone = 'UTC'",
        "INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply) VALUES (1, 1, 1, 'accepted', '')",
        "INSERT INTO outbox.suppression (address, reason, who, why) VALUES ('x', 'decided', '', '')",
        "DELETE FROM outbox.suppression",
        "INSERT INTO outbox.operation (who, what, target, why, emails) VALUES ('', '', '', '', 0)",
        "DELETE FROM outbox.report",
        "DELETE FROM outbox.edition",
        "SELECT outbox.unsubscribe('x')",
        "SELECT outbox.resubscribe('x')",
    ),
    "relay": (
        "SELECT outbox.put('x', 'a@b', array['a@b'], '', 'b', '')",
        "SELECT outbox.resubscribe('x')",
        "SELECT html FROM outbox.report",
        "SELECT token FROM outbox.report",
        "SELECT name FROM people",
        "UPDATE outbox.email SET message = ''",
        "UPDATE outbox.email SET recipient = 'x'",
        "UPDATE outbox.delivery SET priority = 1",
        "UPDATE outbox.delivery SET email = 1",
        "UPDATE outbox.attempt SET reply = ''",
        "INSERT INTO outbox.edition (report, period, starts_at, ends_at) VALUES ('x', 'x', now(), now())",
        "INSERT INTO outbox.report (edition, recipient_key, token, title, html) VALUES (1, 'x', 'x', '', '')",
        "INSERT INTO outbox.operation (who, what, target, why, emails) VALUES ('', '', '', '', 0)",
        "INSERT INTO outbox.pause (report, who, why) VALUES ('', '', '')",
        "DELETE FROM outbox.suppression",
        "DELETE FROM outbox.pause",
        "DELETE FROM outbox.email",
        "DELETE FROM outbox.delivery",
        "DELETE FROM outbox.attempt",
        "DELETE FROM outbox.relay",
    ),
    "bounce": (
        "SELECT message FROM outbox.email",
        "SELECT token FROM outbox.report",
        "SELECT state FROM outbox.delivery",
        "SELECT outbox.bounce_token(1)",
        "SELECT outbox.bounce_tokens(ARRAY[1])",
        "UPDATE outbox.delivery SET state = 'cancelled', settled_at = now()",
        "UPDATE outbox.suppression SET report = 'x'",
        "DELETE FROM outbox.suppression",
        "DELETE FROM outbox.bounce",
        "INSERT INTO outbox.suppression (address, report, reason, who, why) VALUES ('x', 'x', 'decided', '', '')",
        "INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply) VALUES (1, 1, 1, 'accepted', '')",
        "INSERT INTO outbox.operation (who, what, target, why, emails) VALUES ('', '', '', '', 0)",
    ),
    "read": (
        "SELECT html FROM outbox.report",
        "SELECT token FROM outbox.report",
        "SELECT message FROM outbox.email",
        "SELECT link FROM outbox.digest_item",
        "UPDATE outbox.delivery SET due_at = now()",
        "SELECT FROM outbox.delivery FOR UPDATE",
        "INSERT INTO outbox.pause (report, who, why) VALUES ('', '', '')",
        "DELETE FROM outbox.route",
    ),
    "operate": (
        "SELECT outbox.resubscribe('x')",
        "SELECT html FROM outbox.report",
        "SELECT token FROM outbox.report",
        "UPDATE outbox.email SET message = ''",
        "UPDATE outbox.email SET recipient = 'x'",
        "UPDATE outbox.delivery SET attempt = 0",
        "UPDATE outbox.operation SET who = ''",
        "UPDATE outbox.operation SET why = ''",
        "DELETE FROM outbox.operation",
        "DELETE FROM outbox.attempt",
        "INSERT INTO outbox.email (key, sender, recipient, message_id, message) VALUES ('x', 'a', 'b', '', '')",
        "INSERT INTO outbox.relay (host, pid, backend_pid, version) VALUES ('', 1, 1, '')",
    ),
    "web": (
        "SELECT message FROM outbox.email",
        "SELECT key FROM outbox.email",
        "SELECT state FROM outbox.delivery",
        "SELECT link FROM outbox.digest_item",
        "SELECT name FROM people",
        "SELECT FROM outbox.report FOR UPDATE",
        "UPDATE outbox.report SET html = ''",
        "INSERT INTO outbox.report (edition, recipient_key, token, title, html) VALUES (1, 'x', 'x', '', '')",
        "INSERT INTO outbox.pause (report, who, why) VALUES ('', '', '')",
        "DELETE FROM outbox.report",
        "SELECT created_at FROM outbox.board_session",
        "UPDATE outbox.board_session SET expires_at = 'tomorrow'",
        "SELECT outbox.put('x', 'a@b', array['a@b'], '', 'b', '')",
        "INSERT INTO outbox.suppression (address, reason, who, why) VALUES ('x', 'decided', '', '')",
        "DELETE FROM outbox.suppression",
    ),
    "unsubscribe": (
        "SELECT id FROM outbox.report",
        "SELECT token FROM outbox.report",
        "SELECT recipient FROM outbox.email",
        "SELECT address FROM outbox.suppression",
        "INSERT INTO outbox.suppression (address, reason, who, why) VALUES ('x', 'decided', '', '')",
        "DELETE FROM outbox.suppression",
        "INSERT INTO outbox.operation (who, what, target, why, emails) VALUES ('', '', '', '', 0)",
        "SELECT outbox.put('x', 'a@b', array['a@b'], '', 'b', '')",
    ),
    "prune": (
        "SELECT token FROM outbox.report",
        "UPDATE outbox.email SET key = 'x'",
        "UPDATE outbox.email SET recipient = 'x'",
        "UPDATE outbox.delivery SET state = 'cancelled', settled_at = now()",
        "DELETE FROM outbox.email",
        "DELETE FROM outbox.report",
        "DELETE FROM outbox.delivery",
        "INSERT INTO outbox.attempt (email, attempt, verdict, reply) VALUES (1, 1, 'accepted', '')",
    ),
}
NOBODY_MAY = (
    "TRUNCATE outbox.delivery",
    "DROP TABLE outbox.pruned",
    "CREATE TABLE outbox.mine (n int)",
    "ALTER TABLE outbox.email DISABLE TRIGGER ALL",
    "UPDATE outbox.schema_version SET version = 99",
    "SET ROLE postgres",
    "SELECT secret FROM outbox.bounce_key",
    "UPDATE outbox.bounce_key SET retired_at = now()",
    "DELETE FROM outbox.bounce_key",
    "CREATE FUNCTION outbox.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "ALTER FUNCTION outbox.suppressed(text, text) RESET ALL",
)

ENQUEUE = """
SELECT outbox.enqueue(key => 'invoice/1', sender => 'app@example.com', recipient => 'p9@example.com', subject => 'hi',
                      body_text => 'Your invoice')
"""


async def is_refused(role, statement):
    try:
        await role.execute(statement)
    except asyncpg.InsufficientPrivilegeError:
        return True
    return False


async def test_each_role_does_its_part_with_the_real_commands_and_nothing_else(staffed):
    fleet = staffed
    fleet.top += '\nrate = "1000/s"\ndaily_max = 1000'
    await fleet.hire(3)
    said = await fleet.run("init", "--roles")
    assert (said.code, said.err) == (0, "")
    assert all(name in said.out for name in ROLES)
    assert "GRANT outbox_relay TO app_relay;" in said.out
    await hire(fleet, *PARTS)
    await fleet.connection.execute("GRANT SELECT ON people, progress TO app_generate, app_read")

    await as_role(fleet, "generate", "generate")
    enqueue = await asyncpg.connect(of(fleet, "enqueue"))
    assert [await enqueue.fetchval(ENQUEUE) for _ in range(2)] == [True, False]
    sent = await as_role(fleet, "relay", "relay", "--until-empty")
    assert "completion_unknown" not in sent.err, "it may see whether an edition is complete"
    assert await fleet.states() == {"sent": 4}
    assert (len(fleet.sink.addresses), fleet.twice) == (4, {})
    assert "All is well" in (await as_role(fleet, "read", "audit", "progress")).out
    await fleet.connection.execute("UPDATE outbox.delivery SET state = 'dead'")
    for part in ("read", "operate"):
        assert "outbox retry invoice/1" in (await as_role(fleet, part, "status")).out
    await as_role(fleet, "operate", "resolve", "invoice/1", "--resend", "--why", "it is wanted")
    assert "invoice/1" in (await as_role(fleet, "read", "list", "--state", "pending")).out
    assert "subject      hi" in (await as_role(fleet, "operate", "show", "invoice/1")).out
    for command in ("cancel", "retry"):
        await as_role(fleet, "operate", command, "invoice/1", "--why", "of two minds")
    for command in ("pause", "resume"):
        await as_role(fleet, "operate", command, "progress", "--why", "it is tried")
    await as_role(fleet, "relay", "relay", "--until-empty")
    assert await fleet.states() == {"dead": 3, "sent": 1}
    new = fleet.directory / "Maildir/new"
    for part in (new, new.with_name("cur")):
        part.mkdir(parents=True)
    (new / "1").write_bytes(of_row(await fleet.connection.fetchrow(f"{ROWS} WHERE report = 1")))
    assert "1 bounced for good" in (await as_role(fleet, "bounce", "bounce", str(new.parent))).out
    assert "p1@example.com" in (await as_role(fleet, "read", "suppress")).out
    await fleet.connection.execute("INSERT INTO people (id, email, name) VALUES (4, 'p9@example.com', 'Nine')")
    await as_role(fleet, "operate", "suppress", "p9@example.com", "--why", "it is tried")
    again = await as_role(fleet, "generate", "generate", "--period", "2026-W01")
    assert "4 made here" in again.out
    await fleet.connection.execute("UPDATE outbox.delivery SET due_at = now() WHERE state = 'pending'")
    await as_role(fleet, "operate", "suppress", "--remove", "p9@example.com", "--why", "it is tried")
    await as_role(fleet, "operate", "suppress", "p2@example.com", "--why", "it is tried")
    await as_role(fleet, "relay", "relay", "--until-empty")
    assert await fleet.states() == {"dead": 3, "sent": 2, "cancelled": 3}
    kept = await fleet.connection.fetch("SELECT DISTINCT why FROM outbox.operation ORDER BY 1")
    assert [why for (why,) in kept] == ["it is tried", "it is wanted", "of two minds"]
    await fleet.connection.execute(
        "UPDATE outbox.email SET created_at = '2020-01-01'; UPDATE outbox.report SET created_at = '2020-01-01'"
    )
    assert '"emails": 8' in (await as_role(fleet, "prune", "prune", "--keep", "400d", "--json")).out

    for part in PARTS:
        role = await asyncpg.connect(of(fleet, part))
        for statement in (*FORBIDDEN[part], *NOBODY_MAY):
            assert await is_refused(role, statement), f"{part} may {statement}"
        found = await look_at_rights(role)
        assert found.found == f"role app_{part} may do what outbox_{part} may"
        await role.close()
    await enqueue.close()


async def test_the_web_pages_need_no_more_than_their_group_may(staffed):
    fleet = staffed
    await fleet.hire(2)
    assert (await fleet.run("init", "--roles")).code == 0
    await hire(fleet, "web")
    assert (await fleet.run("generate")).code == 0
    token = await fleet.connection.fetchval("SELECT token FROM outbox.report WHERE recipient_key = '2'")
    fleet.report = settled_web(history="true", user_header='"X-User"', trusted_proxies='["127.0.0.1"]')
    _, browser = await opened(fleet, "--pages-only", environment={"OUTBOX_DATABASE_URL": of(fleet, "web")})
    assert (await browser.ask(f"/r/{token}", X_User="p2@example.com")).status == 200
    assert (await browser.ask(f"/u/{token}", form={"List-Unsubscribe": "One-Click"})).status == 200


async def test_doctor_looks_at_everything_it_may_for_every_group(staffed):
    fleet = staffed
    assert (await fleet.run("init", "--roles")).code == 0
    await hire(fleet, *PARTS)
    for part in PARTS:
        ended = await fleet.run("doctor", environment={"OUTBOX_DATABASE_URL": of(fleet, part)})
        assert f"role app_{part} may do what outbox_{part} may" in ended.out, (part, ended)
        assert "smtp." in ended.out, part


HELD = """
SELECT p.proname, 'EXECUTE', '' FROM pg_proc p
 WHERE p.pronamespace = 'outbox'::regnamespace AND has_function_privilege($1, p.oid, 'EXECUTE')
UNION ALL
SELECT c.relname, p.privilege, a.attname
  FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
  CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS p (privilege)
 WHERE c.relnamespace = 'outbox'::regnamespace AND c.relkind IN ('r', 'v')
   AND has_column_privilege($1, c.oid, a.attnum, privilege)
UNION ALL
SELECT c.relname, p.privilege, '' FROM pg_class c
  CROSS JOIN unnest(ARRAY['DELETE', 'TRUNCATE', 'TRIGGER']) AS p (privilege)
 WHERE c.relnamespace = 'outbox'::regnamespace AND c.relkind IN ('r', 'v') AND has_table_privilege($1, c.oid, privilege)
UNION ALL
SELECT c.relname, p.privilege, '' FROM pg_class c CROSS JOIN unnest(ARRAY['USAGE', 'SELECT', 'UPDATE']) AS p (privilege)
 WHERE c.relnamespace = 'outbox'::regnamespace AND c.relkind = 'S' AND has_sequence_privilege($1, c.oid, privilege)
"""
COLUMNS = """
SELECT c.relname, string_agg(a.attname, ' ') FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
 WHERE c.relnamespace = 'outbox'::regnamespace AND c.relkind IN ('r', 'v') GROUP BY 1
"""


async def test_the_board_shows_with_the_rights_to_look_and_decides_with_those_to_decide(staffed):
    fleet = staffed
    await fleet.put_emails(2)
    await fleet.connection.execute(
        "INSERT INTO outbox.edition (report, period, starts_at, ends_at) VALUES ('r', '1', '2026-11-16', '2026-11-23')"
    )
    assert (await fleet.run("init", "--roles")).code == 0
    await hire(fleet, "read", "operate")
    pages = ("/", "/editions", "/editions/1", "/emails?q=p", "/emails?where=reply&q=x", "/pauses", "/decisions")
    for part, reads_messages in (("read", False), ("operate", True)):
        process, browser = await opened(fleet, environment={"OUTBOX_DATABASE_URL": of(fleet, part)})
        refused = await browser.ask(link_of(process))
        assert (refused.status, "docs/roles.md" in refused.body) == (403, True)  # without the rights to sign people in
        await fleet.connection.execute(f"GRANT outbox_web TO app_{part}")
        cookie = (await browser.ask(link_of(process))).headers["Set-Cookie"].partition(";")[0]
        for path in pages:
            assert (await browser.ask(path, Cookie=cookie)).status == 200, path
        assert "No relay is alive" in (await browser.ask("/", Cookie=cookie)).body
        story = await browser.ask("/emails/1", Cookie=cookie)
        assert (story.status, "docs/roles.md" in story.body) == ((200, False) if reads_messages else (403, True))
    csrf = re.search(r'name="csrf" value="([^"]*)"', (await browser.ask("/pauses", Cookie=cookie)).body)[1]
    form = {"act": "cancel", "seen": "1:0:pending", "why": "enough", "csrf": csrf}
    assert (await browser.ask("/decide", form=form, Cookie=cookie)).status == 200
    assert await fleet.states() == {"cancelled": 1, "pending": 1}


async def test_a_role_holds_exactly_what_the_table_of_rights_says_and_renewing_takes_the_rest(staffed):
    fleet = staffed
    columns = dict(await fleet.connection.fetch(COLUMNS))
    assert (await fleet.run("init", "--roles")).code == 0
    await hire(fleet, "relay")
    await fleet.connection.execute(
        "GRANT DELETE, TRUNCATE, UPDATE (message) ON outbox.email TO outbox_relay;"
        " GRANT ALL ON SEQUENCE outbox.email_id_seq TO outbox_read;"
        " GRANT EXECUTE ON FUNCTION outbox.put TO outbox_read, PUBLIC;"
        " REVOKE EXECUTE ON FUNCTION outbox.suppressed FROM outbox_relay;"
        " REVOKE SELECT ON outbox.pause FROM outbox_relay"
    )
    role = await asyncpg.connect(of(fleet, "relay"))
    found = await look_at_rights(role)
    lacks = ["SELECT ON TABLE outbox.pause", "EXECUTE ON FUNCTION outbox.suppressed"]
    assert found.found == f"role app_relay lacks {', '.join(lacks)}"
    assert "`outbox init --roles`" in found.fix
    ends = await asyncio.gather(*(fleet.run("init", "--roles") for _ in range(3)))
    assert [(end.code, end.err) for end in ends] == [(0, "")] * 3
    for name, group in ROLES.items():
        says = {
            (right.relation, right.privilege, column)
            for right in group.rights
            for column in (
                (right.columns or columns[right.relation]).split()
                if right.privilege in ("SELECT", "INSERT", "UPDATE")
                else ("",)
            )
        }
        assert {tuple(row) for row in await fleet.connection.fetch(HELD, name)} == says, name
    for statement in statements.STATEMENTS:  # what is rare, too: after a failover, in trouble, in doubt
        parameters = len((await role.prepare(statement)).get_parameters())
        nothing = f"({', '.join(['NULL'] * parameters)})" if parameters else ""
        await role.execute(f"PREPARE said AS {statement}; EXPLAIN EXECUTE said{nothing}; DEALLOCATE said")
    await role.close()


async def old_with_roles(fleet, *names):
    """A database of the first version, with these roles and the rights of then."""
    await fleet.connection.execute("DROP SCHEMA outbox CASCADE")
    await fleet.connection.execute(V1.read_text())
    for name in names:
        await fleet.connection.execute(
            f"CREATE ROLE {name} NOLOGIN; GRANT USAGE ON SCHEMA outbox TO {name};"
            f" GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA outbox TO {name}"
        )
    await hire(fleet, "relay")


async def test_an_upgrade_renews_the_rights_of_the_roles_so_that_they_work_and_can_do_no_more(staffed):
    fleet = staffed
    await old_with_roles(fleet, *ROLES)
    said = await fleet.run("init")
    assert said.code == 0
    assert "The rights of its roles were renewed." in said.out
    await fleet.put_emails(2)
    await as_role(fleet, "relay", "relay", "--until-empty")
    assert await fleet.states() == {"sent": 2}
    role = await asyncpg.connect(of(fleet, "relay"))
    assert await is_refused(role, "DELETE FROM outbox.email")
    await role.close()


async def test_an_upgrade_renews_those_that_are_there_and_says_that_others_are_missing(staffed):
    fleet = staffed
    await old_with_roles(fleet, "outbox_relay")
    assert "run `outbox init --roles`" in (await fleet.run("init")).out
    role = await asyncpg.connect(of(fleet, "relay"))
    assert (await look_at_rights(role)).found == "role app_relay may do what outbox_relay may"
    await role.close()
    assert (await fleet.run("init", "--roles")).code == 0
    assert "init --roles" not in (await fleet.run("init")).out


async def test_an_upgrade_by_a_role_that_may_not_grant_says_that_the_rights_have_to_be_renewed(staffed):
    fleet = staffed
    await old_with_roles(fleet, "outbox_relay")
    await fleet.connection.execute("ALTER ROLE outbox_relay LOGIN")
    said = await fleet.run("init")
    assert said.code == 0
    assert "Its roles have no rights on new objects yet; run `outbox init --roles`." in said.out
    await fleet.put_emails(2)
    sender = await fleet.start("relay", "--until-empty", environment={"OUTBOX_DATABASE_URL": of(fleet, "relay")})
    await sender.says("permission denied")
    await fleet.connection.execute("ALTER ROLE outbox_relay NOLOGIN")
    assert (await fleet.run("init", "--roles")).code == 0
    assert (await sender.ended()).code == 0
    assert await fleet.states() == {"sent": 2}


async def test_who_may_not_make_or_give_roles_is_told_the_mend_in_one_sentence(staffed):
    fleet = staffed
    database = await fleet.connection.fetchval("SELECT current_database()")
    await fleet.connection.execute("DROP SCHEMA outbox CASCADE")
    await fleet.connection.execute(f"CREATE ROLE app_owner LOGIN; GRANT CREATE ON DATABASE {database} TO app_owner")
    (said,) = (await as_role(fleet, "owner", "init", "--roles", code=1)).sentences
    assert said.startswith("Role app_owner may not create roles; let one that may say: ")
    mend = said.partition("say: ")[2].partition("; then")[0]
    await fleet.connection.execute(mend)
    await as_role(fleet, "owner", "init", "--roles")
    await hire(fleet, "relay")
    await as_role(fleet, "relay", "relay", "--until-empty")
    (said,) = (await as_role(fleet, "relay", "init", "--roles", code=1)).sentences
    assert said == "Role app_relay does not own the outbox schema; run `outbox init --roles` as its owner, app_owner."
    await fleet.connection.execute("ALTER ROLE outbox_prune LOGIN")
    (said,) = (await as_role(fleet, "owner", "init", "--roles", code=1)).sentences
    assert "Role outbox_prune is there already" in said
    assert "RENAME TO" in said


def test_rights_of_several_roles_are_one_list_in_which_the_whole_table_wins():
    both = together(["outbox_generate", "outbox_relay"])
    assert len({(right.relation, right.privilege) for right in both}) == len(both)
    (email,) = [right for right in both if (right.relation, right.privilege) == ("email", "SELECT")]
    assert email.columns == ""
    (report,) = [right for right in both if (right.relation, right.privilege) == ("report", "INSERT")]
    assert report.clause == "INSERT (edition, recipient_key, token, title, html) ON TABLE outbox.report"

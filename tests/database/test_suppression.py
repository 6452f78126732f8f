"""The suppression list, statement by statement: what relays, generate and digests make of it, and who may fill it."""

import asyncpg
import pytest

from outbox.database.roles import grant_roles
from outbox.database.suppression_entry import Entry, Reason
from outbox.errors import ConfigurationError
from outbox.feedback.suppression_import import entries_of
from outbox.operations import suppression_list
from outbox.operations.retry_cancel import Act, explain, operate
from outbox.relay.quarantine import Quarantine
from outbox.relay.suppression import cancel_listed
from outbox.relay.tick import TickRequest, tick
from tests.database.test_pause import EDITIONS, put_of
from tests.support.living_relays import emptied, living_relay, living_relays, made_once, put  # noqa: F401 - fixtures

WHY = "its address is on the suppression list"


@pytest.fixture(scope="module")
def one_database(postgres_server):
    return made_once(postgres_server, "suppressions", lambda connected: connected.execute(EDITIONS))


@pytest.fixture
async def database(one_database):
    connected = await asyncpg.connect(one_database)
    await connected.execute("TRUNCATE outbox.suppression, outbox.operation, outbox.bounce")
    await connected.close()
    return await emptied(one_database)


async def written_to(connection, address, emails):
    await connection.execute("UPDATE outbox.email SET recipient = $1 WHERE id = ANY ($2::bigint[])", address, emails)


async def add(connection, *entries):
    return await suppression_list.add(connection, [Entry(*entry) for entry in entries], who="ann", why="she asked")


@pytest.mark.parametrize(
    "listed, ended",
    [
        ([("bo@example.com", "")], {"sales", "stock", "none"}),
        ([("bo@example.com", "sales")], {"sales"}),
        ([("bo@example.com", "other")], set()),
        ([("bob@example.com", "")], set()),
        ([("bo@example.com", "stock"), ("bo@example.com", "")], {"sales", "stock", "none"}),
    ],
)
async def test_a_claim_is_cancelled_where_its_address_is_listed_for_its_report_or_for_all(
    connection,
    relay,
    listed,
    ended,
):
    emails = {name: (await put_of(connection, name, 1))[0] for name in ("sales", "stock")}
    emails["none"], other = await put(connection, 2)
    await written_to(connection, "Bo@Example.com", list(emails.values()))
    await add(connection, *listed)
    done = await tick(relay.connection, relay.relay, TickRequest(claims_max=10))
    assert len(done.claims) == 4, "all are claimed, and what is to be cancelled is among them"
    assert done.listed == (set(emails.values()) if listed[0][0].startswith("bo@") else set())
    assert await cancel_listed(connection, relay.relay + 1, list(done.listed), Quarantine()) == frozenset(), "another's"
    cancelled = await cancel_listed(relay.connection, relay.relay, list(done.listed), Quarantine())
    assert cancelled == {emails[name] for name in ended}
    rows = await connection.fetch(
        "SELECT d.email, d.state, d.relay, a.verdict, a.reply"
        " FROM outbox.delivery d LEFT JOIN outbox.attempt a USING (email)"
    )
    for email, *rest, reply in rows:
        expected = ["cancelled", None, "suppressed"] if email in cancelled else ["pending", relay.relay, None]
        assert rest == expected
        assert (reply or WHY).startswith(WHY)
    assert other not in cancelled


async def test_what_is_marked_already_goes(connection, relay):
    (email,) = await put(connection, 1)
    await written_to(connection, "bo@example.com", [email])
    await add(connection, ("bo@example.com",))
    await relay.claim_and_mark()
    assert await cancel_listed(relay.connection, relay.relay, [email], Quarantine()) == frozenset()


async def test_a_retry_of_what_is_suppressed_changes_nothing_and_says_the_mend(connection):
    emails = await put_of(connection, "sales", 2)
    await written_to(connection, "bo@example.com", emails[:1])
    await connection.execute("UPDATE outbox.delivery SET state = 'dead', attempt = 1, settled_at = now()")
    await add(connection, ("bo@example.com", "sales"))
    assert await operate(connection, Act.RETRY, emails, who="a", why="", target="t") == [emails[1]]
    key = await connection.fetchval("SELECT key FROM outbox.email WHERE id = $1", emails[0])
    (said,) = await explain(connection, Act.RETRY, [key])
    assert said.startswith(f"{key} would not be sent, since {WHY} for sales since ")
    assert said.endswith("; `outbox suppress --remove bo@example.com --report sales` takes it off.")
    assert await suppression_list.remove(connection, "bo@example.com", "sales", who="ann", why="")
    assert await operate(connection, Act.RETRY, emails, who="a", why="", target="t") == emails[:1]


async def named_by_its_report(connection, email):
    """The email has the key under which generate writes it."""
    await connection.execute("UPDATE outbox.email SET key = 'sales/2026-W47/k' WHERE id = $1", email)


async def by_link(connection, function, token):
    return await connection.fetchval(f"SELECT outbox.{function}($1)", token)


@pytest.mark.parametrize(
    ("report", "why", "off"),
    [
        (None, "is on the suppression list for good", "outbox suppress --remove bo@example.com"),
        ("sales", "", "outbox suppress --remove bo@example.com --report sales"),
    ],
)
async def test_the_remedy_is_told_by_the_entry_and_not_by_what_a_person_wrote(connection, report, why, off):
    await suppression_list.add(connection, [Entry("bo@example.com", report or "")], who="me", why=why)
    said = await connection.fetchval("SELECT outbox.suppressed('Bo@example.com', 'sales')")
    assert suppression_list.remedy("bo@example.com", said, "sales") == off


async def test_who_unsubscribes_by_a_token_is_listed_once_for_that_report_and_may_come_back(connection):
    (email,) = await put_of(connection, "sales", 1)
    await written_to(connection, "Bo@Example.com", [email])
    await named_by_its_report(connection, email)
    token = await connection.fetchval("SELECT r.token FROM outbox.report r JOIN outbox.email m ON m.report = r.id")
    for _ in range(2):
        assert await by_link(connection, "unsubscribe", token) == "sales"
    for unknown in ("no such", "", token + "x"):
        assert await by_link(connection, "unsubscribe", unknown) is None
        assert await by_link(connection, "resubscribe", unknown) is None
    ((entry,), more) = await suppression_list.read_list(connection)
    assert (entry.address, entry.report, entry.reason, more) == ("bo@example.com", "sales", "unsubscribed", 0)
    assert await by_link(connection, "resubscribe", token) == "sales"
    assert await connection.fetchval("SELECT count(*) FROM outbox.suppression") == 0
    await add(connection, ("bo@example.com", "sales"))
    assert await by_link(connection, "unsubscribe", token) == "sales"
    assert await by_link(connection, "resubscribe", token) == "sales"
    ((entry,), _) = await suppression_list.read_list(connection)
    assert entry.reason == "decided", "what a person decided, no link takes back"
    whats = [what for (what,) in await connection.fetch("SELECT what FROM outbox.operation ORDER BY id")]
    assert whats == ["unsubscribe", "resubscribe", "suppress"]


async def test_a_web_application_may_unsubscribe_with_no_right_on_any_table(connection, database):
    (email,) = await put_of(connection, "sales", 1)
    await named_by_its_report(connection, email)
    token = await connection.fetchval("SELECT r.token FROM outbox.report r JOIN outbox.email m ON m.report = r.id")
    await grant_roles(connection)
    await connection.execute(
        "CREATE ROLE app_web_test LOGIN; GRANT outbox_unsubscribe TO app_web_test;"
        " CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO app_web_test;"
        " CREATE FUNCTION evil.lower(text) RETURNS text LANGUAGE sql AS $$ SELECT 'x@example.com' $$"
    )
    web = await asyncpg.connect(database, user="app_web_test")
    try:
        # What a caller puts before ours in the search path is not what runs.
        await web.execute("SET search_path = evil, pg_catalog")
        assert await web.fetchval("SELECT outbox.unsubscribe($1)", token) == "sales"
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await web.fetch("SELECT address FROM outbox.suppression")
    finally:
        await web.close()
        await connection.execute("DROP SCHEMA evil CASCADE; DROP OWNED BY app_web_test; DROP ROLE app_web_test")
    ((listed, address, who),) = await connection.fetch("SELECT email, address, who FROM outbox.suppression")
    assert (listed, address != "x@example.com", who) == (email, True, "app_web_test")
    assert await connection.fetchval("SELECT who FROM outbox.operation") == "app_web_test", "the login that called"


@pytest.fixture
async def generator(connection, database):
    """A login that is in outbox_generate and in nothing else."""
    await grant_roles(connection)
    await connection.execute(
        "CREATE ROLE app_generate_test LOGIN; GRANT outbox_generate TO app_generate_test;"
        " GRANT UPDATE (report) ON outbox.email TO app_generate_test"  # by hand, besides what the group has
    )
    connected = await asyncpg.connect(database, user="app_generate_test")
    yield connected
    await connected.close()
    await connection.execute("DROP OWNED BY app_generate_test; DROP ROLE app_generate_test")


async def test_the_role_that_makes_reports_gives_no_report_to_another_email(connection, generator):
    victim, attacker = await put(connection, 2)
    await named_by_its_report(connection, victim)
    await connection.execute("UPDATE outbox.email SET key = 'stock/2026-W47/k' WHERE id = $1", attacker)
    reports = dict(await connection.fetch(
        "SELECT e.report, r.id FROM outbox.report r JOIN outbox.edition e ON e.id = r.edition"))  # fmt: skip
    point = "UPDATE outbox.email SET report = $1 WHERE id = $2"
    add = (
        "INSERT INTO outbox.email (key, report, sender, recipient, message_id, message)"
        " VALUES ($1, $2, 'a@b', 'evil@example.com', '<1@b>', '')"
    )
    for statement, arguments in (
        (point, (reports["sales"], attacker)),
        (point, (99_999, attacker)),
        (add, ("x", reports["sales"])),
        (add, ("sales/2026-W47/k#2", reports["sales"])),
        (f"{add} ON CONFLICT (key) DO UPDATE SET report = excluded.report", ("stock/2026-W47/k", reports["sales"])),
    ):
        with pytest.raises(asyncpg.CheckViolationError, match="is not of report"):
            await generator.execute(statement, *arguments)
    await generator.execute(point, reports["sales"], victim)
    await generator.execute(point, reports["stock"], attacker)
    for report in (None, reports["stock"]):
        with pytest.raises(asyncpg.CheckViolationError, match="belongs to a report already"):
            await generator.execute(point, report, victim)
    for function in ("unsubscribe", "resubscribe"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await by_link(generator, function, "x")


async def test_a_link_is_about_the_address_of_the_email_that_its_report_names(connection):
    victim, attacker = await put_of(connection, "sales", 2)
    await written_to(connection, "bo@example.com", [victim])
    await written_to(connection, "evil@example.com", [attacker])
    await named_by_its_report(connection, victim)
    await connection.execute("UPDATE outbox.email SET report = NULL WHERE id = $1", victim)
    token = await connection.fetchval("SELECT r.token FROM outbox.report r JOIN outbox.email m ON m.report = r.id")
    assert await by_link(connection, "unsubscribe", token) == "sales"
    (row,) = await connection.fetch("SELECT address, email FROM outbox.suppression")
    assert tuple(row) == ("bo@example.com", victim)
    assert await by_link(connection, "resubscribe", token) == "sales"
    assert await connection.fetchval("SELECT count(*) FROM outbox.suppression") == 0


@pytest.mark.parametrize(
    "text, entries",
    [
        ("ann@example.com\n\n# left\nBo@B\u00fccher.example\n", [("ann@example.com",), ("bo@xn--bcher-kva.example",)]),
        ("ann@example.com,sales,unsubscribed\n", [("ann@example.com", "sales", Reason.UNSUBSCRIBED)]),
        ("\ufeffemail,created\nann@example.com,1700000000\n", [("ann@example.com",)]),
        (
            '"EmailAddress","SuppressionReason"\r\n"Ann@example.com","HardBounce"\r\n"Ann@Example.com","HardBounce"\r\n',
            [("ann@example.com", "", Reason.BOUNCED)],
        ),
        ('status,reason,email\n550,"550 5.1.1\nno such user",ann@example.com\n', [("ann@example.com",)]),
        ("", []),
    ],
)
def test_a_list_is_read_as_people_and_providers_write_it(text, entries):
    assert entries_of(text, name="f") == [Entry(*entry) for entry in entries]


def test_a_line_that_is_no_address_is_named_and_nothing_is_used():
    with pytest.raises(ConfigurationError, match="f, line 2: 'nobody' is no email address") as raised:
        entries_of("ann@example.com\nnobody\n", name="f")
    assert len(raised.value.faults) == 1
    with pytest.raises(ConfigurationError, match="f: is neither CSV"):
        entries_of('"' + "x" * 200_000, name="f")

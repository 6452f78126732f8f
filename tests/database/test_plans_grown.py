"""Every statement of the product on tables that the planner knows nothing of, or that have grown since it looked.

The commands run as users run them, and Postgres logs the plan of each of their statements with the rows that it really
visited (auto_explain), so it is the plan that users get. Costs are counted in rows, not in seconds: over all its
statements a command may visit each row of the database some times, never each row once for each other. What concerns
one email visits a few rows, however many there are.

A statement on a large table that no step here has run fails the test: give it a step.
"""

import importlib
import json
import os
import pkgutil
import re
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import TextClause

import outbox
from outbox.feedback.bounces import LIST_COUNTED
from outbox.monitoring.fleet import read_fleet
from outbox.operations.resolve import Decision, of_keys
from outbox.operations.watch import Watcher
from outbox.sandbox.smtp_sink import Sink
from outbox.settings import Settings
from outbox.settings.urls import DatabaseUrl
from tests.database import test_plans
from tests.support.bounce_samples import postfix
from tests.support.fleet import Fleet
from tests.support.web_client import opened, settled_web

RECIPIENTS = int(os.environ.get("OUTBOX_PLANS_RECIPIENTS", "2000"))
VISITS_MAX = 20  # of each row of the database, by one statement in all its runs of one step
VISITS_OF_ONE_MAX = 1500  # of any row, by one statement that concerns one email or address

# Tables that grow with the emails, and views on them. The others have rows for reports, routes, relays and decisions.
LARGE = ("report", "email", "delivery", "attempt", "digest_item", "bounce", "suppression")
VIEWS = (
    "undecided_failure",
    "delivery_outcome",
    "report_outcome",
    "missing_report",
    "edition_outcome",
    "needs_attention",
)

EXPLAIN = {
    "session_preload_libraries": "auto_explain",
    "auto_explain.log_min_duration": "0",
    "auto_explain.log_analyze": "on",
    "auto_explain.log_timing": "off",
    "auto_explain.log_format": "json",
}
UNEXPLAINED = {"auto_explain.log_min_duration": "-1"}

REPORTS = """
[reports.weekly]
deliver = "digest"
recipients = "select id::text as key, email, name from people"
data = "select k.key, 1 as done from unnest(cast(:keys as text[])) as k (key)"
link = "https://reports.example.com/r/{token}"
[digest]
link = "https://reports.example.com/d/{token}"
"""
TOKEN = "an-operators-token-of-32-letters"

# What became of the emails of the first two editions: a fifth each are dead letters, dead letters about which a person
# has decided, in doubt, bounced, and not sent since the address is on the list.
FATES = """
UPDATE outbox.delivery SET state = 'dead' WHERE email % 5 IN (1, 2) AND state = 'sent';
UPDATE outbox.delivery SET state = 'in_doubt', settled_at = NULL, doubted_at = now(), marked_at = now(),
       due_at = 'infinity', relay = coalesce(relay, 1) WHERE email % 5 = 3 AND state = 'sent';
UPDATE outbox.delivery SET state = 'cancelled' WHERE email % 10 = 4 AND state = 'sent';
INSERT INTO outbox.attempt (email, attempt, verdict, reply)
SELECT email, attempt, CASE state WHEN 'dead' THEN 'resolved' ELSE 'suppressed' END, 'x' FROM outbox.delivery
 WHERE state = 'dead' AND email % 5 = 2 OR state = 'cancelled';
INSERT INTO outbox.bounce (email, message, kind)
SELECT email, 'x', CASE WHEN email % 2 = 0 THEN 'hard' ELSE 'soft' END FROM outbox.delivery WHERE state = 'sent';
INSERT INTO outbox.attempt (email, attempt, verdict, reply) SELECT email, 1, 'bounced', 'x' FROM outbox.bounce;
"""


def nodes(plan):
    yield plan
    for part in plan.get("Plans", []):
        yield from nodes(part)


COUNTED = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Join Filter", "Rows Removed by Index Recheck")


def visits(plan):
    """How many rows the nodes of a plan gave and removed, all together."""
    return sum(node.get("Actual Loops", 0) * node.get(name, 0) for node in nodes(plan) for name in COUNTED)


def drawn(plan, depth=0):
    """The plan in lines, for a person who looks for what is wrong."""
    read = plan.get("Index Name") or plan.get("Relation Name") or plan.get("CTE Name") or ""
    removed = plan.get("Rows Removed by Filter", 0) + plan.get("Rows Removed by Join Filter", 0)
    rows = f"{plan.get('Actual Rows')} + {removed} rows, {plan.get('Actual Loops')} times"
    yield f"{'  ' * depth}{plan['Node Type']} {read}: {rows}"
    for part in plan.get("Plans", []):
        yield from drawn(part, depth + 1)


@dataclass
class Log:
    """What Postgres logs about the statements of a database that has `EXPLAIN`."""

    path: Path
    read_to: int = 0

    def __post_init__(self):
        self.read_to = self.path.stat().st_size

    def plans(self):
        """The text and the plan of each statement that has ended since the last call."""
        with self.path.open("rb") as log:
            log.seek(self.read_to)
            text = log.read().decode()
            self.read_to = log.tell()
        for found in re.finditer(r"duration: [\d.]+ ms  plan:\n((?:\t.*\n)+)", text):
            told = json.loads(found[1])
            yield " ".join(told["Query Text"].split()), told["Plan"]


@dataclass
class Statement:
    """What one statement visited in a step, and the worst plan of it."""

    visited: float = 0
    runs: int = 0
    worst: float = -1
    plan: dict = field(default_factory=dict)

    def add(self, plan):
        visited = visits(plan)
        self.visited += visited
        self.runs += 1
        if visited > self.worst:
            self.worst, self.plan = visited, plan


class Steps:
    """Runs the product on one database; `found` are the statements that visited too much, `seen` all that ran."""

    def __init__(self, fleet, log):
        self.fleet = fleet
        self.log = log
        self.seen = set()
        self.found = []

    async def size(self):
        counts = [await self.fleet.connection.fetchval(f"SELECT count(*) FROM outbox.{table}") for table in LARGE]
        return sum(counts)

    async def note(self, step, *, of_one=False):
        """Judge what ran since the last call."""
        statements = {}
        for text, plan in self.log.plans():
            if "outbox." in text:
                statements.setdefault(text, Statement()).add(plan)
        self.seen |= set(statements)
        visits_max = VISITS_OF_ONE_MAX if of_one else VISITS_MAX * (await self.size() + 1000)
        for text, one in statements.items():
            if one.visited > visits_max:
                said = f"{step}: {one.visited:,.0f} rows in {one.runs} runs, at most {visits_max:,} are allowed"
                self.found.append("\n        ".join([said, text, *drawn(one.plan)]))

    async def run(self, *words, codes=(0,), of_one=False):
        ended = await self.fleet.run(*words, deadline_s=120)
        assert ended.code in codes, (words, ended)
        await self.note(" ".join(words), of_one=of_one)
        return ended

    async def decide(self, *words, **how):
        return await self.run(*words, "--why", "because", "--yes", **how)


async def before_there_is_anything(steps, browse):
    """Long sessions that keep the plans that they made for empty tables."""
    for _ in range(7):
        for path in ("/", "/emails", "/editions"):
            assert (await browse(path)).status == 200
    await steps.note("the board of nothing")


async def sent(steps, relay):
    """Everything that is due is sent, by a relay that runs already or by one that ends."""
    if relay is None:
        await steps.run("relay", "--until-empty")
    else:
        await steps.fleet.settled(120)
        await steps.note("the relay that was there first")


async def two_editions(steps, relay, *, analyse):
    for period in ("2026-W40", "2026-W41"):
        await steps.run("generate", "progress", "weekly", "--period", period)
        await sent(steps, relay)
        if period == "2026-W40":
            await steps.run("digest")
            await sent(steps, relay)
            if analyse:
                await steps.fleet.connection.execute("ANALYZE")
    await steps.fleet.connection.execute(FATES)


async def what_people_look_at(steps):
    for words in (["status"], ["audit", "progress", "2026-W41"], ["audit", "weekly", "2026-W40"], ["doctor"]):
        await steps.run(*words, "--json", codes=(0, 1))
    for words in ([], ["--state", "sent"], ["--state", "pending", "--state", "in_doubt"], ["--to", "*7@example.com"],
                  ["--edition", "progress 2026-W40"], ["--report", "progress", "--state", "dead"]):  # fmt: skip
        await steps.run("list", *words)
    await steps.run("list", "--to", "p77@example.com", of_one=True)
    await steps.run("show", "progress/2026-W41/77", of_one=True)
    await steps.run("preview", "progress", "--json")
    await steps.run("schedule")
    url = DatabaseUrl.parse(steps.fleet.database)
    assert (await read_fleet(url)).trouble is None
    watcher = Watcher(Settings(database_url=steps.fleet.database))
    await watcher.look_again()
    assert watcher.trouble is None
    watcher.close()
    await steps.note("metrics and watch")


async def what_people_decide(steps):
    connection = steps.fleet.connection
    for act, state in (("--sent", "in_doubt"), ("--discard", "dead"), ("--resend", "dead")):
        key = await connection.fetchval("SELECT key FROM outbox.email m JOIN outbox.delivery d ON d.email = m.id"
                                        " WHERE state = $1 AND email % 5 <> 2 ORDER BY id LIMIT 1", state)  # fmt: skip
        other = await asyncpg.connect(steps.fleet.database)
        assert len(await of_keys(other, [key], Decision(act.strip("-")))) == 1  # what a person at a terminal is asked
        await other.close()
        await steps.decide("resolve", act, key, of_one=True)
    await steps.decide("cancel", key, of_one=True)
    await steps.decide("retry", key, of_one=True)
    await steps.decide("resolve", "--sent", "--edition", "progress 2026-W40")
    await steps.decide("resolve", "--discard", "--state", "dead", "--to", "*@example.com")
    await steps.decide("retry", "--edition", "progress 2026-W41", "--state", "dead", "--state", "cancelled")
    await steps.run("pause", "progress", "--why", "because")
    await steps.run("status", codes=(0, 1))
    await steps.run("relay", "--until-empty", codes=(0, 1))
    await steps.run("resume", "progress", "--why", "because")
    await steps.decide("cancel", "--edition", "progress 2026-W41", "--to", "*2@example.com")
    await steps.run("relay", "--until-empty")


async def what_comes_back(steps):
    fleet = steps.fleet
    (fleet.directory / "list.txt").write_text("".join(f"q{number}@example.com\n" for number in range(RECIPIENTS)))
    await steps.run("suppress", "--import", "list.txt", "--why", "because")
    await steps.run("suppress", "p77@example.com", "--why", "because", of_one=True)
    await steps.run("suppress", "--remove", "p77@example.com", "--why", "because", of_one=True)
    await steps.run("suppress")
    await fleet.connection.execute(
        "INSERT INTO outbox.suppression (address, report, reason, who, why)"
        " VALUES ('p7@example.com', '', 'bounced', '', '')"
    )
    await steps.run("generate", "progress", "--period", "2026-W42")
    box = fleet.directory / "Maildir" / "new"
    for folder in ("new", "cur", "tmp"):
        (box.parent / folder).mkdir(parents=True)
    rows = await fleet.connection.fetch(
        "SELECT recipient, message_id, outbox.bounce_token(id) AS token FROM outbox.email ORDER BY id LIMIT 6"
    )
    for number, row in enumerate(rows):
        by_token = {"token": row["token"]} if number else {"returned": f"Message-ID: {row['message_id']}\n"}
        (box / f"{number}.x").write_bytes(postfix(recipient=row["recipient"], number=number, **by_token))
    await steps.run("bounce", "Maildir", codes=(0, 1), of_one=True)


async def what_nobody_is_owed(steps):
    """A recipient without a report, a waiver, an edition that another system made, and one without recipients."""
    connection, missing = steps.fleet.connection, f"progress/2026-W42/{RECIPIENTS + 1}"
    await connection.execute("INSERT INTO people (id, email) VALUES ($1, 'nowhere')", RECIPIENTS + 1)
    await steps.run("generate", "progress", "--period", "2026-W42", codes=(1,))
    await steps.run("show", missing, codes=(1,), of_one=True)
    for code in (0, 1):
        await steps.run("waive", missing, "--why", "because", codes=(code,), of_one=True)
    await steps.run("waive", missing, "--why", "because", "--undo", of_one=True)
    await steps.decide("waive", "--edition", "progress 2026-W42")
    await steps.run("mark-done", "progress", "2026-W42", codes=(1,))
    other = await asyncpg.connect(steps.fleet.database)
    await other.fetchval(LIST_COUNTED, "p77@example.com", 3600.0, 100, "x", "bounced")
    await other.close()
    await steps.note("the soft bounces of an address", of_one=True)
    await connection.execute("DELETE FROM people")
    await steps.run("generate", "progress", "--period", "2026-W39", codes=(1,))


async def the_board(steps, browse):
    edition, email = await steps.fleet.connection.fetchrow(
        "SELECT max(r.edition), max(m.id) FROM outbox.report r JOIN outbox.email m ON m.report = r.id"
    )
    for path in ("/", "/editions", f"/editions/{edition}", "/pauses", "/decisions", "/emails", "/emails?state=dead",
                 "/emails?state=in_doubt", "/emails?q=p77@example.com", "/emails?q=progress&where=key",
                 "/emails?q=550&where=reply", "/emails?report=progress&period=2026-W40", "/emails?since=2026-01-01",
                 "/emails?state=pending"):  # fmt: skip
        assert (await browse(path)).status == 200, path
        await steps.note(path)
    assert (await browse(f"/emails/{email}")).status == 200
    token = await steps.fleet.connection.fetchval("SELECT token FROM outbox.report ORDER BY id DESC LIMIT 1")
    assert (await browse(f"/r/{token}")).status == (await browse(f"/u/{token}")).status == 200
    form = dict(re.findall(r'name="(csrf)" value="(.*?)"', (await browse("/emails")).body))
    assert (await browse("/confirm", form={**form, "act": "resend", f"pick.{email}": "1"})).status == 200
    await steps.note("the pages of one email")


async def an_old_edition_goes(steps):
    connection = steps.fleet.connection
    await connection.execute(
        "UPDATE outbox.email SET created_at = now() - interval '9 days' WHERE key LIKE '%/2026-W40/%'"
    )
    await connection.execute(
        "UPDATE outbox.report SET created_at = now() - interval '9 days'"
        " WHERE edition IN (SELECT id FROM outbox.edition WHERE period = '2026-W40')"
    )
    await steps.run("prune", "--keep", "5d", "--dry-run")
    await steps.run("prune", "--keep", "5d")
    await steps.run("init")


@pytest.mark.parametrize("history", ["never analysed", "analysed when empty", "analysed at half the size"])
async def test_no_statement_visits_each_row_once_for_each_other(history, postgres_server, forks, tmp_path):
    name = "grown_" + history.replace(" ", "_")
    admin = await asyncpg.connect(postgres_server.url)
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE outbox_template")
    for setting, value in EXPLAIN.items():
        await admin.execute(f"ALTER DATABASE {name} SET {setting} = '{value}'")
    url = postgres_server.database_url(name)
    connection = await asyncpg.connect(url, server_settings=UNEXPLAINED)
    async with Sink() as sink:
        fleet = Fleet(url, connection, sink, tmp_path, forks=forks,
                      recipients="select id::text as key, email, name from people",
                      data="select k.key, 1 as done from unnest(cast(:keys as text[])) as k (key)")  # fmt: skip
        fleet.report = REPORTS + settled_web(board_token=f'"{TOKEN}"', history="true")
        for (table,) in await connection.fetch(
            "SELECT oid::regclass::text FROM pg_class"
            " WHERE relkind = 'r' AND relnamespace::regnamespace::text IN ('outbox', 'public')"
        ):
            await connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
        if history == "analysed when empty":
            await connection.execute("ANALYZE")
            await connection.execute("CREATE PUBLICATION everything FOR ALL TABLES")  # which refuses rows without a key
        await connection.execute(
            "INSERT INTO people (id, email) SELECT n, 'p' || n || '@example.com' FROM generate_series(1, $1::int) n",
            RECIPIENTS,
        )
        steps = Steps(fleet, Log(postgres_server.log))
        try:
            board, browser = await opened(fleet)
            entered = await browser.ask("/sign-in", form={"name": "Anna", "token": TOKEN})
            cookie = entered.headers["Set-Cookie"].partition(";")[0]

            async def browse(path, form=None):
                return await browser.ask(path, form=form, Cookie=cookie)

            await before_there_is_anything(steps, browse)
            relay = await fleet.relay() if history == "analysed when empty" else None
            await two_editions(steps, relay, analyse=history == "analysed at half the size")
            if relay is not None:
                await relay.kill()
            await the_board(steps, browse)
            await board.kill()
            await steps.note("the end of the board")
            await what_people_look_at(steps)
            await what_people_decide(steps)
            await what_comes_back(steps)
            await what_nobody_is_owed(steps)
            await an_old_edition_goes(steps)
        finally:
            await fleet.stop_all()
            await connection.close()
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
            await admin.close()
    assert not steps.found, "\n".join(steps.found)
    assert ", ".join(sorted(never_run(steps.seen))) == ""


async def test_a_session_that_enqueues_into_empty_tables_checks_foreign_keys_by_index(connection):
    """Postgres keeps the plan of a foreign key's check that it made for an empty table until the next ANALYZE."""
    await connection.execute("ANALYZE")
    async with connection.transaction():
        for number in range(60):
            assert await connection.fetchval(
                "SELECT outbox.enqueue(key => $1, sender => 'a@example.com', recipient => 'b@example.com',"
                " subject => 's', body_text => 't')",
                f"k{number}",
            )
        read = "SELECT sum(seq_tup_read) FROM pg_stat_xact_user_tables WHERE schemaname = 'outbox'"
        assert await connection.fetchval(read) == 0


def statements():
    """The statements and parts of statements on large tables that the product's modules hold, by their names."""
    found = {}
    on_large = re.compile(rf"\b(SELECT|UPDATE|INSERT|DELETE)\b.*outbox\.({'|'.join(LARGE + VIEWS)})\b", re.DOTALL)
    for module in pkgutil.walk_packages(outbox.__path__, "outbox."):
        if module.name.startswith(
            (
                "outbox.testing",
                "outbox.sandbox.demo",
                "outbox.database.schema",
                "outbox.database.upgrades",
                "outbox.database.roles",
            )
        ) or module.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            text = value.text if isinstance(value, TextClause) else value
            if isinstance(text, str) and not name.startswith("__") and on_large.search(text):
                found.setdefault(text, f"{module.name}.{name}")
    return {name: text for text, name in found.items()}


def never_run(seen):
    """Statements that neither ran here nor are a relay's, whose plans `test_plans` looks at."""
    known = [" ".join(text.split()) for text in test_plans.STATEMENTS.values()] + list(seen)
    for name, text in statements().items():
        if not any(is_part(text, one) for one in known):
            yield name


def is_part(text, whole):
    """Whether the text is in the whole, but for what is put in later: `{…}`, and SQLAlchemy's `:name`."""
    found = 0
    for part in re.split(r"\{[a-z_]+\}|(?<!:):[a-z_]+", " ".join(text.split())):
        found = whole.find(part.strip(), found)
        if found < 0:
            return False
        found += len(part.strip())
    return True

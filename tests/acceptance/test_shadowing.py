"""A role that may create in a schema on everybody's path (as on PostgreSQL 14 in `public`) puts objects there that fit
the arguments of our statements better than Postgres' own do. No statement of ours ever calls one (CVE-2018-1058).
"""

import itertools
import re

import asyncpg
import pytest

from outbox.database.engine import engine
from outbox.database.roles import ROLES
from outbox.operations.status import read_status
from outbox.sandbox.smtp_sink import Stage, Stall
from outbox.settings.urls import DatabaseUrl
from outbox.web.queries import Store
from tests.support.fault_levers import At

PARTS = [name.removeprefix("outbox_") for name in ROLES]
TYPES = ("smallint", "integer", "bigint", "text", "varchar", "name", "timestamptz", "interval", "float8", "numeric",
         "boolean", "bytea", "jsonb", "oid", "regclass")  # fmt: skip
OPERATORS = ("=", "<>", "<", "<=", ">", ">=", "+", "-", "*", "||", "~", "->>")

# Every function of Postgres' own that takes whatever comes, for each type that may come.
POLYMORPHIC = """
SELECT DISTINCT p.proname::text, p.pronargs::int FROM pg_proc p
 WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.pronargs BETWEEN 1 AND 2 AND p.prokind IN ('f', 'a')
   AND EXISTS (SELECT FROM unnest(p.proargtypes) AS t (oid)
                WHERE t.oid IN ('"any"'::regtype, 'anyelement'::regtype, 'anyarray'::regtype, 'anynonarray'::regtype,
                                'anycompatible'::regtype, 'anycompatiblearray'::regtype))
   AND p.proname !~ '_(in|out|send|recv|transfn|finalfn|support|cmp|eq|ne|lt|le|gt|ge|sel|joinsel|larger|smaller)$'
"""
BODY = "$$ BEGIN PERFORM nextval('public.shadow_hits'); RAISE EXCEPTION 'SHADOWED as %', current_user; END $$"


@pytest.fixture
async def attacked(fleet):
    """A fleet with roles, in whose `public` schema a role without any other right has put its shadows."""
    connection = fleet.connection
    names = (*ROLES, *(f"app_{part}" for part in PARTS), "n_shadow")

    async def drop():
        for (name,) in await connection.fetch("SELECT rolname FROM pg_roles WHERE rolname = ANY ($1::text[])", names):
            await connection.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")

    await drop()
    assert (await fleet.run("init", "--roles")).code == 0
    for part in PARTS:
        await connection.execute(f"CREATE ROLE app_{part} LOGIN; GRANT outbox_{part} TO app_{part}")
    await connection.execute(
        "CREATE ROLE n_shadow LOGIN; GRANT CREATE ON SCHEMA public TO PUBLIC;"
        " GRANT SELECT ON people, progress TO app_generate, app_read;"
        " CREATE SEQUENCE public.shadow_hits; GRANT ALL ON SEQUENCE public.shadow_hits TO PUBLIC"
    )
    await fleet.hire(2)
    await connection.execute("SET search_path = pg_catalog")  # the test's own
    attacker = await asyncpg.connect(of(fleet, "n_shadow"))
    await attacker.execute(";\n".join(await shadows(attacker)))
    await attacker.close()
    yield fleet
    await fleet.stop_all()
    await drop()


async def shadows(connection):
    """The statements that make them: functions and aggregates are one name space."""
    made = []
    types = [*TYPES, *(f"{one}[]" for one in TYPES)]
    for name, arity in await connection.fetch(POLYMORPHIC):
        taken = itertools.product(types, repeat=arity) if arity == 1 else zip(types, types, strict=True)
        made += [
            f'CREATE FUNCTION public."{name}"({", ".join(arguments)}) RETURNS integer LANGUAGE plpgsql AS {BODY}'
            for arguments in taken
        ]
    for left, right in itertools.product(TYPES, repeat=2):
        function = f"public.shadow_{left}_{right}"
        made.append(f"CREATE FUNCTION {function}({left}, {right}) RETURNS boolean LANGUAGE plpgsql AS {BODY}")
        made += [
            f"CREATE OPERATOR public.{operator} (FUNCTION = {function}, LEFTARG = {left}, RIGHTARG = {right})"
            for operator in OPERATORS
        ]
    return made


def of(fleet, role):
    return re.sub("//[^@]*@", f"//{role}@", fleet.database)


async def hits(fleet):
    return await fleet.connection.fetchval("SELECT is_called FROM public.shadow_hits")


async def test_the_attack_works_where_the_path_is_trusted_blindly(attacked):
    """Else this file shows nothing."""
    victim = await asyncpg.connect(of(attacked, "app_relay"))
    for query in ("SELECT unnest(array[1])", "SELECT array_agg(1)", "SELECT 'a'::text || 1"):
        with pytest.raises(asyncpg.RaiseError, match="SHADOWED as app_relay"):
            await victim.execute(query)
    await victim.close()
    assert await hits(attacked)


COMMANDS = [
    ("postgres", "init"),
    ("postgres", "init", "--roles"),
    ("app_generate", "generate"),
    ("app_relay", "relay", "--until-empty"),
    ("app_read", "status", "--json"),
    ("app_read", "list"),
    ("app_operate", "show", "progress/2026-W01/1"),
    ("app_read", "schedule"),
    ("app_operate", "pause", "progress", "--why", "x"),
    ("app_operate", "resume", "progress", "--why", "x"),
    ("app_operate", "suppress", "x@example.com", "--why", "x"),
    ("app_operate", "retry", "--state", "dead", "--why", "x", "--yes"),
    ("app_prune", "prune", "--keep", "400d"),
    ("postgres", "init", "--redefine", "progress"),
]


async def test_no_command_ever_runs_a_shadow(attacked):
    fleet = attacked
    first = await fleet.run("generate", "--period", "2026-W01", environment=as_role(fleet, "app_generate"))
    assert (first.code, await hits(fleet)) == (0, False), first
    await fleet.put_emails(2)
    await fleet.connection.execute(
        "UPDATE outbox.delivery SET send_before = now() + interval '1 day' WHERE email = 1;"
        " UPDATE outbox.email SET created_at = '2020-01-01'; UPDATE outbox.report SET created_at = '2020-01-01'"
    )
    for role, *words in COMMANDS:
        ended = await fleet.run(*words, environment=as_role(fleet, role))
        assert "SHADOWED" not in ended.err + ended.out, (words, ended)
        assert "public." not in ended.err, (words, ended)
        assert ended.code == 0, (words, ended)
        assert not await hits(fleet), words
    assert (await fleet.states())["sent"] == 6


@pytest.mark.parametrize("role", ["app_read", "app_generate", "postgres"])
async def test_doctor_and_audit_never_run_a_shadow(attacked, role):
    for words in (("doctor", "--json"), ("audit", "progress")):
        ended = await attacked.run(*words, environment=as_role(attacked, role))
        assert "SHADOWED" not in ended.out + ended.err, ended
        assert not await hits(attacked), ended


async def test_what_dead_relays_left_is_judged_without_a_shadow(attacked):
    """Claims that were never marked are sent by the next relay, and those that the server had in full are in doubt."""
    fleet = attacked
    await killed_at(fleet, Stage.DATA)
    assert await fleet.states() == {"sent": 3}
    await killed_at(fleet, Stage.DOT)
    states = await fleet.states()
    assert states["in_doubt"] >= 1
    assert states == {"sent": 6 - states["in_doubt"], "in_doubt": states["in_doubt"]}


async def killed_at(fleet, stage):
    """Three emails that a relay dies with, and the next one takes over."""
    fleet.sink.script = script = At(stage, Stall())
    await fleet.put_emails(3, first=len(fleet.sink.accepted) + 1)
    relay = await fleet.relay(environment=as_role(fleet, "app_relay"))
    await script.reached()
    await relay.kill()
    script.on = False
    ended = await fleet.run("relay", "--until-empty", environment=as_role(fleet, "app_relay"))
    assert ended.code == 0, ended
    assert not await hits(fleet)


async def test_the_web_store_never_runs_a_shadow_not_even_after_its_pool_was_reset(attacked):
    store = Store(DatabaseUrl.parse(of(attacked, "app_read")))
    for _ in range(3):
        async with store.connection() as held:
            await read_status(held)
            assert await held.fetchval("SELECT array_agg(n) FROM unnest(array[1]) AS n") == [1]
    await store.close()
    assert not await hits(attacked)


async def test_sqlalchemy_and_the_look_at_types_never_run_a_shadow(attacked):
    """asyncpg asks the catalogs for types that it does not know."""
    await attacked.connection.execute(
        "CREATE TYPE public.mood AS ENUM ('good'); CREATE TYPE public.both AS (m public.mood)"
    )
    async with engine(DatabaseUrl.parse(of(attacked, "app_generate")), application="outbox test").connect() as session:
        found = (await session.exec_driver_sql("SELECT row('good')::public.both, array['good'::public.mood]")).all()
    assert len(found) == 1
    assert not await hits(attacked)


def as_role(fleet, role):
    return {"OUTBOX_DATABASE_URL": of(fleet, role)}

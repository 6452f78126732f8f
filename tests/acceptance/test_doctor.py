"""`outbox doctor`: each thing that users get wrong is a line with its mend, and nothing is changed or sent."""

import asyncio
import datetime as dt
import json
import os
import signal
import ssl
import time
from pathlib import Path
from types import SimpleNamespace

import asyncpg
import pytest
import trustme

from outbox.database.opening import connect
from outbox.database.roles import ROLES, together
from outbox.doctor import database as doctor_database
from outbox.doctor.rights import look_at_rights
from outbox.sandbox.postgres import postgres
from outbox.sandbox.smtp_sink import Cut, Reply, Sink, Stage
from outbox.settings.urls import DatabaseUrl
from tests.acceptance.test_bad_input import SECRET, free_port
from tests.acceptance.test_pooler import PGBOUNCER, POOLED, pooled  # noqa: F401 - a fixture
from tests.conftest import _make_template
from tests.database.test_session import standby_of
from tests.support.fault_levers import At
from tests.support.fleet import COUNTING_DATA, until
from tests.support.scripted_smtp import Scripted


@pytest.fixture(scope="module")
def outbox_postgres():
    """A server as a company runs it: on the disk, with passwords on TCP."""
    rules = Path(f"/tmp/outbox-doctor-hba-{os.getpid()}.conf")  # pytest's own directories are closed to Postgres' user
    rules.write_text("local all,replication all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
    rules.chmod(0o644)
    settings = {"listen_addresses": "127.0.0.1", "hba_file": str(rules), "max_connections": "60"}
    with postgres(settings=settings, port=free_port()) as server:
        asyncio.run(_hire_a_role(server.url))
        yield server
    rules.unlink()


@pytest.fixture(scope="module")
def outbox_template(outbox_postgres):
    return asyncio.run(_make_template(outbox_postgres))


async def _hire_a_role(url):
    admin = await asyncpg.connect(url)
    await admin.execute(f"CREATE ROLE mailer LOGIN PASSWORD '{SECRET}'")
    await admin.close()


def over_tcp(fleet, user=f"mailer:{SECRET}"):
    """The database's address on TCP, for a role with a password."""
    name, _, query = fleet.database.partition("@/")[2].partition("?")
    return f"postgresql://{user}@127.0.0.1:{query.rpartition('port=')[2]}/{name}"


async def examined(fleet, *, code=1, environment=None):
    """What the doctor finds, by check."""
    ended = await fleet.run("doctor", "--json", environment=environment)
    assert (ended.code, ended.err) == (code, ""), ended
    assert SECRET not in ended.out
    given = json.loads(ended.out)
    assert given["ok"] is (code == 0)
    found = {line["check"]: line for line in given["checks"]}
    assert len(found) == len(given["checks"]), "each line has a name of its own"
    return found


def of_grade(found, grade):
    return {check for check, line in found.items() if line["grade"] == grade}


async def counts(fleet):
    tables = ["people", "progress", "build"]
    tables += [f"outbox.{table}" for table in ("definition", "edition", "report", "email", "delivery", "relay")]
    last = await fleet.connection.fetchval("SELECT last_value FROM outbox.email_id_seq")
    return [last, *[await fleet.connection.fetchval(f"SELECT count(*) FROM {table}") for table in tables]]


@pytest.fixture
def authority():
    return trustme.CA()


@pytest.fixture
def certificate(authority):
    return authority.issue_cert("localhost")


@pytest.fixture
async def secure(fleet, authority, certificate):
    """The fleet with a server that wants STARTTLS and a login; `authority.pem` is beside the settings."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    authority.cert_pem.write_to_path(str(fleet.directory / "authority.pem"))
    async with Sink(tls=context, login=("user", SECRET)) as sink:
        fleet.sink = sink
        fleet.smtp = f"smtp://user:{SECRET}@localhost:{sink.port}"
        yield fleet
        await fleet.stop_all()


def trusting(fleet):
    return {"SSL_CERT_FILE": str(fleet.directory / "authority.pem")}


# ── all is well ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_where_all_is_well_every_line_is_ok_nothing_changes_and_nothing_is_sent(secure):
    await secure.connection.execute("GRANT ALL ON SCHEMA outbox TO mailer; GRANT ALL ON people, progress TO mailer")
    await secure.connection.execute("GRANT ALL ON ALL TABLES IN SCHEMA outbox TO mailer")
    await secure.connection.execute("GRANT ALL ON ALL SEQUENCES IN SCHEMA outbox TO mailer")
    await secure.connection.execute("GRANT ALL ON ALL FUNCTIONS IN SCHEMA outbox TO mailer")
    secure.database = over_tcp(secure)
    await secure.hire(5)
    relay = await secure.relay(environment=trusting(secure))
    before = await counts(secure)
    secure.sink.script = lambda *_: None
    found = await examined(secure, code=0, environment=trusting(secure))
    assert of_grade(found, "ok") == set(found) - {"database.replication"}
    assert found["database.replication"]["grade"] == "note"
    assert found["relays"]["found"].startswith("1 alive on ")
    assert "TLSv1.3" in found["smtp.tls"]["found"]
    assert "certificate of localhost verified, until " in found["smtp.tls"]["found"]
    assert "offered: PLAIN, LOGIN" in found["smtp.login"]["found"]
    assert "reports@example.com may write to p1@example.com" in found["smtp.sender"]["found"]
    assert "after about 6 s" in found["database.lease"]["found"]
    assert await counts(secure) == before
    assert secure.sink.messages == 0
    stages = [stage for _, _, stage in secure.sink.events]
    assert stages[-4:] == [Stage.MAIL, Stage.RCPT, Stage.RSET, Stage.QUIT]
    assert Stage.DATA not in stages
    await relay.kill()


async def test_people_get_aligned_lines_without_colours_and_scripts_get_json(fleet):
    await fleet.hire(1)
    ended = await fleet.run("doctor")
    assert (ended.code, ended.err) == (0, "")
    *lines, last = ended.out.splitlines()
    assert "\x1b" not in ended.out
    found = await examined(fleet, code=0)
    assert [line.split()[:2] for line in lines] == [[f["grade"], f["check"]] for f in found.values()]
    assert len({len(line) - len(line[9:].lstrip().split(None, 1)[1]) for line in lines}) == 1, "the third column"
    assert last == f"0 at fault, 3 worth a note, 0 not checked, of {len(found)}."
    for line in found.values():
        assert set(line) == {"check", "grade", "found", "mend"}
        assert not line["mend"] or line["grade"] in ("note", "fault")


async def test_the_period_that_a_generate_now_would_make_is_said_in_civil_time_and_utc(fleet):
    await fleet.hire(1)
    fleet.timezone = "Asia/Kolkata"
    fleet.report = 'cadence = "daily"\ncovers = "current"'
    found = await examined(fleet, code=0)
    day = await fleet.connection.fetchval("SELECT (now() AT TIME ZONE 'Asia/Kolkata')::date")
    said = found["reports.progress.period"]["found"]
    assert said.startswith(f"would make {day}: {day} 00:00 to ")
    assert said.endswith("Asia/Kolkata (18:30 and 18:30 UTC)")


async def test_settings_that_cannot_be_used_end_with_2(fleet):
    fleet.settings = f'database_url = "{fleet.database}"\n'
    ended = await fleet.run("doctor")
    assert ended.code == 2
    assert [sentence.partition(":")[0] for sentence in ended.sentences] == ["smtp_url", "sender", "reports"]


async def test_a_sender_that_is_no_address_at_a_close_look_ends_with_2_here_and_in_generate(fleet):
    fleet.settings = fleet._settings().replace("reports@example.com>", "reports@exa..mple.com>")
    for command in ("doctor", "generate"):
        ended = await fleet.run(command)
        (sentence,) = ended.sentences
        assert ended.code == 2
        assert sentence.startswith("sender: 'reports@exa..mple.com' is no email address: ")
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.edition") == 0


# ── the database ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda fleet: over_tcp(fleet, f"mailer:{SECRET}-not"), "refuses the user or password"),
        (lambda _: f"postgresql://mailer:{SECRET}@127.0.0.1:{free_port()}/company", "does not answer"),
        (lambda fleet: over_tcp(fleet).replace("/test_", "/tset_"), "does not exist; create it or correct"),
        (lambda _: f"postgresql://mailer:{SECRET}@db.invalid/company", "db.invalid/company does not answer"),
    ],
    ids=["password", "gone", "name", "host"],
)  # fmt: skip
async def test_a_database_that_cannot_be_reached_is_said_as_by_other_commands_and_the_rest_is_looked_at(
    fleet, wrong, says
):
    fleet.database = wrong(fleet)
    found = await examined(fleet)
    line = found["database"]
    assert says in f"{line['found']}; {line['mend']}"
    said = (await fleet.run("status")).sentences[-1]
    assert said.rpartition("; ")[2] == line["mend"] + "."
    assert of_grade(found, "fault") == {"database"}
    assert found["database.rights"]["found"] == "not checked: the database cannot be reached"
    assert found["reports.progress.templates"]["grade"] == found["smtp.sender"]["grade"] == "ok"


async def test_a_missing_schema_is_a_fault_and_the_queries_are_looked_at_before_there_is_one(fleet):
    await fleet.hire(2)
    await fleet.connection.execute("DROP SCHEMA outbox CASCADE")
    found = await examined(fleet)
    assert of_grade(found, "fault") == {"database.schema"}
    assert found["database.schema"]["mend"] == "run `outbox init`"
    assert found["reports.progress.templates"]["grade"] == "ok"
    assert of_grade(found, "unknown") == {"relays", "route", "deliveries"}


async def test_an_older_and_a_newer_schema_are_told_apart(fleet):
    await fleet.connection.execute("INSERT INTO outbox.schema_version (version, compatible) VALUES (99, 99)")
    found = await examined(fleet)
    assert "is newer (version 99)" in found["database.schema"]["found"]
    assert found["database.schema"]["mend"] == "upgrade outbox-mail on this server"
    await fleet.connection.execute("UPDATE outbox.schema_version SET version = 1, compatible = 1 WHERE version <> 99")
    await fleet.connection.execute("DELETE FROM outbox.schema_version WHERE version = 99")
    assert "is older (version 1)" in (await examined(fleet))["database.schema"]["found"]


@pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed (apt-get install pgbouncer)")
@pytest.mark.parametrize("mode, ignore", [*POOLED, pytest.param("session", True, id="session mode")])
async def test_a_pooler_in_between_is_named_and_nothing_more_is_asked_of_it(pooled, mode, ignore):  # noqa: F811
    fleet = await pooled(mode, ignore=ignore)
    found = await examined(fleet)
    assert of_grade(found, "fault") == {"database.session"}
    assert "pooler" in found["database.session"]["found"]
    assert found["database.session"]["mend"].startswith("give database_url the address of Postgres itself")
    assert found["reports.progress.recipients"]["found"].startswith("not checked: ")


async def test_a_standby_is_named_with_the_mend(fleet, outbox_postgres):
    name = await fleet.connection.fetchval("SELECT current_database()")
    with standby_of(outbox_postgres) as standby:
        fleet.database = standby.database_url(name)
        found = await examined(fleet)
    assert "is a standby" in found["database.session"]["found"]
    assert found["database.session"]["mend"] == "give database_url the primary's address"


async def test_a_synchronous_standby_that_is_not_there_is_a_fault_since_every_commit_waits(fleet):
    await fleet.hire(1)
    await fleet.connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    await fleet.connection.execute("SELECT pg_reload_conf()")
    try:
        found = await examined(fleet)
    finally:
        await fleet.connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
        await fleet.connection.execute("SELECT pg_reload_conf()")
    assert of_grade(found, "fault") == {"database.replication"}
    assert "every commit waits" in found["database.replication"]["found"]


@pytest.mark.parametrize("behind, grade", [(30.0, "note"), (90.0, "fault")])
async def test_clocks_that_differ_are_a_note_and_from_a_minute_on_a_fault(fleet, monkeypatch, behind, grade):
    """This host's is put forward, since nothing in the database can take the place of Postgres' own clock."""
    clocks = SimpleNamespace(time=lambda real=time.time: real() + behind, monotonic=time.monotonic)
    connected = await connect(DatabaseUrl.parse(fleet.database), application="outbox doctor")
    monkeypatch.setattr("outbox.doctor.database.time", clocks)
    line = await doctor_database._look_at_clock(connected)
    await connected.close()
    assert line.grade == grade
    assert f"{behind:.0f} s behind this host's" in line.found
    assert "NTP" in line.fix


# ── rights ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def clerk(fleet):
    """The fleet as a role of its own that has no rights yet."""
    name = f"clerk_{os.getpid()}"
    await fleet.connection.execute(f"CREATE ROLE {name} LOGIN; GRANT SELECT ON people, progress TO {name}")
    fleet.database = fleet.database.replace("postgres@", f"{name}@")
    yield fleet, name
    await fleet.stop_all()
    await fleet.connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def test_the_grants_that_the_doctor_asks_for_are_all_that_a_role_needs(clerk):
    fleet, name = clerk
    await fleet.hire(3)
    fleet.top += '\nrate = "1000/s"\ndaily_max = 1000'
    line = (await examined(fleet))["database.rights"]
    assert line["found"].startswith(f"role {name} lacks USAGE ON SCHEMA outbox, ")
    await fleet.connection.execute(line["mend"])
    found = await examined(fleet, code=0)
    assert found["database.rights"]["grade"] == "ok"
    for words in (("generate",), ("relay", "--until-empty"), ("status",), ("audit", "progress")):
        ended = await fleet.run(*words)
        assert ended.code == 0, ended
    assert await fleet.states() == {"sent": 3}
    key = await fleet.connection.fetchval("SELECT key FROM outbox.email LIMIT 1")
    await fleet.connection.execute("UPDATE outbox.delivery SET state = 'dead'")
    assert (await fleet.run("resolve", key, "--resend")).code == 0
    assert (await fleet.run("relay", "--until-empty")).code == 0
    await fleet.connection.execute(
        "UPDATE outbox.email SET created_at = '2020-01-01'; UPDATE outbox.report SET created_at = '2020-01-01'"
    )
    ended = await fleet.run("prune", "--keep", "400d", "--json")
    assert ended.code == 0, ended
    assert '"emails": 3' in ended.out


async def test_each_right_that_is_missing_is_named(clerk):
    fleet, name = clerk
    line = (await examined(fleet))["database.rights"]
    await fleet.connection.execute(line["mend"])
    role = await asyncpg.connect(fleet.database)
    for right in together(ROLES):
        await fleet.connection.execute(f"REVOKE {right.clause} FROM {name}")
        found = await look_at_rights(role)
        assert found.found == f"role {name} lacks {right.clause}"
        await fleet.connection.execute(found.fix)
    await role.close()


async def test_a_database_that_is_read_only_and_one_in_which_no_schema_may_be_made_are_named(clerk):
    fleet, name = clerk
    database = await fleet.connection.fetchval("SELECT current_database()")
    await fleet.connection.execute("DROP SCHEMA outbox CASCADE")
    line = (await examined(fleet))["database.rights"]
    assert line["grade"] == "fault"
    assert line["mend"].startswith(f"GRANT CREATE ON DATABASE {database} TO {name}")
    await fleet.connection.execute(f"ALTER ROLE {name} SET default_transaction_read_only = on")
    line = (await examined(fleet))["database.rights"]
    assert "read-only" in line["found"]


# ── the mail server ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_mail_server_that_is_gone_is_a_fault_and_the_rest_is_looked_at(fleet):
    await fleet.hire(1)
    await fleet.sink.close_listener()
    found = await examined(fleet)
    assert of_grade(found, "fault") == {"smtp.server"}
    assert found["smtp.server"]["mend"] == "start it or correct smtp_url"
    assert found["smtp.sender"]["found"] == "not checked: the mail server cannot be reached"
    assert found["relays"]["grade"] == "note"


async def test_a_login_without_starttls_is_a_fault_and_is_not_given(fleet):
    await fleet.hire(1)
    fleet.sink.login = ("user", SECRET)
    fleet.smtp = f"smtp://user:{SECRET}@127.0.0.1:{fleet.sink.port}"
    found = await examined(fleet)
    assert of_grade(found, "fault") == {"smtp.tls"}
    assert "offers no STARTTLS" in found["smtp.tls"]["found"]
    assert not any(visit.authenticated for visit in fleet.sink.visits)


async def test_a_certificate_that_does_not_hold_is_a_fault_where_a_login_would_be_sent(secure):
    await secure.hire(1)
    found = await examined(secure)
    assert of_grade(found, "fault") == {"smtp.tls"}
    assert "unable to get local issuer certificate" in found["smtp.tls"]["found"]
    assert "SSL_CERT_FILE" in found["smtp.tls"]["mend"]
    secure.smtp = secure.smtp.replace("localhost", "127.0.0.1")
    found = await examined(secure, environment=trusting(secure))
    assert "127.0.0.1" in found["smtp.tls"]["found"]
    assert "mismatch" in found["smtp.tls"]["found"]
    assert not any(visit.authenticated for visit in secure.sink.visits)


async def test_without_a_login_an_unverified_certificate_is_a_note_and_the_dialogue_goes_on(secure):
    await secure.hire(1)
    secure.smtp = f"smtp://localhost:{secure.sink.port}"
    secure.sink.login = None
    found = await examined(secure, code=0)
    assert found["smtp.tls"]["grade"] == "note"
    assert "TLSv1.3" in found["smtp.tls"]["found"]
    assert "not verified (unable to get local issuer certificate)" in found["smtp.tls"]["found"]
    assert found["smtp.sender"]["grade"] == "ok"


async def test_starttls_that_is_offered_and_fails_is_a_fault_with_a_login(secure):
    await secure.hire(1)
    secure.sink.script = At(Stage.STARTTLS, Reply("454 4.7.0 TLS not available"))
    found = await examined(secure, environment=trusting(secure))
    assert of_grade(found, "fault") == {"smtp.tls"}
    assert "STARTTLS is offered and fails (454 4.7.0 TLS not available)" in found["smtp.tls"]["found"]
    assert not any(visit.authenticated for visit in secure.sink.visits)


@pytest.mark.parametrize(
    "action, says",
    [(Reply("454 4.7.0 TLS not available"), "454 4.7.0 TLS not available"), (Cut(), "closed the connection")],
)
async def test_starttls_that_is_offered_and_fails_is_a_note_without_a_login_and_the_dialogue_goes_on(
    secure, action, says
):
    await secure.hire(1)
    secure.smtp, secure.sink.login = f"smtp://localhost:{secure.sink.port}", None
    secure.sink.script = At(Stage.STARTTLS, action)
    found = await examined(secure, code=0)
    assert found["smtp.tls"]["grade"] == "note"
    assert "STARTTLS is offered and fails" in found["smtp.tls"]["found"]
    assert says in found["smtp.tls"]["found"]
    assert "so emails go in clear text" in found["smtp.tls"]["found"]
    assert found["smtp.sender"]["grade"] == "ok"


async def test_a_certificate_that_ends_soon_is_a_note(fleet, authority):
    await fleet.hire(1)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=3, hours=1)
    authority.issue_cert("localhost", not_after=soon).configure_cert(context)
    authority.cert_pem.write_to_path(str(fleet.directory / "authority.pem"))
    async with Sink(tls=context, implicit_tls=True) as sink:
        fleet.smtp = f"smtps://localhost:{sink.port}"
        found = await examined(fleet, code=0, environment=trusting(fleet))
    assert found["smtp.tls"]["grade"] == "note"
    assert found["smtp.tls"]["found"].endswith(": 3 days")


async def test_the_two_kinds_of_tls_mixed_up_are_told(fleet, secure):
    secure.smtp = f"smtps://localhost:{secure.sink.port}"
    line = (await examined(secure))["smtp.server"]
    assert line["mend"].startswith(f"if it begins without TLS, write smtp://…:{secure.sink.port}")


async def test_a_refused_login_is_a_fault_and_stays_secret(secure):
    await secure.hire(1)
    secure.sink.login = ("user", "another")
    found = await examined(secure, environment=trusting(secure))
    assert of_grade(found, "fault") == {"smtp.login"}
    assert "535" in found["smtp.login"]["found"]
    assert "offered: PLAIN, LOGIN" in found["smtp.login"]["found"]
    assert found["smtp.sender"]["grade"] == "unknown"


@pytest.mark.parametrize(
    "stage, reply, grade, says",
    [
        (Stage.MAIL, "553 5.7.1 not yours", "fault", "553 5.7.1 not yours to MAIL FROM:<reports@example.com>"),
        (Stage.RCPT, "550 5.1.1 no such user", "fault", "550 5.1.1 no such user to RCPT TO:<p1@example.com>"),
        (Stage.RCPT, "450 4.2.0 greylisted", "note", "greylisted"),
        (Stage.EHLO, "554 5.7.1 blocked", "fault", "554 5.7.1 blocked"),
        (Stage.CONNECT, "554 5.7.1 go away", "fault", "go away"),
        (Stage.RCPT, None, "fault", "breaks off"),
    ],
)
async def test_what_the_server_says_to_the_sender_is_told(fleet, stage, reply, grade, says):
    await fleet.hire(1)
    fleet.sink.script = At(stage, Reply(reply) if reply else Cut())
    found = await examined(fleet, code=int(grade == "fault"))
    (check,) = [line["check"] for line in found.values() if says in line["found"]]
    assert found[check]["grade"] == grade
    assert check == ("smtp.sender" if stage in (Stage.MAIL, Stage.RCPT) and reply else "smtp.server")
    assert fleet.sink.messages == 0


@pytest.mark.parametrize("lmtp", [False, True], ids=["smtp", "lmtp"])
@pytest.mark.parametrize(
    "stage, action, found_there, fix",
    [
        (
            Stage.CONNECT,
            Reply("421 4.7.0 too many", then_cut=True),
            "greets with 421 4.7.0 too many",
            "connections_max",
        ),
        (Stage.CONNECT, Reply("450 4.3.2 not now"), "greets with 450 4.3.2 not now", "for now"),
        (Stage.CONNECT, Reply("554-5.7.1 no\r\n554 5.7.1 mail", then_cut=True), "greets with 554 5.7.1 no", "operator"),
        (Stage.EHLO, Reply("550 5.7.1 not you"), "answers {hello} [127.0.0.1] with 550 5.7.1 not you", "helo_name"),
        (Stage.EHLO, Reply("421 4.3.2 closing", then_cut=True), "with 421 4.3.2 closing", "for now"),
    ],
)
async def test_a_server_that_refuses_before_any_mail_is_shown_with_its_reply(
    fleet, lmtp, stage, action, found_there, fix
):
    async with Sink(At(stage, action), lmtp=lmtp) as sink:
        fleet.smtp = sink.url
        line = (await examined(fleet))["smtp.server"]
    assert line["grade"] == "fault"
    assert found_there.format(hello="LHLO" if lmtp else "EHLO") in line["found"]
    assert fix in line["mend"]


async def test_a_server_that_refuses_ehlo_and_takes_helo_is_a_note_with_the_reply(fleet):
    await fleet.hire(1)
    fleet.sink.script = At(Stage.EHLO, Reply("502 5.5.1 what?"), times=1)
    line = (await examined(fleet, code=0))["smtp.server"]
    assert line["grade"] == "note"
    assert "answers EHLO [127.0.0.1] with 502 5.5.1 what? and takes HELO" in line["found"]


async def test_a_535_is_shown_although_the_server_hangs_up_after_it(fleet, authority, certificate):
    await fleet.hire(1)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    authority.cert_pem.write_to_path(str(fleet.directory / "authority.pem"))

    async def refuse(peer):
        await peer.say("220 strange.example")
        await peer.hear()
        await peer.say("250-strange.example", "250 AUTH LOGIN PLAIN")
        await peer.hear()
        await peer.say("535 5.7.8 wrong")

    async with Scripted(refuse, tls=context) as server:
        fleet.smtp = f"smtps://user:{SECRET}@localhost:{server.port}"
        found = await examined(fleet, environment=trusting(fleet))
    assert of_grade(found, "fault") == {"smtp.login"}
    assert "the login of smtp_url is refused (535 5.7.8 wrong; offered: LOGIN, PLAIN)" in found["smtp.login"]["found"]
    assert sum(line.startswith("AUTH") for line in server.heard) == 1


@pytest.mark.parametrize(
    "setting, grade, says",
    [
        ("", "ok", "EHLO has the address literal [127.0.0.1] (the host name, "),
        ('helo_name = "[192.0.2.1]"', "ok", "EHLO has the address literal [192.0.2.1] (helo_name)"),
        ('helo_name = "mail.invalid"', "note", "EHLO has the name mail.invalid (helo_name), which has no address"),
    ],
)
async def test_the_name_in_ehlo_is_shown_with_where_it_comes_from(fleet, monkeypatch, setting, grade, says):
    await fleet.hire(1)
    fleet.top = setting
    line = (await examined(fleet, code=0))["smtp.helo"]
    assert line["grade"] == grade
    assert says in line["found"]


async def test_a_name_that_the_server_refuses_at_rcpt_is_a_fault_of_the_name(fleet):
    await fleet.hire(1)
    fleet.sink.script = At(Stage.RCPT, Reply("504 5.5.2 <vm>: Helo command rejected: need fully-qualified hostname"))
    found = await examined(fleet)
    assert of_grade(found, "fault") == {"smtp.helo"}
    assert "refuses the name in EHLO, [127.0.0.1] (504 5.5.2 <vm>: Helo command rejected" in found["smtp.helo"]["found"]
    assert found["smtp.helo"]["mend"].startswith("set helo_name")
    assert found["smtp.sender"]["grade"] == "unknown"


async def test_a_server_that_takes_less_than_the_largest_message_is_a_fault_and_slow_ones_are_a_note(fleet):
    fleet.sink.size_max = 50_000
    fleet.sink.pipelining = False
    await fleet.put_emails(1, size=60_000)
    largest = await fleet.connection.fetchval("SELECT max(length(message)) FROM outbox.email")
    found = await examined(fleet)
    assert f"at most 50000 bytes, the largest message known has {largest}" in found["smtp.size"]["found"]
    assert found["smtp.size"]["grade"] == "fault"
    assert found["smtp.pipelining"]["grade"] == "note"


# ── reports ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "query, text, says",
    [
        ("recipients", "select id::text as key from people", "returns no column email"),
        ("recipients", "selec id from people", "syntax error"),
        ("recipients", "select 1 / (id - 1) as key, email from people", "division by zero"),
        ("data", "select nothing from people where id::text = :key", 'column "nothing" does not exist'),
        ("data", "select done from progress where person_id = :key", "compare with cast(:key as int)"),
        (
            "data",
            "select 1 where timestamp '2026-11-24' >= :starts_at and :key <> ''",
            "at time zone 'UTC') >= :starts_at",
        ),
        ("recipients", "select 'a' as key, 'a@b.c' as email, time '24:00' as at", "column at has the value 24:00:00"),
        ("data", "select done from progress where person_id::text = any(:keys)", "returns no column key"),
    ],
)
async def test_a_query_that_cannot_be_used_is_said_in_generates_own_sentence(fleet, query, text, says):
    await fleet.hire(2)
    setattr(fleet, query, text)
    found = await examined(fleet)
    check = f"reports.progress.{query}"
    assert of_grade(found, "fault") == {check}
    assert says in found[check]["found"]
    (sentence,) = (await fleet.run("generate")).sentences
    assert sentence == f"{check}: {found[check]['found']}; {found[check]['mend']}."


async def test_a_value_that_python_cannot_hold_is_a_fault_with_recipient_column_and_value(fleet):
    await fleet.hire(3)
    fleet.data = "select case when :key = '2' then date '20226-11-24' end as due"
    line = (await examined(fleet))["reports.progress.data"]
    assert line["found"].startswith("recipient 2: column due has the value 20226-11-24, which Python cannot represent")
    assert line["mend"] == "correct the value, or let the query return it as text"


async def test_a_timestamp_without_time_zone_beside_a_cast_bound_is_a_note(fleet):
    await fleet.hire(2)
    fleet.data = "select 1 as a from build where :key <> '' and at::timestamp >= cast(:starts_at as timestamptz)"
    line = (await examined(fleet, code=0))["reports.progress.data"]
    assert line["grade"] == "note"
    assert line["found"].startswith(
        ":starts_at is compared with a timestamp without time zone, which Postgres reads in "
    )
    assert line["mend"].startswith("write (col at time zone 'UTC') >= :starts_at if the column is written in UTC")


async def test_a_report_that_is_at_fault_does_not_touch_the_next(fleet):
    await fleet.hire(2)
    fleet.recipients = "select id::text as key from people"
    fleet.report = """
[reports.other]
recipients = "select id::text as key, email from people"
data = "select :key as k"
link = "https://reports.example.com/{token}"
"""
    found = await examined(fleet)
    assert of_grade(found, "fault") == {"reports.progress.recipients"}
    assert found["reports.other.recipients"]["found"] == "2 with a key of their own"
    assert found["reports.other.templates"]["grade"] == "ok"


async def test_queries_that_write_are_a_note_and_write_nothing(fleet):
    await fleet.hire(2)
    await fleet.connection.execute(
        "CREATE FUNCTION noted(k text) RETURNS text LANGUAGE sql AS $$ INSERT INTO build VALUES (k) RETURNING key $$"
    )
    before = await counts(fleet)
    for recipients, data, check in (
        (fleet.recipients, COUNTING_DATA, "reports.progress.data"),
        ("select noted(id::text) as key, email from people", fleet.data, "reports.progress.recipients"),
    ):
        fleet.recipients, fleet.data = recipients, data
        found = await examined(fleet, code=0)
        assert found[check]["grade"] == "note"
        assert "the query writes" in found[check]["found"]
        assert await counts(fleet) == before


@pytest.mark.parametrize(
    "template, says",
    [
        ("{{ recipient.name", "progress/email.html.j2, line 1: "),
        ("{{ recipient.nmae }}", "progress/email.html.j2, line 1: recipient has no nmae (did you mean name?)"),
    ],
    ids=["compile", "render"],
)
async def test_a_broken_template_is_named_with_its_line(fleet, template, says):
    await fleet.hire(1)
    own = fleet.directory / "templates" / "progress"
    own.mkdir(parents=True)
    (own / "email.html.j2").write_text(template)
    found = await examined(fleet)
    assert of_grade(found, "fault") == {"reports.progress.templates"}
    assert says in found["reports.progress.templates"]["found"]
    assert found["reports.progress.templates"]["mend"].startswith("correct it")


async def test_addresses_that_would_be_refused_are_named_up_to_ten(fleet):
    await fleet.hire(3)
    await fleet.connection.execute("INSERT INTO people SELECT n, 'bad' || n, 'x' FROM generate_series(4, 16) n")
    await fleet.connection.execute("UPDATE people SET email = NULL WHERE id = 16")
    line = (await examined(fleet))["reports.progress.addresses"]
    assert line["grade"] == "fault"
    assert line["found"].startswith("13 of 16 get no report: key 4: 'bad4' is no email address: ")
    assert line["found"].count(": key ") + line["found"].count("; key ") == 10
    assert line["found"].endswith(" and 3 more")
    ended = await fleet.run("generate")
    assert sum("recipient " in sentence for sentence in ended.sentences) == 13


async def test_keys_that_come_twice_and_addresses_of_two_keys_are_notes_and_nobody_at_all_is_a_fault(fleet):
    line = (await examined(fleet))["reports.progress.recipients"]
    assert (line["grade"], line["found"]) == ("fault", "the recipients query returns no row")
    assert "may_be_empty = true" in line["mend"]
    usual, fleet.report = fleet.report, f"may_be_empty = true\n{fleet.report}"
    found = await examined(fleet, code=0)
    assert found["reports.progress.recipients"]["found"] == "nobody is owed a report, which the settings allow"
    fleet.report = usual
    await fleet.hire(3)
    fleet.recipients = "select id::text as key, email from people, generate_series(1, 2)"
    line = (await examined(fleet, code=0))["reports.progress.recipients"]
    assert line["grade"] == "note"
    assert line["found"].startswith("6 rows, 3 of them with a key that came before")
    fleet.recipients = "select id * 10 + n as key, email from people, generate_series(1, 2) n order by id, n"
    line = (await examined(fleet, code=0))["reports.progress.addresses"]
    assert line["found"] == "3 belong to more than one key and get an email for each, such as p1@example.com"


SOURCE = """
from pathlib import Path
from outbox import Recipient

class Progress:
    def recipients(self, period):
        return [Recipient("1", "p1@example.com"), Recipient("2", "nobody")]
    def build(self, recipient, period):
        Path("built").touch()
        return []
"""


async def test_a_class_that_cannot_be_made_is_a_fault_and_build_is_never_called(fleet):
    (fleet.directory / "mine.py").write_text(SOURCE)
    fleet.source = "mine:Progess"
    found = await examined(fleet)
    assert of_grade(found, "fault") == {"reports.progress.source"}
    assert "has no attribute 'Progess'" in found["reports.progress.source"]["found"]
    fleet.source = "mine:Progress"
    found = await examined(fleet)
    assert found["reports.progress.source"]["grade"] == "ok"
    assert of_grade(found, "fault") == {"reports.progress.addresses"}
    assert "build() may write" in found["reports.progress.data"]["found"]
    assert not (fleet.directory / "built").exists()


async def test_a_definition_that_is_not_the_fleets_is_said_in_generates_own_sentence(fleet):
    await fleet.hire(1)
    assert (await fleet.run("generate")).code == 0
    fleet.timezone = "Europe/Berlin"
    found = await examined(fleet)
    line = found["reports.progress.period"]
    assert of_grade(found, "fault") == {"reports.progress.period"}
    (sentence,) = (await fleet.run("generate")).sentences
    assert sentence == f"{line['found']}; {line['mend']}."
    assert found["reports.progress.recipients"]["found"] == "not checked: the period is not known"


async def test_a_resolver_that_cannot_be_asked_is_a_fault(fleet):
    await fleet.hire(1)
    fleet.top = 'in_doubt = "ask"\nresolver = "mine:was_accepted"'
    found = await examined(fleet)
    assert of_grade(found, "fault") == {"in_doubt"}
    assert "mine:was_accepted" in found["in_doubt"]["found"]
    (fleet.directory / "mine.py").write_text("def was_accepted(email):\n    return None\n")
    found = await examined(fleet, code=0)
    assert found["in_doubt"]["found"] == "ask: mine:was_accepted can be asked"


# ── the fleet ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_fleet_in_trouble_and_what_waits_for_a_person_are_told(fleet):
    await fleet.hire(1)
    await fleet.put_emails(2)
    await fleet.connection.execute("UPDATE outbox.delivery SET due_at = now() - interval '1 hour' WHERE email = 1")
    found = await examined(fleet)
    assert of_grade(found, "fault") == {"relays"}
    assert "none is alive, and an email has been due for 36" in found["relays"]["found"]
    await fleet.connection.execute("DELETE FROM outbox.delivery")
    await fleet.put_emails(1, first=3)
    fleet.sink.script = At(Stage.RCPT, Reply("550 no"), times=1)
    fleet.top = "lease_s = 60"
    relay = await fleet.relay()

    async def is_dead():
        return (await fleet.states()).get("dead")

    await until(is_dead, "the email is dead")
    relay.send(signal.SIGSTOP)  # it lives, and takes nothing back of what is written here
    place = f"127.0.0.1:{fleet.sink.port}"
    await fleet.connection.execute(
        "INSERT INTO outbox.route (name, reason, failures, retry_at) VALUES ($1, '454 quota', 7, now())", place
    )
    found = await examined(fleet)
    assert of_grade(found, "fault") == {"route", "deliveries"}
    assert found["route"]["found"].startswith(f"the fleet waits for {place} since 20")
    assert found["route"]["found"].endswith("UTC, failed 7 times: 454 quota")
    assert found["deliveries"]["found"] == "1 email failed and will not be tried again"
    await fleet.connection.execute("DELETE FROM outbox.route; UPDATE outbox.relay SET trouble = 'it is stuck'")
    found = await examined(fleet)
    assert of_grade(found, "fault") == {"relays", "deliveries"}
    assert "it is stuck" in found["relays"]["found"]
    await relay.kill()

"""The operators' board over HTTP: who may look, what is decided by whom, and what a reader's browser is spared."""

import asyncio
import re
import signal
from html import unescape

import asyncpg

from outbox.database.schema import initialise
from outbox.sandbox.postgres import postgres
from outbox.sandbox.smtp_sink import Cut, Stage
from outbox.web.board.streams import STREAMS_MAX
from tests.support.fleet import DEADLINE_S
from tests.support.web_client import opened, settled_web

TOKEN = "an-operators-token-of-32-letters"
PAGES = ("/", "/editions", "/emails", "/pauses", "/decisions")


class Operator:
    """Anna, signed in, with what her browser keeps."""

    def __init__(self, browser, cookie):
        self.browser = browser
        self.cookie = cookie

    async def get(self, path):
        return await self.browser.ask(path, Cookie=self.cookie)

    async def post(self, path, **form):
        return await self.browser.ask(path, form=form, Cookie=self.cookie)

    async def csrf(self):
        return hidden(await self.get("/emails"))["csrf"]

    async def confirmed(self, **form):
        """What the confirmation page shows, and carries."""
        return await self.post("/confirm", csrf=await self.csrf(), **form)


def hidden(answer):
    """The hidden fields of a page's last form."""
    last = answer.body[answer.body.rfind('<form method="post"') :]
    return {name: unescape(value) for name, value in re.findall(r'type="hidden" name="(.*?)" value="(.*?)"', last)}


async def signed_in(fleet, name="Anna", **settings):
    fleet.report = settled_web(board_token=f'"{TOKEN}"', **settings)
    process, browser = await opened(fleet)
    entered = await browser.ask("/sign-in", form={"name": name, "token": TOKEN})
    return process, Operator(browser, entered.headers["Set-Cookie"].partition(";")[0])


async def trail(fleet):
    """What people decided, and what the emails' own trails say of it, without when and who."""
    operations = await fleet.connection.fetch("SELECT what, target, why, emails FROM outbox.operation ORDER BY id")
    attempts = await fleet.connection.fetch(
        "SELECT m.key, a.attempt, a.verdict, regexp_replace(a.reply, '^.*? (decided|retried|cancelled)', '\\1')"
        "  FROM outbox.attempt a JOIN outbox.email m ON m.id = a.email"
        " WHERE a.verdict IN ('resolved', 'retried', 'cancelled') ORDER BY m.key"
    )
    return [tuple(row) for row in operations], [tuple(row) for row in attempts]


def meets(action, address):
    def script(at, visit):
        return action if at is Stage.DOT and visit.recipients[-1:] == [address] else None

    return script


async def test_who_is_not_signed_in_sees_nothing_and_changes_nothing(fleet):
    await fleet.put_emails(1)
    _, anna = await signed_in(fleet)
    for path in (*PAGES, "/events", "/emails/1", "/emails/1/html", "/emails/1/source", "/editions/1"):
        assert (await anna.browser.ask(path)).status == 401, path
    for path in ("/confirm", "/decide"):
        form = {"act": "cancel", "seen": "1:0:pending", "why": "because", "csrf": await anna.csrf()}
        assert (await anna.browser.ask(path, form=form)).status == 401, path
        for csrf in ("", "guessed"):
            assert (await anna.post(path, **(form | {"csrf": csrf}))).status == 403, path
        elsewhere = await anna.browser.ask(path, form=form, Cookie=anna.cookie, Sec_Fetch_Site="cross-site")
        assert elsewhere.status == 403, path
        assert (await anna.get(path)).status == 405, path
    assert await fleet.states() == {"pending": 1}
    assert await trail(fleet) == ([], [])


async def test_a_decision_leaves_the_trail_that_the_command_leaves(fleet):
    await fleet.put_emails(6)
    fleet.sink.script = meets(Cut(), "p1@example.com")
    assert (await fleet.run("relay", "--until-empty")).code == 0
    await fleet.put_emails(4, first=11)
    await fleet.connection.execute(
        "UPDATE outbox.delivery SET due_at = now() + interval '1 hour' WHERE state = 'pending'"
    )
    ids = dict(await fleet.connection.fetch("SELECT key, id FROM outbox.email"))
    _, anna = await signed_in(fleet)

    async def decided(act, key):
        shown = await anna.confirmed(act=act, **{f"pick.{ids[key]}": "1"})
        assert key in shown.body
        assert shown.body.count("<li><bdi>") == 1
        return await anna.post("/decide", **hidden(shown), why="I know")

    assert (await fleet.run("cancel", "mail11", "--why", "I know")).code == 0
    assert (await fleet.run("retry", "mail11", "--why", "I know")).code == 0
    await decided("cancel", "mail12")
    await decided("retry", "mail12")
    await decided("sent", "mail1")
    (cancel, retry, *board), attempts = await trail(fleet)
    as_command = [(what, target.replace("11", "12"), why, n) for what, target, why, n in (cancel, retry)]
    assert board == [*as_command, ("resolve sent", "mail1", "I know", 1)]
    said = {key: [row[1:] for row in attempts if row[0] == key] for key, *_ in attempts}
    assert said["mail12"] == said["mail11"]
    assert said["mail1"] == [(1, "resolved", "decided: sent, because I know")]
    who = await fleet.connection.fetch("SELECT who FROM outbox.operation WHERE id > 2")
    assert {row["who"] for row in who} == {"Anna (127.0.0.1)"}

    for act, held in (("pause", True), ("resume", False)):
        shown = await anna.confirmed(act=act, pause="progress")
        assert "progress" in shown.body
        await anna.post("/decide", **hidden(shown), why="the figures")
        assert bool(await fleet.connection.fetchval("SELECT count(*) FROM outbox.pause")) is held
    assert [row[:3] for row in (await trail(fleet))[0][-2:]] == [
        ("pause", "progress", "the figures"),
        ("resume", "progress", "the figures"),
    ]


async def test_a_decision_about_all_that_fit_is_about_what_was_shown(fleet):
    await fleet.put_emails(5)
    _, anna = await signed_in(fleet)
    shown = await anna.confirmed(act="cancel", to="p*@example.com")
    assert "5 emails" in shown.body
    assert all(f"mail{n}<" in shown.body for n in range(1, 6))
    await fleet.put_emails(1, first=9)
    await fleet.run("cancel", "mail2", "--why", "another was quicker")
    assert "Say why" in (await anna.post("/decide", **hidden(shown), why=" ")).body
    assert await fleet.states() == {"pending": 5, "cancelled": 1}
    done = await anna.post("/decide", **hidden(shown), why="not these")
    assert "4 cancelled" in done.body
    assert "1 email has changed since they were shown" in done.body
    assert (
        await fleet.connection.fetchval(
            "SELECT state FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email WHERE key = 'mail9'"
        )
        == "pending"
    )
    assert (await trail(fleet))[0][-1] == ("cancel", "--to 'p*@example.com'", "not these", 4)

    retried = await anna.confirmed(act="retry", to="p*@example.com", state="cancelled")
    assert "5 emails" in retried.body
    for act in ("retry", "cancel"):  # it is cancelled again, but not as it was
        assert (await fleet.run(act, "mail3", "--why", "changed my mind")).code == 0
    done = await anna.post("/decide", **hidden(retried), why="these after all")
    assert "4 retried" in done.body
    assert await fleet.states() == {"pending": 5, "cancelled": 1}


async def test_what_changed_between_confirmation_and_click_is_left_and_said(fleet):
    await fleet.put_emails(2)
    fleet.sink.script = meets(Cut(), "p1@example.com")
    assert (await fleet.run("relay", "--until-empty")).code == 0
    _, anna = await signed_in(fleet)
    shown = await anna.confirmed(act="resend", **{"pick.1": "1"})
    assert (await fleet.run("resolve", "mail1", "--sent", "--why", "the log has it")).code == 0
    said = await anna.post("/decide", **hidden(shown), why="again")
    assert "mail1 has changed since it was shown: it is sent now, and was left." in said.body
    assert await fleet.states() == {"sent": 2}
    assert len((await trail(fleet))[0]) == 1


async def test_what_others_wrote_is_shown_and_does_not_run(fleet):
    nasty = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    message = f"Subject: {nasty}\r\nContent-Type: text/html\r\n\r\n<p>{nasty}</p>".encode()
    await fleet.connection.execute(
        "INSERT INTO outbox.email (key, sender, recipient, message_id, message, made_by)"
        " VALUES ($1, 'a@example.com', '\"''x&y\"@example.com', $1, $2, $1)",
        nasty, message,
    )  # fmt: skip
    await fleet.connection.execute("INSERT INTO outbox.delivery (email) VALUES (1)")
    await fleet.connection.execute(
        "INSERT INTO outbox.relay (host, pid, backend_pid, version, last_reply, ended_at)"
        " VALUES ($1, 1, 1, $1, $1, now())",
        nasty,
    )
    await fleet.connection.execute("INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply)"
                                   " VALUES (1, 1, 1, 'deferred', $1)", nasty)  # fmt: skip
    await fleet.connection.execute("INSERT INTO outbox.pause (report, who, why) VALUES ($1, $1, $1)", nasty)
    await fleet.connection.execute(
        "INSERT INTO outbox.operation (who, what, target, why, emails) VALUES ($1, $1, $1, $1, 0)", nasty
    )
    await fleet.connection.execute(
        "INSERT INTO outbox.edition (report, period, starts_at, ends_at) VALUES ($1, $1, '2026-11-16', '2026-11-23')",
        nasty,
    )
    _, anna = await signed_in(fleet, name=nasty)
    confirmed = await anna.confirmed(act="cancel", **{"pick.1": "1"})
    seen = [await anna.get(path) for path in (*PAGES, "/emails/1", "/editions/1", "/emails?where=reply&q=%3Cscript%3E")]
    for answer in (*seen, confirmed):
        assert answer.status == 200
        assert nasty[:25] not in answer.body
        assert "<img" not in answer.body
        policy = answer.headers["Content-Security-Policy"]
        assert "script-src 'nonce-" in policy
        assert "unsafe" not in policy
    shown = await anna.get("/emails/1/html")
    assert nasty in shown.body
    policy = shown.headers["Content-Security-Policy"].split("; ")
    assert {"sandbox", "default-src 'none'", "img-src data:", "frame-ancestors 'self'"} <= set(policy)
    assert not any(rule.startswith(("script-src", "connect-src", "frame-src")) for rule in policy)


async def test_a_board_that_is_read_only_offers_nothing_and_takes_nothing(fleet):
    await fleet.put_emails(1)
    await fleet.connection.execute(
        "INSERT INTO outbox.edition (report, period, starts_at, ends_at) VALUES ('r', '1', '2026-11-16', '2026-11-23')"
    )
    _, anna = await signed_in(fleet, read_only="true")
    for path in (*PAGES, "/emails/1", "/emails?state=pending&q=p", "/editions/1"):
        answer = await anna.get(path)
        assert answer.status == 200
        forms = re.findall(r'<form [^>]*method="post" action="([^"]*)"', answer.body)
        assert forms == ["/sign-out"], path
    csrf = hidden(await anna.get("/"))["csrf"]
    for path in ("/confirm", "/decide"):
        form = {"act": "cancel", "seen": "1:0:pending", "why": "because", "csrf": csrf}
        assert (await anna.post(path, **form)).status == 403
    assert await fleet.states() == {"pending": 1}


async def test_page_by_page_each_row_is_seen_once_whatever_comes_meanwhile(fleet):
    await fleet.put_emails(120)
    await fleet.connection.execute(
        "UPDATE outbox.delivery SET state = 'sent', settled_at = now(), attempt = 1, relay = 1;"
        "INSERT INTO outbox.attempt (email, attempt, verdict, reply) SELECT email, 1, 'accepted', '250 ok'"
        " FROM outbox.delivery;"
        "INSERT INTO outbox.edition (report, period, starts_at, ends_at)"
        " SELECT 'r', n, date '2020-01-06' + n % 20, '2030-01-01' FROM generate_series(1, 45) n;"
        "INSERT INTO outbox.operation (who, what, target, why, emails)"
        " SELECT 'ann', 'cancel', n, '', 0 FROM generate_series(1, 110) n"
    )
    _, anna = await signed_in(fleet)

    async def walked(path, row):
        found = []
        while path is not None:
            answer = await anna.get(path)
            found += map(int, re.findall(row, answer.body))
            following = re.search(r'rel="next" href="([^"]*)"', answer.body)
            path = following and unescape(following[1])
            await fleet.put_emails(1, first=1000 + await fleet.connection.fetchval("SELECT max(id) FROM outbox.email"))
        return found

    for query in ("where=address&q=P", "state=sent", "where=reply&q=250", "where=key&q=mail"):
        found = await walked(f"/emails?{query}", r'name="pick\.(\d+)"')
        assert found[-120:] == list(range(120, 0, -1)), query
        assert found == sorted(set(found), reverse=True), query
    editions = await fleet.connection.fetch("SELECT id FROM outbox.edition ORDER BY starts_at DESC, id DESC")
    assert await walked("/editions", r'<a href="/editions/(\d+)">') == [row["id"] for row in editions]
    assert await walked("/decisions", r"<bdi>(\d+)</bdi>") == list(range(110, 0, -1))


async def test_whom_the_proxy_names_is_who_decides(fleet):
    fleet.report = settled_web(
        board_header='"X-Forwarded-Email"', board_users='["anna@example.com"]', trusted_proxies='["127.0.0.1"]'
    )
    _, browser = await opened(fleet)
    named = {"X_Forwarded_Email": "anna@example.com", "X_Forwarded_For": "192.0.2.1"}
    first = await browser.ask("/pauses", **named)
    named["Cookie"] = first.headers["Set-Cookie"].partition(";")[0]
    assert (await browser.ask("/pauses", X_Forwarded_Email="eve@example.com")).status == 403
    shown = await browser.ask("/confirm", form={**hidden(first), "act": "pause", "pause": ""}, **named)
    await browser.ask("/decide", form={**hidden(shown), "why": "enough"}, **named)
    row = await fleet.connection.fetchrow("SELECT who, what, target, why FROM outbox.operation")
    assert tuple(row) == ("anna@example.com", "pause", "the fleet", "enough")


async def asked_for_events(anna):
    reader, writer = await asyncio.open_connection("127.0.0.1", anna.browser.port)
    writer.write(f"GET /events HTTP/1.1\r\nHost: x\r\nCookie: {anna.cookie}\r\n\r\n".encode())
    return reader, writer


async def look_on(anna):
    """A connection that is told what is new."""
    reader, writer = await asked_for_events(anna)
    await reader.readuntil(b"data: ")
    return reader, writer


async def test_the_board_outlives_postgres_and_says_so_and_ends_at_once(fleet):
    with postgres(settings={"fsync": "off"}) as server:
        connection = await asyncpg.connect(server.url)
        await initialise(connection)
        await connection.close()
        fleet.database = server.url
        process, anna = await signed_in(fleet)
        reader, writer = await look_on(anna)
        async with asyncio.timeout(DEADLINE_S):
            await reader.readuntil(b"All is well")
            server.stop("immediate")
            await reader.readuntil(b"No answer from Postgres")
            away = await anna.get("/")
            assert (away.status, "No answer from Postgres" in away.body) == (200, True)
            assert (await anna.get("/emails")).status == 503
            server.start()
            await reader.readuntil(b"All is well")
        assert (await anna.get("/emails")).status == 200
        others = [await look_on(anna) for _ in range(STREAMS_MAX - 1)]
        one_more, its_writer = await asked_for_events(anna)
        assert b" 503 " in await one_more.readline()
        process.send(signal.SIGTERM)
        assert (await process.ended(3)).code == 0
        for one in (writer, its_writer, *(writer for _, writer in others)):
            one.close()


async def test_what_no_form_of_ours_says_is_no_fault_of_ours(fleet):
    await fleet.put_emails(2)
    process, anna = await signed_in(fleet, name="An\0na")
    csrf = await anna.csrf()
    decide = {"act": "cancel", "csrf": csrf, "why": "not \0 wanted"}
    asked = [
        await anna.post("/decide", **decide, seen="1:0:pending"),
        await anna.post("/decide", **decide, seen="²:0:pending"),
        await anna.post("/decide", **decide, seen=f"{10**20}:0:pending"),
        *[await anna.post("/decide", **decide, to="*", at=at, up_to="2", count="2") for at in ("nan", "inf", "1e300")],
        await anna.post("/confirm", csrf=csrf, act="pause", pause="no\0ne"),
        await anna.get("/editions?before=0001-01-01T00:00:00%2B14:00~1"),
        await anna.get("/emails/" + "9" * 30),
        await anna.browser.ask("/events", "HEAD", Cookie=anna.cookie),  # has no end to wait for
    ]
    assert [answer.status for answer in asked] == [200] * 6 + [400, 200, 404, 200]
    assert "web_fault" not in "".join(process.log)
    assert await fleet.states() == {"cancelled": 1, "pending": 1}

"""`outbox web`: the report behind a link, the board behind a sign-in, and what neither lets through."""

import asyncio
import json
import re
import signal
import socket
import time
from html.parser import HTMLParser
from urllib.parse import urlencode

import asyncpg
import pytest

from outbox.database import schema
from outbox.sandbox.postgres import postgres
from tests.support.fleet import until
from tests.support.web_client import Browser, link_of, opened, settled_web

TOKEN = "an-operators-token-of-32-letters"


class Scripts(HTMLParser):
    """What of a page would run, or be fetched."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag in {"script", "img", "iframe", "base"} or any(name.startswith("on") for name, _ in attrs):
            self.found.append((tag, attrs))


async def tokens(fleet):
    """The tokens of the pages, by recipient and period."""
    rows = await fleet.connection.fetch(
        "SELECT recipient_key, period, token FROM outbox.report r JOIN outbox.edition e ON e.id = r.edition"
    )
    return {(row["recipient_key"], row["period"]): row["token"] for row in rows}


async def test_the_link_of_an_email_leads_to_the_report_as_it_was_generated(fleet):
    await fleet.hire(2)
    assert (await fleet.run("generate")).code == 0
    process, browser = await opened(fleet)
    for row in await fleet.connection.fetch("SELECT token, html FROM outbox.report"):
        assert len(row["token"]) * 6 >= 128
        found = await browser.ask(f"/r/{row['token']}")
        assert (found.status, found.body) == (200, row["html"])
        headers = {name.lower(): value for name, value in found.headers.items()}
        policy = dict(rule.strip().partition(" ")[::2] for rule in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["form-action"] == policy["base-uri"] == "'none'"
        assert policy["frame-ancestors"] == "'none'"
        assert "script-src" not in policy
        assert not {"allow-scripts", "allow-same-origin", "allow-forms"} & set(policy["sandbox"].split())
        assert headers["cache-control"] == "private, no-store"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-content-type-options"] == "nosniff"
        assert "noindex" in headers["x-robots-tag"]
        assert "server" not in headers
        head = await browser.ask(f"/r/{row['token']}", "HEAD")
        assert (head.status, head.body, head.headers["Content-Length"]) == (200, "", str(len(row["html"].encode())))
        assert row["token"] not in "".join(process.log)
    process.send(signal.SIGTERM)
    assert (await process.ended()).code == 0


async def test_unknown_expired_pruned_and_somebody_elses_link_are_answered_alike(fleet):
    fleet.report = settled_web(
        user_header='"X-Forwarded-Email"', trusted_proxies='["127.0.0.1"]', expires='"100d"', board="false"
    )
    await fleet.hire(3)
    assert (await fleet.run("generate", "--period", "2026-W40")).code == 0
    by_person = {person: token for (person, _), token in (await tokens(fleet)).items()}
    await fleet.connection.execute("UPDATE outbox.report SET html = '' WHERE recipient_key = '2'")
    await fleet.connection.execute(
        "UPDATE outbox.report SET created_at = now() - interval '101 days' WHERE recipient_key = '3'"
    )
    _, browser = await opened(fleet)

    async def ask(path, person, **headers):
        return await browser.ask(path, X_Forwarded_Email=f"p{person}@example.com", **headers)

    assert (await ask(f"/r/{by_person['1']}", 1)).status == 200
    assert (await ask(f"/r/{by_person['1']}", 1, method="HEAD")).status == 200
    answers = [
        await ask("/r/" + "x" * 22, 1),
        await ask("/r/" + by_person["1"][:-1], 1),
        await ask("/r/" + by_person["1"].swapcase(), 1),
        await ask("/r/%00%ff", 1),
        await ask(f"/r/{by_person['1']}", 2),
        await browser.ask(f"/r/{by_person['1']}"),
        await ask(f"/r/{by_person['2']}", 2),
        await ask(f"/r/{by_person['3']}", 3),
        await ask("/r/../r/" + by_person["1"], 1),
        await ask("/r/" + by_person["1"] + "/", 1),
        await ask("/elsewhere", 1),
    ]
    assert answers[0].status == 404
    assert {answer.seen for answer in answers} == {answers[0].seen}


async def test_guesses_are_limited_for_each_client_and_good_links_never_are(fleet):
    fleet.report = settled_web(trusted_proxies='["127.0.0.1"]', board_token=f'"{TOKEN}"')
    await fleet.hire(1)
    assert (await fleet.run("generate")).code == 0
    (token,) = (await tokens(fleet)).values()
    _, browser = await opened(fleet)
    one_click = {"List-Unsubscribe": "One-Click"}

    async def guess(n, purpose):
        # What a client says of itself in front of the proxy's word counts for nothing.
        headers = {"X_Forwarded_For": f"10.0.0.{n}, 203.0.113.7"}
        if purpose == "link":
            return await browser.ask(f"/r/{n:022}", **headers)
        if purpose == "unsubscribe":
            return await browser.ask(f"/u/{n:022}", form=one_click, **headers)
        return await browser.ask("/sign-in", form={"name": "x", "token": f"guess {n}"}, **headers)

    # All at once, and each purpose has a count of its own.
    for purpose, status in (("link", 404), ("unsubscribe", 404), ("sign-in", 403)):
        began_at = time.monotonic()
        answers = await asyncio.gather(*(guess(n, purpose) for n in range(150)))
        come_back = (time.monotonic() - began_at) / 3
        found = [answer.status for answer in answers]
        assert set(found) == {status, 429}
        assert 20 <= found.count(status) <= 20 + come_back + 1
        assert {int(answer.headers["Retry-After"]) for answer in answers if answer.status == 429} <= {1, 2, 3, 4}
    # What is valid is never refused, from the very address of the guesses.
    same = {"X_Forwarded_For": "203.0.113.7"}
    for _ in range(60):
        assert (await browser.ask(f"/r/{token}", **same)).status == 200
    assert (await browser.ask(f"/u/{token}", form=one_click, **same)).status == 200
    assert (await browser.ask("/sign-in", form={"name": "Anna", "token": TOKEN}, **same)).status == 303


async def test_one_click_ends_the_emails_and_looking_does_not(fleet):
    await fleet.hire(1)
    assert (await fleet.run("generate")).code == 0
    (token,) = (await tokens(fleet)).values()
    _, browser = await opened(fleet)

    async def suppressed():
        return [row["address"] for row in await fleet.connection.fetch("SELECT address FROM outbox.suppression")]

    looked = [await browser.ask(f"/u/{one}") for one in (token, "x" * 22)]
    assert [answer.status for answer in looked] == [200, 200]
    assert ["<strong>Progress</strong>" in answer.body for answer in looked] == [True, False]
    assert await suppressed() == []
    for _ in range(2):
        done = await browser.ask(f"/u/{token}", form={"List-Unsubscribe": "One-Click"}, Sec_Fetch_Site="cross-site")
        assert done.status == 200
        assert "“Progress”" in done.body
        assert not {"set-cookie", "location"} & {name.lower() for name in done.headers}
        assert await suppressed() == ["p1@example.com"]
    assert (await browser.ask("/u/" + "x" * 22, form={"List-Unsubscribe": "One-Click"})).status == 404
    elsewhere = await browser.ask(f"/u/{token}", form={"undo": "yes"}, Sec_Fetch_Site="cross-site")
    assert elsewhere.status == 400
    assert await suppressed() == ["p1@example.com"]
    assert (await browser.ask(f"/u/{token}", form={"undo": "yes"})).status == 200
    assert await suppressed() == []
    # How mail programs say it differs; what a link checker does must change nothing.
    for body in (
        b"",
        b"\r\n",
        b"List-Unsubscribe=One-Click\r\n",
        b"List-Unsubscribe=One%2DClick",
        b"a=1&List-Unsubscribe=One-Click",
    ):
        for kind in ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain", ""):
            assert (await browser.ask(f"/u/{token}", form=body, Content_Type=kind)).status == 200, (body, kind)
            assert await suppressed() == ["p1@example.com"]
            assert (await browser.ask(f"/u/{token}", form={"undo": "yes"})).status == 200
            assert await suppressed() == []
    asked = f"/u/{token}?List-Unsubscribe=One-Click HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    chunked = "Transfer-Encoding: chunked\r\n\r\n5\r\nList-\r\n15\r\nUnsubscribe=One-Click\r\n0\r\n\r\n"
    for request, status in (
        (f"GET {asked}\r\n", 200), (f"HEAD {asked}\r\n", 200), (f"PUT {asked}\r\n", 405), (f"DELETE {asked}\r\n", 405),
        (f"GET {asked}Content-Length: 26\r\n\r\nList-Unsubscribe=One-Click", 200),
    ):  # fmt: skip
        assert (await raw(browser, request)).startswith(f"HTTP/1.1 {status} ")
        assert await suppressed() == []
    for request in (f"POST {asked}\r\n", f"POST {asked}{chunked}"):
        assert (await raw(browser, request)).startswith("HTTP/1.1 200 ")
        assert await suppressed() == ["p1@example.com"]
        await fleet.connection.execute("DELETE FROM outbox.suppression")


async def raw(browser, request):
    reader, writer = await asyncio.open_connection(browser.host, browser.port)
    writer.write(request.encode())
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer.decode()


async def test_the_unsubscribe_pages_are_in_the_readers_language_and_name_the_report_by_its_title(fleet):
    fleet.report = 'title = "Umsätze <Süd>"\nlocale = "de"\n'
    await fleet.hire(1)
    assert (await fleet.run("generate")).code == 0
    (token,) = (await tokens(fleet)).values()
    _, browser = await opened(fleet)
    english = {"Accept_Language": "en-US,en;q=0.9"}
    offer = await browser.ask(f"/u/{token}", **english)
    done = await browser.ask(f"/u/{token}", form=b"List-Unsubscribe=One-Click", **english)
    undone = await browser.ask(f"/u/{token}", form={"undo": "yes"}, **english)
    for answer, words in ((offer, "Abbestellen"), (done, "keine E-Mails von"), (undone, "wieder E-Mails von")):
        assert (answer.status, '<html lang="de">' in answer.body, words in answer.body) == (200, True, True)
    for answer, title in ((offer, "<strong>{}</strong>"), (done, "„{}“"), (undone, "„{}“")):
        assert title.format("Umsätze &lt;Süd&gt;") in answer.body
        assert "progress" not in answer.body
    # What holds without a report, too: the browser's language.
    unknown = "/u/" + "x" * 22
    assert "<button>Se désabonner</button>" in (await browser.ask(unknown, Accept_Language="fr-CA, fr;q=0.9")).body
    missing = await browser.ask(unknown, form=b"", Accept_Language="nl")
    assert (missing.status, "Deze link is onvolledig" in missing.body) == (404, True)
    # A page that is pruned has no language: the report's settings have.
    await fleet.connection.execute("UPDATE outbox.report SET html = ''")
    assert '<html lang="de">' in (await browser.ask(f"/u/{token}", **english)).body


async def test_names_subjects_and_data_are_text_on_the_page_and_a_template_that_runs_script_cannot(fleet):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    fleet.data = f'select :key as person, $x${evil}$x$ as "{evil.replace(chr(34), "")}", 5 as done'
    fleet.report = f"title = {json.dumps(evil)}" + settled_web(history="true")
    await fleet.hire(1)
    await fleet.connection.execute("UPDATE people SET name = $1", evil)
    for period in ("2026-W40", "2026-W41"):
        assert (await fleet.run("generate", "--period", period)).code == 0
    _, browser = await opened(fleet)
    found = await browser.ask(f"/r/{(await tokens(fleet))['1', '2026-W41']}")
    assert found.status == 200
    assert "&lt;script&gt;alert(1)" in found.body
    assert not Scripts(found.body).found
    # A template of the user's own may hold any of it: the browser is told to run nothing.
    await fleet.connection.execute("UPDATE outbox.report SET html = $1", f"<p>{evil}</p>")
    found = await browser.ask(f"/r/{(await tokens(fleet))['1', '2026-W40']}")
    assert found.body == f"<p>{evil}</p>"
    assert found.headers["Content-Security-Policy"].startswith("sandbox allow-popups")
    signed = await browser.ask("/u/" + "x" * 22)
    assert "<form" in signed.body


async def test_a_page_names_the_earlier_editions_of_its_recipient_with_a_line_through_their_figures(fleet):
    fleet.report = settled_web(history="true", expires='"100d"')
    fleet.data = "select day, done from progress where person_id = cast(:key as int)"
    await fleet.hire(2)
    for period in ("2026-W38", "2026-W39", "2026-W40", "2026-W41"):
        assert (await fleet.run("generate", "--period", period)).code == 0
    found = await tokens(fleet)
    await fleet.connection.execute("UPDATE outbox.report SET html = '' WHERE token = $1", found["1", "2026-W38"])
    _, browser = await opened(fleet)
    page = (await browser.ask(f"/r/{found['1', '2026-W41']}")).body
    assert page.index("Earlier editions") < page.index("</body>")
    linked = re.findall(r'<li><a href="([\w-]+)">', page)
    assert linked == [found["1", "2026-W40"], found["1", "2026-W39"]]
    assert 'aria-label="from 105 to 105 over 3 editions' in page
    assert found["2", "2026-W40"] not in page
    first = (await browser.ask(f"/r/{found['1', '2026-W39']}")).body
    assert "Earlier editions" not in first


async def test_while_postgres_is_away_a_page_says_so_and_comes_back_by_itself(fleet):
    with postgres(settings={"fsync": "off"}) as server:
        fleet.database = server.url
        connection = await asyncpg.connect(server.url)
        await schema.initialise(connection)
        await connection.execute(
            "INSERT INTO outbox.edition (report, period, starts_at, ends_at) VALUES ('r', '1', now(), now() + '1 day');"
            "INSERT INTO outbox.report (edition, recipient_key, token, title, html)"
            " VALUES (1, '1', 'abcdefghijklmnopqrstuv', 't', '<p>report</p>')"
        )
        await connection.close()
        process, browser = await opened(fleet)
        assert (await browser.ask("/r/abcdefghijklmnopqrstuv")).body == "<p>report</p>"
        server.stop("immediate")
        away = await browser.ask("/r/abcdefghijklmnopqrstuv")
        assert (away.status, away.headers["Retry-After"]) == (503, "5")
        assert "The database does not answer" in away.body
        later, other = await opened(fleet)
        signing_in = await other.ask(link_of(later))
        assert (signing_in.status, "Set-Cookie" in signing_in.headers) == (503, False)
        assert "The database does not answer" in signing_in.body
        server.start()

        async def is_back():
            return [(await one.ask("/r/abcdefghijklmnopqrstuv")).status for one in (browser, other)] == [200, 200]

        await until(is_back, "the page is back")
        assert "abcdefghijklmnopqrstuv" not in "".join([*process.log, *later.log])
        for one in (process, later):
            await one.kill()


async def test_what_is_too_large_odd_or_no_request_at_all_is_a_plain_4xx(fleet):
    _, browser = await opened(fleet)
    assert (await browser.ask("/r/" + "x" * 5000)).status == 414
    assert (await browser.ask("/", Cookie="x" * 20_000)).status == 431
    assert (await raw_answer(browser, b"GET / HTTP/1.1\r\nCookie: " + b"x" * 20_000)).startswith(b"HTTP/1.1 400")
    assert (await browser.ask("/u/" + "x" * 22, form=b"x" * 100_000)).status == 413
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"):
        assert (await browser.ask("/r/" + "x" * 22, method)).status == 405
    for raw in (b"\x16\x03\x01 garbage\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"):
        assert (await raw_answer(browser, raw)).startswith(b"HTTP/1.1 400")
    chunks = b"10000\r\n" + b"x" * 65_536 + b"\r\n10000\r\n" + b"x" * 65_536 + b"\r\n0\r\n\r\n"
    head = b"POST /u/xxxxxxxxxxxxxxxxxxxxxx HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert (await raw_answer(browser, head + chunks)).startswith(b"HTTP/1.1 413")
    assert (await browser.ask("/u/" + "x" * 22, form={"List-Unsubscribe": "No"})).status == 400
    assert (await browser.ask("/elsewhere")).status == 404


async def raw_answer(browser, said):
    reader, writer = await asyncio.open_connection(browser.host, browser.port)
    writer.write(said)
    async with asyncio.timeout(15):
        answer = await reader.read(4096)
    writer.close()
    return answer


async def test_sigterm_finishes_the_request_in_hand_and_exits_0(fleet):
    fleet.report = settled_web(board_token=f'"{TOKEN}"')
    process, browser = await opened(fleet)
    reader, writer = await asyncio.open_connection(browser.host, browser.port)
    form = urlencode({"name": "Anna", "token": TOKEN}).encode()
    writer.write(
        f"POST /sign-in HTTP/1.1\r\nHost: x\r\nContent-Length: {len(form)}\r\nExpect: 100-continue\r\n"
        "Content-Type: application/x-www-form-urlencoded\r\n\r\n".encode()
    )
    async with asyncio.timeout(15):
        assert b"100 Continue" in await reader.readuntil(b"\r\n\r\n")
        process.send(signal.SIGTERM)

        async def takes_no_more():
            try:
                await browser.ask("/none")
            except OSError:
                return True
            return False

        await until(takes_no_more, "it listens no more")
        writer.write(form)
        assert (await reader.read()).startswith(b"HTTP/1.1 303")
    writer.close()
    assert (await process.ended()).code == 0


@pytest.mark.parametrize(
    ("web", "arguments", "words"),
    [
        ({}, ["--http", "nonsense"], "--http: is no host and port; write them like"),
        ({"board_token": '"short"'}, [], "web.board_token: is too short to be secret; write at least 16"),
        ({"board_token_file": '"none"'}, ["--http", "127.0.0.1:0"], "web.board_token_file: none cannot be read"),
        ({"board_header": '"X-User"'}, [], "web.board_users: is missing beside board_header"),
        ({"user_header": '"X-User"'}, [], "web.trusted_proxies: is missing beside user_header"),
        ({"trusted_proxies": '["proxy"]'}, [], "web.trusted_proxies: "),
        ({"expires": '"soon"'}, [], "web.expires: "),
        ({"bord": "true"}, [], "web.bord: is not a key that outbox knows; take it out or mend its name (did you mean"),
    ],
)
async def test_settings_that_would_let_in_the_wrong_people_are_refused_in_one_sentence(fleet, web, arguments, words):
    fleet.report = settled_web(**web)
    ended = await fleet.run("web", *arguments)
    assert ended.code == 2
    assert any(sentence.startswith(words) for sentence in ended.sentences), ended.sentences


async def test_a_taken_port_a_missing_schema_and_a_missing_extra_are_one_sentence_each(fleet, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = await fleet.run("web", "--http", f"127.0.0.1:{taken.getsockname()[1]}")
        assert (ended.code, len(ended.sentences)) == (2, 1)
        assert "cannot listen on" in ended.sentences[0]
    await fleet.connection.execute("DROP SCHEMA outbox CASCADE")
    ended = await fleet.run("web", "--http", "127.0.0.1:0")
    assert (ended.code, ended.sentences) == (1, ["The database has no outbox schema yet; run `outbox init`."])
    (tmp_path / "starlette").mkdir()
    (tmp_path / "starlette/__init__.py").write_text("raise ModuleNotFoundError('none here', name='starlette')")
    ended = await fleet.run("web", environment={"PYTHONPATH": str(tmp_path)})
    assert ended.code == 1
    assert ended.sentences == [
        "outbox web needs the extra `web`, since starlette is not installed; run: pip install 'outbox-mail[web]'."
    ]


async def test_the_board_asks_who_somebody_is_and_pages_only_has_none(fleet):
    fleet.report = settled_web(board_token=f'"{TOKEN}"')
    _, browser = await opened(fleet)
    assert (await browser.ask("/")).status == 401
    assert (await browser.ask("/sign-in", form={"name": "Anna", "token": "guess"})).status == 403
    elsewhere = await browser.ask("/sign-in", form={"name": "A", "token": TOKEN}, Sec_Fetch_Site="cross-site")
    assert elsewhere.status == 403
    entered = await browser.ask("/sign-in", form={"name": "<b>Anna", "token": TOKEN})
    assert entered.status == 303
    cookie = entered.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    found = await browser.ask("/", Cookie=cookie.partition(";")[0])
    assert found.status == 200
    assert "&lt;b&gt;Anna" in found.body
    assert "'unsafe-inline'" not in found.headers["Content-Security-Policy"]
    csrf = re.search(r'name="csrf" value="([^"]+)"', found.body)[1]
    kept = await browser.ask("/sign-out", form={"csrf": "x"}, Cookie=cookie.partition(";")[0])
    assert "Set-Cookie" not in kept.headers
    _, elsewhere = await opened(fleet)
    assert (await elsewhere.ask("/", Cookie=cookie.partition(";")[0])).status == 200
    left = await browser.ask("/sign-out", form={"csrf": csrf}, Cookie=cookie.partition(";")[0])
    assert "Max-Age=0" in left.headers["Set-Cookie"]
    for one in (browser, elsewhere):  # a copy of the cookie is worth nothing, on whichever server
        assert (await one.ask("/", Cookie=cookie.partition(";")[0])).status == 401
    _, alone = await opened(fleet, "--pages-only")
    assert (await alone.ask("/")).status == 404


@pytest.mark.parametrize(
    "place", ["127.0.0.1:0", "[::1]:0", "localhost:0", "0.0.0.0:0"], ids=["IPv4", "IPv6", "localhost", "everywhere"]
)
async def test_without_a_sign_in_in_the_settings_a_link_of_this_run_is_printed_that_signs_in(fleet, place):
    process = await fleet.start("web", "--http", place)
    await process.says("web_listening")
    (host, port) = re.findall(r"http://(\[?[\w.:]+?\]?):(\d+)/\?token=", "".join(process.log))[0]
    browser = Browser(host.strip("[]"), int(port))
    path = link_of(process)
    assert len(path.partition("=")[2]) * 6 >= 128
    for asked in ("/", "/?token=guess", "/emails", "/events"):
        assert (await until_answered(browser, asked)).status in (401, 403)
    entered = await browser.ask(path)
    assert (entered.status, entered.headers["Location"]) == (303, "/")
    cookie = entered.headers["Set-Cookie"].partition(";")[0]
    assert (await browser.ask("/", Cookie=cookie)).status == 200
    assert "".join(process.log).count(path) == 1  # ... and nowhere else in the log
    form = {"name": "Anna", "token": path.partition("=")[2]}
    assert (await browser.ask("/sign-in", form=form)).status == 303
    process.send(signal.SIGTERM)
    assert (await process.ended()).code == 0
    again = await fleet.start("web", "--http", f"{host}:{port}")
    await again.says("web_listening")
    assert link_of(again) != path
    assert (await until_answered(browser, "/", Cookie=cookie)).status == 401  # the link of another run
    assert (await browser.ask(path)).status == 403


async def until_answered(browser, path, **headers):
    async def answered():
        try:
            return await browser.ask(path, **headers)
        except OSError:
            return None

    return await until(answered, "it answers")


async def test_the_link_is_printed_also_where_the_log_is_silent_and_not_with_pages_only(fleet):
    fleet.top = 'log_level = "error"'
    process = await fleet.start("web", "--http", "127.0.0.1:0")
    await process.says("?token=")
    fleet.top = ""
    pages, _ = await opened(fleet, "--pages-only")
    assert "token" not in "".join(pages.log)

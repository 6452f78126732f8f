"""`outbox web`: the report behind a link, the board behind a sign-in, and what neither lets through."""

import asyncio
import http.client
import re
from dataclasses import dataclass
from urllib.parse import urlencode

from tests.fleet import until

TOKEN = "an-operators-token-of-32-letters"


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: str

    @property
    def seen(self):
        """What a client can tell this answer from another by, but for the nonce."""
        headers = {name.lower(): value for name, value in self.headers.items() if name.lower() != "date"}
        nonce = re.compile(r"nonce[-=]\"?[\w-]{22}\"?")
        return self.status, nonce.sub("", str(sorted(headers.items()))), nonce.sub("", self.body)


@dataclass
class Browser:
    """Asks a real `outbox web` over a real socket."""

    host: str
    port: int

    async def ask(self, path, method="GET", form=None, **headers):
        return await asyncio.to_thread(self._ask, path, method, form, headers)

    def _ask(self, path, method, form, headers):
        connection = http.client.HTTPConnection(self.host, self.port, timeout=15)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        body = None
        if form is not None:
            body = form if isinstance(form, bytes) else urlencode(form).encode()
            sent.setdefault("Content-Type", "application/x-www-form-urlencoded")
        try:
            connection.request(method if form is None else "POST", path, body, sent)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read().decode())
        finally:
            connection.close()


async def opened(fleet, *arguments):
    """A running `outbox web`, and a browser for it."""
    process = await fleet.start("web", "--http", "127.0.0.1:0", *arguments)
    await process.says("web_listening")
    (port,) = re.findall(r"http://127\.0\.0\.1:(\d+)/", "".join(process.log))
    browser = Browser("127.0.0.1", int(port))

    async def answers():
        try:
            return await browser.ask("/none")
        except OSError:
            return None

    await until(answers, "it answers")
    return process, browser


def settled_web(**values):
    return "\n[web]\n" + "\n".join(f"{key} = {value}" for key, value in values.items())


async def test_the_link_of_an_email_leads_to_the_report_as_it_was_generated(fleet):
    await fleet.hire(2)
    assert (await fleet.run("generate")).code == 0
    process, browser = await opened(fleet)
    for row in await fleet.connection.fetch("SELECT token, html FROM outbox.report"):
        found = await browser.ask(f"/r/{row['token']}")
        assert (found.status, found.body) == (200, row["html"])
        assert "sandbox" in found.headers["Content-Security-Policy"]
        assert (await browser.ask(f"/r/{row['token']}", "HEAD")).body == ""
        assert row["token"] not in "".join(process.log)


async def test_the_board_asks_who_somebody_is(fleet):
    fleet.report = settled_web(board_token=f'"{TOKEN}"')
    _, browser = await opened(fleet)
    assert (await browser.ask("/")).status == 401
    assert (await browser.ask("/sign-in", form={"name": "Anna", "token": "guess"})).status == 403
    entered = await browser.ask("/sign-in", form={"name": "Anna", "token": TOKEN})
    assert entered.status == 303
    cookie = entered.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    found = await browser.ask("/", Cookie=cookie.partition(";")[0])
    assert found.status == 200
    assert "Anna" in found.body

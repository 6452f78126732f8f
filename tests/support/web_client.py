"""What the tests of `outbox web` share: the command as it runs, and what asks it over a real socket."""

import asyncio
import http.client
import re
from dataclasses import dataclass
from urllib.parse import urlencode

from tests.support.fleet import until


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


async def opened(fleet, *arguments, **how):
    """A running `outbox web`, and a browser for it."""
    process = await fleet.start("web", "--http", "127.0.0.1:0", *arguments, **how)
    await process.says("web_listening")
    port = re.findall(r"pages.* are at (?:http://)?127\.0\.0\.1:(\d+)", "".join(process.log))[0]
    browser = Browser("127.0.0.1", int(port))

    async def answers():
        try:
            return await browser.ask("/none")
        except OSError:
            return None

    await until(answers, "it answers")
    return process, browser


def link_of(process):
    """The path of the link with which the operator signs in, as `outbox web` prints it."""
    (path,) = set(re.findall(r"http://[^/\s]+(/\?token=[\w-]+)", "".join(process.log)))
    return path


def settled_web(**values):
    return "\n[web]\n" + "\n".join(f"{key} = {value}" for key, value in values.items())

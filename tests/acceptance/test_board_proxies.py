"""The board behind whatever forwards to a loopback address: without the token nothing of it is served or decided.

Real nginx and HAProxy, as somebody would set them up who reads no manual, a bare TCP forwarder (stunnel, `ssh -R`, a
mesh), another user of the machine, and requests that a program on it was made to send (SSRF).
"""

import asyncio
import os
import pwd
import re
import shutil
import subprocess
import sys
from contextlib import asynccontextmanager
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.support.fleet import free_port, until
from tests.support.web_client import Browser, link_of, opened, settled_web

NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
HAPROXY = shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")

NGINX_CONF = """
daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log; {user}
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    upstream board {{ server 127.0.0.1:{port}; keepalive 8; }}
    server {{ listen 127.0.0.1:{front}; location / {{ proxy_pass http://board; {lines} }} }}
}}
"""
HTTP_1_1 = 'proxy_http_version 1.1; proxy_set_header Connection "";'
NGINX_WAYS = {
    "HTTP/1.0": "",
    "HTTP/1.0, with Host": "proxy_set_header Host $http_host;",
    "HTTP/1.1": HTTP_1_1,
    "HTTP/1.1, with Host": f"{HTTP_1_1} proxy_set_header Host $http_host;",
    "HTTP/1.1, as localhost": f"{HTTP_1_1} proxy_set_header Host localhost:{{port}};",
}
HAPROXY_CONF = """
global
    maxconn 50
defaults
    mode {mode}
    timeout connect 5s
    timeout client 20s
    timeout server 20s
listen board
    bind 127.0.0.1:{front}
    server board 127.0.0.1:{port}
"""

# What of the board nobody may see who has not signed in.
OF_THE_BOARD = re.compile(
    r"mail1|p1@example|hello|Editions|csrf|data-part|/sign-out|text/event-stream|No relay|relay 1"
)
PATHS = (
    "/", "/?token=", "/?token=guess", "/?token=guess&token=guess", "/events", "/emails", "/emails/1", "/emails/1/html",
    "/emails/1/source", "/editions", "/editions/1", "/pauses", "/decisions", "//", "/./emails", "/emails/../",
    "/%65mails", "/emails?q=p", "/emails/%31",
)  # fmt: skip
HOSTS = ("localhost", "localhost:{port}", "127.0.0.1", "127.0.0.1:{port}", "[::1]", "board.example", "169.254.169.254")
HEADERS = (
    {},
    {"Origin": "http://localhost:{port}", "Referer": "http://127.0.0.1:{port}/", "Sec-Fetch-Site": "same-origin"},
    {"X-Forwarded-For": "127.0.0.1", "X-Real-IP": "127.0.0.1", "Forwarded": "for=127.0.0.1;host=localhost"},
    {"X-Forwarded-Email": "anna@example.com", "X-Remote-User": "root", "Authorization": "Bearer guess"},
    {"Cookie": "outbox_board=AAAA; __Host-outbox_board=AAAA"},
    {"Cookie": "outbox_board=" + "A" * 64},
)
FORMS = ("/confirm", "/decide", "/sign-in", "/sign-out")
DECISION = {"act": "cancel", "seen": "1:0:pending", "why": "because", "csrf": "x", "name": "Eve", "token": "guess"}


@asynccontextmanager
async def running(*command):
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def answering(process, front):
    browser = Browser("127.0.0.1", front)

    async def answers():
        assert process is None or process.returncode is None, "the proxy ended"
        try:
            return await browser.ask("/none")
        except OSError:
            return None

    await until(answers, "the proxy forwards")
    return browser


@asynccontextmanager
async def nginx(directory, port, lines):
    if NGINX is None:
        pytest.skip("no nginx is installed (Debian: apt-get install nginx-light)")
    front, user = free_port(), "user root;" if os.geteuid() == 0 else ""
    conf = directory / "nginx.conf"
    conf.write_text(
        NGINX_CONF.format(directory=directory, port=port, front=front, user=user, lines=lines.format(port=port))
    )
    async with running(NGINX, "-p", str(directory), "-c", str(conf)) as process:
        yield await answering(process, front)


@asynccontextmanager
async def haproxy(directory, port, mode):
    if HAPROXY is None:
        pytest.skip("no haproxy is installed (Debian: apt-get install haproxy)")
    front = free_port()
    conf = directory / "haproxy.cfg"
    conf.write_text(HAPROXY_CONF.format(port=port, front=front, mode=mode))
    async with running(HAPROXY, "-q", "-f", str(conf)) as process:
        yield await answering(process, front)


@asynccontextmanager
async def forwarder(_directory, port):
    """Bytes there and back, and nothing else."""

    async def pump(reader, writer):
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # one of the two went away
        finally:
            writer.close()

    async def forward(reader, writer):
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, back), pump(there, writer))

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    try:
        yield await answering(None, server.sockets[0].getsockname()[1])
    finally:
        server.close()


WAYS = {
    **{f"nginx, {name}": (nginx, lines) for name, lines in NGINX_WAYS.items()},
    "HAProxy": (haproxy, "http"),
    "HAProxy, TCP": (haproxy, "tcp"),
    "a TCP forwarder": (forwarder,),
}


def filled(values, port):
    return {name.replace("-", "_"): value.format(port=port) for name, value in values.items()}


async def nothing_is_given_away(browser, port):
    """Ask for all of the board in every way, from outside."""
    for path in PATHS:
        for host in HOSTS:
            answer = await browser.ask(path, Host=host.format(port=port))
            assert answer.status in (400, 401, 403, 404, 429), (path, host)
            assert not OF_THE_BOARD.search(answer.body), (path, host)
            assert "Set-Cookie" not in answer.headers
    for headers in HEADERS:
        for path in ("/", "/events", "/emails", "/emails/1/source"):
            for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "PROPFIND"):
                answer = await browser.ask(path, method, Host=f"localhost:{port}", **filled(headers, port))
                assert answer.status in (400, 401, 403, 405), (path, method, headers)
                assert not OF_THE_BOARD.search(answer.body + answer.headers.get("Content-Type", "")), (path, method)
                assert "Set-Cookie" not in answer.headers
        for path in FORMS:
            answer = await browser.ask(path, form=DECISION, Host=f"localhost:{port}", **filled(headers, port))
            assert answer.status in (401, 403, 429, 303), (path, headers)
            assert "Set-Cookie" not in answer.headers
            assert not OF_THE_BOARD.search(answer.body), (path, headers)


@pytest.mark.parametrize("way", WAYS)
async def test_behind_a_proxy_nothing_of_the_board_is_served_without_the_token(fleet, tmp_path, way):
    await fleet.put_emails(1)
    process, direct = await opened(fleet)
    proxied, *how = WAYS[way]
    async with proxied(tmp_path, direct.port, *how) as browser:
        await nothing_is_given_away(browser, direct.port)
        assert await fleet.states() == {"pending": 1}
        assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.board_session") == 0
        # With the token it is there, also through the proxy.
        entered = await browser.ask(link_of(process))
        assert (entered.status, entered.headers["Location"].endswith("/")) == (303, True)
        cookie = entered.headers["Set-Cookie"].partition(";")[0]
        assert OF_THE_BOARD.search((await browser.ask("/emails", Cookie=cookie)).body)
    assert "web_fault" not in "".join(process.log)


OTHER_USER = """
import sys, urllib.request
for path in ("/", "/emails", "/events"):
    try:
        print(urllib.request.urlopen(sys.argv[1] + path, timeout=10).status)
    except urllib.error.HTTPError as error:
        print(error.code)
"""


async def test_another_user_of_the_machine_sees_nothing(fleet):
    await fleet.put_emails(1)
    process, browser = await opened(fleet)
    nobody = {"user": pwd.getpwnam("nobody").pw_uid} if os.geteuid() == 0 else {}
    python = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
    ended = await asyncio.to_thread(
        subprocess.run, [python, "-c", OTHER_USER, f"http://127.0.0.1:{browser.port}"],
        capture_output=True, text=True, timeout=60, check=False, cwd="/", **nobody,
    )  # fmt: skip
    assert ended.stdout.split() == ["401"] * 3, ended.stderr
    # Nor does the process list give the token away.
    listed = await asyncio.to_thread(Path(f"/proc/{process.pid}/cmdline").read_text)
    assert link_of(process).partition("=")[2] not in listed


SMUGGLED = "GET /emails HTTP/1.1\r\nHost: localhost\r\n\r\n"
RAW = {
    "no Host": b"GET /emails HTTP/1.0\r\n\r\n",
    "no Host, 1.1": b"GET /emails HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET /emails HTTP/1.1\r\nHost: localhost\r\nHost: board.example\r\n\r\n",
    "a whole address": b"GET http://localhost/emails HTTP/1.1\r\nHost: board.example\r\n\r\n",
    "another scheme": b"GET gopher://localhost/emails HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "CONNECT": b"CONNECT localhost:8025 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HTTP/0.9": b"GET /emails\r\n\r\n",
    "bare line feeds": b"GET /emails HTTP/1.1\nHost: localhost\n\n",
    "two lengths": (
        f"POST /sign-in HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(SMUGGLED) + 5}\r\n"
        f"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{SMUGGLED}"
    ).encode(),
    "an odd length": b"POST /sign-in HTTP/1.1\r\nHost: localhost\r\nContent-Length: +0\r\n\r\n",
    "an odd encoding": b"POST /sign-in HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a name with a blank": b"GET /emails HTTP/1.1\r\nHost : localhost\r\n\r\n",
    "HTTP/2 over cleartext": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an upgrade": b"GET /emails HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "an SMTP client": b"EHLO localhost\r\nMAIL FROM:<>\r\n",
    "a request behind a request": f"GET /none HTTP/1.1\r\nHost: x\r\n\r\n{SMUGGLED}".encode(),
}


async def test_a_forged_request_from_inside_reaches_nothing(fleet):
    await fleet.put_emails(1)
    process, browser = await opened(fleet)
    for name, said in RAW.items():
        reader, writer = await asyncio.open_connection(browser.host, browser.port)
        writer.write(said)
        writer.write_eof()
        async with asyncio.timeout(20):
            answer = (await reader.read()).decode("latin-1")
        assert not OF_THE_BOARD.search(answer), name
        assert " 200 " not in answer, name
        if name == "two lengths":
            assert answer.startswith("HTTP/1.1 400")
            assert answer.count("HTTP/1.1") == 1  # what follows is no request
        writer.close()
    assert "web_fault" not in "".join(process.log)


# ── below a path of another host ─────────────────────────────────────────────────────────────────────────────────────

SUB_PATH_CONF = NGINX_CONF.replace(
    "location / {{ proxy_pass http://board; {lines} }}",
    "location /outbox/ {{ proxy_pass http://board{lines}; }} location / {{ return 418; }}",
)


class Links(HTMLParser):
    """Addresses in the attributes of a page, and the one of its live events."""

    def __init__(self, html):
        super().__init__()
        self.found = set(re.findall(r'EventSource\("([^"]+)"', html))
        self.feed(html)

    def handle_starttag(self, _tag, attrs):
        self.found |= {value for name, value in attrs if name in {"href", "action", "src"} and value}


@asynccontextmanager
async def below_a_path(fleet, directory, passed):
    """A board at http://127.0.0.1:PORT/outbox/, whose path nginx takes off (`/`) or passes on (``)."""
    if NGINX is None:
        pytest.skip("no nginx is installed (Debian: apt-get install nginx-light)")
    front, user = free_port(), "user root;" if os.geteuid() == 0 else ""
    fleet.report += settled_web(url=f'"http://127.0.0.1:{front}/outbox"')
    process, direct = await opened(fleet)
    conf = directory / "nginx.conf"
    conf.write_text(SUB_PATH_CONF.format(directory=directory, port=direct.port, front=front, user=user, lines=passed))
    async with running(NGINX, "-p", str(directory), "-c", str(conf)) as proxy:
        yield process, await answering(proxy, front), direct


@pytest.mark.parametrize("passed", ["/", ""], ids=["stripped", "passed on"])
async def test_below_a_path_links_forms_redirects_and_cookies_stay_below_it(fleet, tmp_path, passed):
    await fleet.hire(1)
    assert (await fleet.run("generate")).code == 0
    await fleet.put_emails(1)
    token = await fleet.connection.fetchval("SELECT token FROM outbox.report")
    async with below_a_path(fleet, tmp_path, passed) as (process, browser, direct):
        (link,) = set(re.findall(r"http://127\.0\.0\.1:\d+(/outbox/\?token=[\w-]+)", "".join(process.log)))
        entered = await browser.ask(link)
        assert (entered.status, entered.headers["Location"]) == (303, "/outbox/")
        assert "; Path=/outbox;" in entered.headers["Set-Cookie"]
        # Over plain http a browser sends no Sec-Fetch-Site, and nginx sends another Host than the browser's.
        own = {"Cookie": entered.headers["Set-Cookie"].partition(";")[0], "Origin": f"http://127.0.0.1:{browser.port}"}
        seen, waiting = set(), {"/outbox/"}
        while waiting:
            path = waiting.pop()
            seen.add(path)
            answer = await browser.ask(path, **own)
            assert answer.status == 200, path
            # The email itself has links of its own.
            links = Links(answer.body).found if not path.endswith(("/html", "/source")) else set()
            found = {one.partition("#")[0] for one in links if not one.startswith(("http", "mailto:", "data:"))}
            assert all(one == "" or one.startswith(("/outbox/", "?")) for one in found), (path, found)
            forms = ("/outbox/confirm", "/outbox/decide", "/outbox/sign-out", "/outbox/sign-in", "/outbox/events")
            waiting |= {one for one in found if one.startswith("/outbox/") and one not in forms} - seen
        assert {"/outbox/emails", "/outbox/editions", "/outbox/decisions"} <= seen
        assert (await browser.ask(f"/outbox/r/{token}")).status == 200
        # What is decided in a form is done, and leads on to a page below the path.
        email = await fleet.connection.fetchval("SELECT id FROM outbox.email WHERE key = 'mail1'")
        page = await browser.ask(f"/outbox/emails/{email}", **own)
        assert 'action="/outbox/confirm"' in page.body
        shown = await browser.ask(
            "/outbox/confirm", form={**hidden_in(page), f"pick.{email}": "1", "act": "cancel"}, **own
        )
        assert shown.status == 200, shown.body
        done = await browser.ask("/outbox/decide", form={**hidden_in(shown), "act": "cancel", "why": "late"}, **own)
        assert done.status == 200, done.body
        assert (await fleet.states())["cancelled"] == 1
        foreign = {**own, "Origin": "http://127.0.0.1:1"}
        assert (await browser.ask("/outbox/confirm", form={**hidden_in(page), "act": "retry"}, **foreign)).status == 403
        left = await browser.ask("/outbox/sign-out", form=hidden_in(page), **own)
        assert (left.status, left.headers["Location"]) == (303, "/outbox/")
        # On this machine it still answers without the proxy.
        assert (await direct.ask(f"/r/{token}")).status == (await direct.ask(f"/outbox/r/{token}")).status == 200
    assert "web_fault" not in "".join(process.log)


def hidden_in(answer):
    """The hidden fields of a page's last form."""
    last = answer.body[answer.body.rfind('<form method="post"') :]
    return {name: unescape(value) for name, value in re.findall(r'type="hidden" name="(.*?)" value="(.*?)"', last)}

"""Setting up a connection to a server that is strange: greeting, EHLO, STARTTLS, login, and several addresses.

A `Connector` connects to scripted servers here; what a relay's process makes of it is shown in `test_starttls` and
`test_route`.
"""

import asyncio
import base64
import logging
import os
import socket
import ssl
import struct
import time

import aiosmtplib
import pytest
import trustme

from outbox.settings import Settings, load
from outbox.smtp import connector as connector_module
from outbox.smtp import dialing
from outbox.smtp.connector import Connector
from outbox.smtp.dialing import Endpoint
from outbox.smtp.login import LoginError, log_in
from outbox.smtp.route_trouble import LoginRefusedError, RouteTroubleError
from tests.support.fleet import until
from tests.support.scripted_smtp import Scripted

HELLO = ("250-strange.example", "250 PIPELINING")


def route_to(url, **settings):
    read = Settings.model_validate({"smtp_url": url, "connect_timeout_s": 5, **settings})
    return Connector.of(read.smtp_url, read)


async def opened(route):
    """Set up a connection, and give whether it is in TLS."""
    _, transport = await route.connect(None)
    is_secure = transport.get_extra_info("ssl_object") is not None
    transport.abort()
    return is_secure


async def works(peer):
    await peer.say("220 strange.example ESMTP")
    while (line := await peer.hear()) != "QUIT":
        await peer.say(*(HELLO if line.startswith(("EHLO", "LHLO")) else ["250 fine"]))


def greets(*lines, then=None):
    async def act(peer):
        await peer.say(*lines)
        if then is not None:
            await then(peer)

    return act


async def silence(peer):
    await peer.silence()


async def hangs_up(_):
    pass


# ── the greeting, and EHLO ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scheme", ["smtp", "lmtp"])
@pytest.mark.parametrize(
    "act, says, code",
    [
        (greets("421 4.7.0 too many connections", then=silence), "421 4.7.0 too many connections", 421),
        (greets("421 4.3.2 closing"), "421 4.3.2 closing", 421),
        (greets("450 4.3.2 not now", then=silence), "450 4.3.2 not now", 450),
        (greets("554-5.7.1 you are", "554 5.7.1 on a list"), "554 5.7.1 you are", 554),
        (greets("554 5.7.1 you are on a list", then=silence), "554 5.7.1 you are on a list", 554),
        (hangs_up, "closed the connection", 0),
        (greets("SSH-2.0-OpenSSH_9.2", then=silence), "SSH-2.0", 0),
    ],
    ids=["421", "421 and gone", "450", "554 and gone", "554", "gone", "ssh"],
)
async def test_a_greeting_that_refuses_is_shown_with_its_reply(scheme, act, says, code):
    async with Scripted(act) as server:
        with pytest.raises(RouteTroubleError) as trouble:
            await opened(route_to(f"{scheme}://127.0.0.1:{server.port}"))
    assert says in str(trouble.value)
    assert str(trouble.value).startswith(("127.0.0.1:", "lmtp://127.0.0.1:"))
    assert trouble.value.code == code
    assert trouble.value.text.startswith(says[4:]) if code else not trouble.value.text


def says_to_hello(ehlo, helo=None):
    async def act(peer):
        await peer.say("220 strange.example")
        while True:
            line = await peer.hear()
            await peer.say(ehlo if line.startswith(("EHLO", "LHLO")) else helo or ehlo)

    return act


async def test_a_refused_ehlo_is_shown_with_its_reply_and_the_name():
    async with Scripted(says_to_hello("550 5.7.1 bad name")) as server:
        with pytest.raises(RouteTroubleError, match=r"550 5\.7\.1 bad name \(to EHLO me\.example\.com\)") as trouble:
            await opened(route_to(f"smtp://127.0.0.1:{server.port}", helo_name="me.example.com"))
    assert (trouble.value.code, trouble.value.text) == (550, "5.7.1 bad name")


@pytest.mark.parametrize("ending", ["FIN", "RST"])
@pytest.mark.parametrize("scheme", ["smtp", "lmtp"])
async def test_a_connection_that_ends_right_after_the_reply_to_ehlo_is_a_failed_one(scheme, ending):
    async def act(peer):
        await peer.say("220 strange.example")
        await peer.hear()
        await peer.say(*HELLO)
        if ending == "RST":
            sock = peer.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.writer.transport.abort()

    async with Scripted(act) as server:
        route = route_to(f"{scheme}://127.0.0.1:{server.port}")
        for _ in range(20):  # the end comes while the connection is set up, or after
            with pytest.raises(RouteTroubleError, match=r"closed the connection|onnection lost|reset|EOF"):
                await ended_at_once(route)


async def ended_at_once(route):
    """Set up a connection whose server hangs up, and wait until this is known."""
    owner = Ended()
    connection, transport = await route.connect(owner)
    connection.attach(transport)
    await until(lambda: connection.is_closed, "the end is noticed")
    raise RouteTroubleError("the server closed the connection")


class Ended:
    """An owner that has no mail."""

    def take(self):
        return None

    def idle(self, connection):
        pass

    def closed(self, connection, trouble):
        pass


async def test_a_server_that_does_not_know_ehlo_gets_helo():
    async with Scripted(says_to_hello("502 what?", "250 hello")) as server:
        assert await opened(route_to(f"smtp://127.0.0.1:{server.port}")) is False
    assert [line.split()[0] for line in server.heard] == ["EHLO", "HELO"]


@pytest.mark.parametrize("scheme", ["smtp", "lmtp"])
@pytest.mark.parametrize(
    "host, setting, name",
    [
        ("3f2a9bc41d07", None, "[127.0.0.1]"),
        ("web1.example.com", None, "web1.example.com"),
        ("3f2a9bc41d07", "mail.example.com", "mail.example.com"),
    ],
)
async def test_the_name_in_ehlo_is_one_that_servers_accept(monkeypatch, scheme, host, setting, name):
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    async with Scripted(works) as server:
        await opened(route_to(f"{scheme}://127.0.0.1:{server.port}", helo_name=setting))
    assert server.heard[0] == f"{'EHLO' if scheme == 'smtp' else 'LHLO'} {name}"


# ── several addresses ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def resolving(monkeypatch):
    """Lets a name have the addresses of these servers."""

    def resolve_to(*servers):
        async def resolve(_host, _port):
            return [Endpoint(socket.AF_INET, (server.host, server.port)) for server in servers]

        monkeypatch.setattr(dialing, "resolve", resolve)

    return resolve_to


@pytest.mark.parametrize("scheme", ["smtp", "lmtp"])
@pytest.mark.parametrize(
    "first",
    [silence, hangs_up, greets("421 4.3.2 too many"), greets("554 5.7.1 no"), greets("what?"), says_to_hello("550 no")],
    ids=["silent", "gone", "421", "554", "garbage", "no EHLO"],
)
async def test_an_address_that_cannot_be_used_is_skipped_and_tried_last_from_then_on(
    monkeypatch, resolving, scheme, first
):
    monkeypatch.setattr(dialing, "SPEECH_S", 0.1)
    async with Scripted(first, host="127.0.0.2") as bad, Scripted(works) as good:
        resolving(bad, good)
        route = route_to(f"{scheme}://mx.example:25")
        for _ in range(3):
            await opened(route)
    assert (len(bad.visits), len(good.visits)) == (1, 3)


async def test_an_address_on_which_nothing_listens_is_skipped(resolving):
    async with Scripted(works, host="127.0.0.2") as gone, Scripted(works) as good:
        pass
    async with Scripted(works) as good:
        resolving(gone, good)
        await opened(route_to("smtp://mx.example:25"))
    assert (len(gone.visits), len(good.visits)) == (0, 1)


async def test_all_addresses_are_asked_before_no_answer_is_said_and_each_is_named(resolving):
    async with (
        Scripted(silence, host="127.0.0.2") as one,
        Scripted(greets("554 5.7.1 no"), host="127.0.0.3") as two,
        Scripted(greets("421 4.7.0 too many connections")) as three,
    ):
        resolving(one, two, three)
        with pytest.raises(RouteTroubleError) as trouble:
            await opened(route_to("smtp://mx.example:25", connect_timeout_s=0.6))
        assert [len(server.visits) for server in (one, two, three)] == [1, 1, 1]
    said = str(trouble.value)
    assert "127.0.0.2: no answer within 0.6 s" in said
    assert "127.0.0.3: 554 5.7.1 no" in said
    assert "127.0.0.1: 421 4.7.0 too many connections" in said
    assert (trouble.value.code, trouble.value.text) == (421, "4.7.0 too many connections"), "it may be had later"


async def test_a_name_without_an_address_is_named():
    with pytest.raises(RouteTroubleError, match="the name has no address"):
        await opened(route_to("smtp://mx.invalid:25"))


# ── STARTTLS ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def offers_starttls(say, *lines, then=None):
    """A server that answers STARTTLS like that; in clear text it works, with a reply to each command."""

    async def act(peer):
        await peer.say("220 strange.example")
        while (line := await peer.hear()) != "QUIT":
            if line.startswith("EHLO"):
                await peer.say("250-strange.example", "250-STARTTLS", "250 PIPELINING")
            elif line != "STARTTLS":
                await peer.say("250 fine")
            else:
                await peer.say(say, *lines)
                if then is not None:
                    await then(peer)
                    return

    return act


async def starts_tls(peer, *, minimum=ssl.TLSVersion.TLSv1_2, maximum=ssl.TLSVersion.TLSv1_3, client=False, then=None):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    context.minimum_version, context.maximum_version = minimum, maximum
    if client:
        context.verify_mode = ssl.CERT_REQUIRED
    transport, protocol = peer.writer.transport, peer.writer.transport.get_protocol()
    transport = await asyncio.get_running_loop().start_tls(transport, protocol, context, server_side=True)
    peer.writer._transport = transport
    peer.reader._transport = transport
    if then is not None:
        await then(peer)
    else:
        await peer.hear()


def of_tls(**how):
    async def act(peer):
        await starts_tls(peer, **how)

    return act


BROKEN = {
    "454": (offers_starttls("454 4.7.0 TLS not available"), 1),
    "500": (offers_starttls("500 5.5.1 what?"), 1),
    "501": (offers_starttls("501 5.5.4 no parameters"), 1),
    "502": (offers_starttls("502 5.5.1 not implemented"), 1),
    "454 and gone": (offers_starttls("454 4.7.0 TLS not available", then=hangs_up), 2),
    "421": (offers_starttls("421 4.7.0 closing", then=hangs_up), 2),
    "250": (offers_starttls("250 fine"), 2),
    "garbage": (offers_starttls("what?"), 2),
    "gone": (offers_starttls("220 go on", then=hangs_up), 2),
    "no TLS": (offers_starttls("220 go on", "250-what?", "250 fine", then=silence), 2),
    "silent": (offers_starttls("220 go on", then=silence), 2),
    "client certificate": (offers_starttls("220 go on", then=of_tls(client=True)), 2),
    "gone in TLS": (offers_starttls("220 go on", then=of_tls(then=hangs_up)), 2),
    "silent in TLS": (offers_starttls("220 go on", then=of_tls(then=silence)), 2),
}


@pytest.mark.parametrize("fault", BROKEN)
async def test_without_a_login_starttls_that_is_broken_gives_way_to_clear_text(monkeypatch, caplog, fault):
    act, connections = BROKEN[fault]
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(connector_module, "TLS_PATIENCE_S", 0.3)
    async with Scripted(act) as server:
        route = route_to(f"smtp://127.0.0.1:{server.port}")
        assert await opened(route) is False
        assert len(server.visits) == connections
        assert await opened(route) is False
        assert len(server.visits) == connections + 1
        asked = [visit for visit in server.visits if "STARTTLS" in visit.heard]
        assert len(asked) == (2 if connections == 1 else 1), "a broken handshake is not tried again for each connection"
    (line,) = [record.getMessage() for record in caplog.records if "STARTTLS" in record.getMessage()]
    assert f"STARTTLS of 127.0.0.1:{server.port} fails, so emails are sent there in clear text: " in line
    if fault[:3].isdigit():
        assert fault[:3] in line


@pytest.mark.parametrize("fault", BROKEN)
async def test_where_tls_is_demanded_starttls_that_is_broken_gets_nothing(monkeypatch, fault):
    act, _ = BROKEN[fault]
    async with Scripted(act) as server:
        route = route_to(f"smtp://127.0.0.1:{server.port}", starttls="always", connect_timeout_s=0.5)
        for _ in range(2):
            with pytest.raises(RouteTroubleError):
                await opened(route)
        assert {line.split()[0] for line in server.heard} <= {"EHLO", "STARTTLS"}
    assert route.clear.reason is None


async def test_starttls_that_works_again_is_used_and_said(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(connector_module, "CLEAR_S", 0.0)

    async def goes_on(peer):
        await peer.hear()
        await peer.say(*HELLO)
        await peer.silence()

    bad, clear = offers_starttls("220 go on", then=hangs_up), offers_starttls("454 no")
    async with Scripted(bad, clear, offers_starttls("220 go on", then=of_tls(then=goes_on))) as server:
        route = route_to(f"smtp://127.0.0.1:{server.port}")
        assert await opened(route) is False
        assert await opened(route) is True
    assert [record.event_name for record in caplog.records if hasattr(record, "event_name")] == [
        "starttls_failed",
        "starttls_works",
    ]


# ── login ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def b64(text):
    return base64.b64encode(text.encode()).decode()


def wants_login(*mechanisms, **answers):
    """A server whose `auth` gets the words behind AUTH and answers them."""

    async def act(peer):
        await peer.say("220 strange.example")
        while (line := await peer.hear()) != "QUIT":
            verb, *words = line.split()
            if verb == "EHLO":
                await peer.say("250-strange.example", f"250 AUTH {' '.join(mechanisms)}")
            elif verb == "AUTH":
                await answers[words[0].replace("-", "").lower()](peer, *words[1:])
            else:
                await peer.say("250 fine")

    return act


def says(*lines, then_gone=False):
    async def answer(peer, *_):
        await peer.say(*lines)
        if then_gone:
            raise ConnectionResetError

    return answer


async def is_right(peer, *given):
    """Whether the rest of a LOGIN is user and secret."""
    await peer.say("235 2.7.0 welcome" if given == (b64("user"), b64("secret")) else "535 5.7.8 wrong")


async def overlooks_the_initial_response(peer, *_):
    await peer.say("334 VXNlcm5hbWU6")
    user = await peer.hear()
    await peer.say("334 UGFzc3dvcmQ6")
    await is_right(peer, user, await peer.hear())


async def asks_for_the_password_first(peer, *_):
    await peer.say(f"334 {b64('Password:')}")
    password = await peer.hear()
    await peer.say(f"334 {b64('User Name' + chr(0))}")
    await is_right(peer, await peer.hear(), password)


async def asks_without_base64(peer, *_):
    await peer.say("334 Username:")
    user = await peer.hear()
    await peer.say("334 Password:")
    await is_right(peer, user, await peer.hear())


async def asks_without_words(peer, *_):
    await peer.say("334 ")
    user = await peer.hear()
    await peer.say("334")
    await is_right(peer, user, await peer.hear())


async def overlooks_plain(peer, *_):
    await peer.say("334 ")
    await peer.say("235 in" if await peer.hear() == b64("\0user\0secret") else "535 5.7.8 wrong")


async def logged_in(server, passed=()):
    smtp = aiosmtplib.SMTP(hostname="127.0.0.1", port=server.port, start_tls=False, local_hostname="a.example")
    await smtp.connect()
    await smtp.ehlo()
    try:
        return await log_in(smtp, "user", "secret", passed=passed)
    finally:
        smtp.close()


@pytest.mark.parametrize(
    "login",
    [overlooks_the_initial_response, asks_for_the_password_first, asks_without_base64, asks_without_words],
)
async def test_auth_login_answers_what_is_asked(login):
    async with Scripted(wants_login("LOGIN", login=login)) as server:
        assert await logged_in(server) == "login"


async def test_auth_plain_is_said_again_where_the_initial_response_was_overlooked():
    async with Scripted(wants_login("LOGIN", "PLAIN", plain=overlooks_plain)) as server:
        assert await logged_in(server) == "plain"


async def test_a_login_is_a_password_in_one_mechanism_only():
    async with Scripted(wants_login("CRAM-MD5", "LOGIN", "PLAIN", plain=says("535 5.7.8 wrong"))) as server:
        with pytest.raises(LoginError, match=r"535 5\.7\.8 wrong") as failed:
            await logged_in(server)
    assert failed.value.is_judged
    assert sum(line.startswith("AUTH") for line in server.heard) == 1


@pytest.mark.parametrize("refusal", ["504 5.5.4 unknown", "534 5.7.9 Authentication mechanism is too weak", "502 no"])
async def test_a_mechanism_that_is_refused_gives_way_to_the_next(refusal):
    acts = wants_login("PLAIN", "LOGIN", plain=says(refusal), login=overlooks_the_initial_response)
    async with Scripted(acts) as server:
        assert await logged_in(server) == "login"


async def test_a_mechanism_in_which_the_login_was_refused_comes_last_in_the_next_try():
    acts = wants_login("PLAIN", "LOGIN", plain=says("535 wrong"), login=overlooks_the_initial_response)
    async with Scripted(acts) as server:
        assert await logged_in(server, passed={"plain"}) == "login"


@pytest.mark.parametrize(
    "answer, says_so, judged",
    [
        (says("535 5.7.8 wrong", then_gone=True), "535 5.7.8 wrong", True),
        (says("535-5.7.8 wrong", "535 5.7.8 see https://example.com/", then_gone=True), "535 5.7.8 wrong", True),
        (says("534-5.7.9 Application-specific password required", "534 5.7.9 see there"), "534 5.7.9", True),
        (says("454 4.7.0 Temporary authentication failure"), "454 4.7.0", False),
        (says("454 4.7.0 Too many login attempts, please try again later"), "454 4.7.0 Too many", True),
        (says("421 4.7.0 Too many failures", then_gone=True), "421 4.7.0 Too many", True),
        (says("what?"), "what?", False),
        (says(then_gone=True), "closed the connection", False),
    ],
    ids=["535 and gone", "lines and gone", "534", "454", "454 too many", "421 too many", "garbage", "gone"],
)
async def test_what_a_server_says_to_a_login_is_shown_and_only_a_judgement_of_it_pauses_long(answer, says_so, judged):
    async with Scripted(wants_login("PLAIN", plain=answer)) as server:
        with pytest.raises(LoginError) as failed:
            await logged_in(server)
    assert says_so in str(failed.value)
    assert failed.value.is_judged is judged


@pytest.fixture
def secure(monkeypatch, tmp_path):
    """A context for a server whose certificate is believed."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    return context


def attempts(server):
    return sum(line.startswith("AUTH") for line in server.heard)


async def refused(route, kind=LoginRefusedError):
    with pytest.raises(RouteTroubleError) as trouble:
        await opened(route)
    assert type(trouble.value) is kind
    return trouble.value


async def test_after_a_refused_login_the_server_is_left_alone_for_minutes_that_grow(monkeypatch, secure):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    async with Scripted(wants_login("PLAIN", plain=says("535 5.7.8 wrong", then_gone=True)), tls=secure) as server:
        route = route_to(f"smtps://user:secret@localhost:{server.port}")
        pauses = []
        for number in range(1, 8):
            trouble = await refused(route)
            pauses.append(trouble.until - now[0])
            assert (trouble.code, trouble.text) == (535, "5.7.8 wrong")
            assert "535 5.7.8 wrong" in str(trouble)
            assert "secret" not in str(trouble)
            now[0] = trouble.until - 1
            assert await refused(route) is trouble
            assert (attempts(server), len(server.visits)) == (number, number)
            now[0] += 2
    assert pauses == [60, 120, 240, 480, 960, 1800, 1800]


async def test_connections_that_are_opened_together_send_a_wrong_password_once_and_a_right_one_together(secure):
    async with Scripted(wants_login("PLAIN", plain=says("535 5.7.8 wrong")), tls=secure) as server:
        route = route_to(f"smtps://user:secret@localhost:{server.port}")
        outcomes = await asyncio.gather(*(opened(route) for _ in range(16)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {LoginRefusedError}
        assert attempts(server) == 1
    async with Scripted(wants_login("PLAIN", plain=says("235 in")), tls=secure) as server:
        route = route_to(f"smtps://user:secret@localhost:{server.port}")
        assert await asyncio.gather(*(opened(route) for _ in range(16))) == [True] * 16
        assert len(server.visits) == 16


async def test_a_connection_that_waits_for_a_login_goes_on_when_the_one_that_logs_in_is_stopped(secure):
    async with Scripted(silence, wants_login("PLAIN", plain=says("235 in")), tls=secure) as server:
        route = route_to(f"smtps://user:secret@localhost:{server.port}")
        first, second = (asyncio.create_task(opened(route)) for _ in range(2))
        await until(lambda: server.visits, "the first is at it")
        first.cancel()
        assert await second is True


async def test_a_server_that_hangs_up_instead_of_refusing_is_left_alone_after_a_few_tries(secure):
    async with Scripted(wants_login("PLAIN", plain=says(then_gone=True)), tls=secure) as server:
        route = route_to(f"smtps://user:secret@localhost:{server.port}")
        for _ in range(2):
            await refused(route, RouteTroubleError)
        for _ in range(3):
            await refused(route)
        assert attempts(server) == 3


async def test_a_new_password_in_the_file_is_tried_at_once(monkeypatch, tmp_path, secure):
    async def plain(peer, given):
        await peer.say("235 in" if given == b64("\0user\0new secret") else "535 5.7.8 wrong")

    async with Scripted(wants_login("PLAIN", plain=plain), tls=secure) as server:

        def write(password):
            new = tmp_path / "new"
            new.write_text(f"smtps://user:{password}@localhost:{server.port}\n")
            new.rename(tmp_path / "url")

        monkeypatch.chdir(tmp_path)
        write("old")
        settings = load(environ={"OUTBOX_SMTP_URL_FILE": "url"})
        route = Connector.of(settings.smtp_url, settings)
        await refused(route)
        await refused(route)
        assert attempts(server) == 1
        (tmp_path / "url").write_text("")  # half of a write
        await refused(route)
        assert attempts(server) == 1
        write("wrong")
        await refused(route)
        await refused(route)
        assert attempts(server) == 2
        write("new%20secret")
        assert await opened(route) is True
        assert attempts(server) == 3
        assert route.address.password == "new secret"


async def test_a_file_that_is_written_again_with_the_same_password_has_it_tried_after_the_first_pause(
    monkeypatch, tmp_path, secure
):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    async with Scripted(wants_login("PLAIN", plain=says("535 5.7.8 wrong")), tls=secure) as server:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "url").write_text(f"smtps://user:old@localhost:{server.port}\n")
        settings = load(environ={"OUTBOX_SMTP_URL_FILE": "url"})
        route = Connector.of(settings.smtp_url, settings)
        await refused(route)
        now[0] += 61
        await refused(route)
        for waited, tries in ((30, 2), (31, 3)):
            now[0] += waited
            (tmp_path / "url").write_text(f"smtps://user:old@localhost:{server.port}\n\n")
            os.utime(tmp_path / "url", (now[0], now[0]))
            await refused(route)
            assert attempts(server) == tries


async def test_a_password_that_was_changed_before_the_server_refused_the_old_one_costs_no_pause(
    monkeypatch, tmp_path, secure
):
    async def plain(peer, given):
        await peer.say("235 in" if given == b64("\0user\0new") else "535 5.7.8 wrong")

    async with Scripted(wants_login("PLAIN", plain=plain), tls=secure) as server:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "url").write_text(f"smtps://user:old@localhost:{server.port}\n")
        settings = load(environ={"OUTBOX_SMTP_URL_FILE": "url"})
        route = Connector.of(settings.smtp_url, settings)
        (tmp_path / "url").write_text(f"smtps://user:new@localhost:{server.port}\n")
        await refused(route, RouteTroubleError)
        assert await opened(route) is True

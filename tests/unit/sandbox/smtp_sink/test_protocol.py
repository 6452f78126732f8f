import asyncio
import contextlib
import ssl
from collections.abc import Callable, Coroutine

import aiosmtplib
import pytest
import uvloop

from outbox.sandbox.smtp_sink import (
    Accept,
    Action,
    Cut,
    Flood,
    Hold,
    Reply,
    Reset,
    Sink,
    Stage,
    Stall,
    Trickle,
    Visit,
)
from tests.support.sink_client import (
    BANNER,
    DEADLINE_S,
    ENVELOPE,
    GO_AHEAD,
    MESSAGE,
    OK,
    at,
    final_codes,
    messages,
    session,
    until,
    visit,
)


async def test_a_dot_and_the_next_envelope_may_share_a_write():
    async with Sink() as sink, session(sink) as client:
        client.write(ENVELOPE)
        assert await client.codes(3) == [OK, OK, GO_AHEAD]
        for _ in range(3):
            client.write(MESSAGE + b".\r\n" + ENVELOPE)
            assert await client.codes(4) == [OK, OK, OK, GO_AHEAD]
        client.write(MESSAGE + b".\r\nQUIT\r\n")
        assert await client.codes(2) == [OK, b"221 "]
        assert await client.rest() == b""
    assert messages(sink) == [MESSAGE] * 4


async def test_a_script_is_asked_at_every_stage_in_order():
    async with Sink(lambda _stage, _visit: None) as sink, session(sink) as client:
        client.write(b"EHLO x\r\n" + ENVELOPE + MESSAGE + b".\r\nRSET\r\nQUIT\r\n")
        await client.rest()
    assert [stage for _, _, stage in sink.events] == [
        Stage.CONNECT,
        Stage.EHLO,
        Stage.MAIL,
        Stage.RCPT,
        Stage.DATA,
        Stage.CONTENT,
        Stage.DOT,
        Stage.RSET,
        Stage.QUIT,
    ]


async def test_a_script_sees_whom_it_is_asked_about():
    def script(stage: Stage, visit: Visit) -> Action | None:
        if stage is Stage.RCPT and visit.recipients[-1] == "no@example.com":
            return Reply("550 5.1.1 Nobody here")
        return None

    async with Sink(script) as sink, session(sink) as client:
        await client.ask(b"MAIL FROM:<a@example.com>")
        assert await client.ask(b"RCPT TO:<no@example.com>") == b"550 5.1.1 Nobody here\r\n"
        assert (await client.ask(b"DATA"))[:4] == b"503 "
        await client.ask(b"RCPT TO:<yes@example.com>")
        assert (await client.ask(b"DATA"))[:4] == GO_AHEAD
        assert (await client.ask(b"."))[:4] == OK
    assert sink.accepted[0].recipients == ("yes@example.com",)


@pytest.mark.parametrize("stage", [Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.DOT])
@pytest.mark.parametrize("text", [b"451 4.3.0 Later\r\n", b"550 5.0.0 Never\r\n", b"garbage\r\n"])
async def test_a_refusal_keeps_the_message_out_and_the_next_one_goes_through(stage: Stage, text: bytes):
    async with Sink(at(stage, Reply(text), message=1)) as sink, session(sink) as client:
        for command in (b"MAIL FROM:<a@b>", b"RCPT TO:<b@c>", b"DATA", b"."):
            if (reply := await client.ask(command)) == text:
                break
        assert reply == text
        if stage is not Stage.DOT:  # a refused message has ended its transaction
            await client.ask(b"RSET")
        client.write(ENVELOPE + MESSAGE + b".\r\n")
        assert await client.codes(4) == [OK, OK, GO_AHEAD, OK]
    assert messages(sink) == [MESSAGE]


async def test_another_reply_of_the_same_class_takes_effect():
    async with Sink(at(Stage.DOT, Reply(b"250 queued as 7\r\n"))) as sink, session(sink) as client:
        client.write(ENVELOPE + b".\r\n")
        assert await client.codes(3) == [OK, OK, GO_AHEAD]
        assert await client.line() == b"250 queued as 7\r\n"
    assert sink.messages == 1


async def test_a_reply_may_be_the_last_word():
    async with (
        Sink(at(Stage.RCPT, Reply("421 4.3.2 Closing", then_cut=True))) as sink,
        session(sink) as client,
    ):
        client.write(ENVELOPE)
        assert await client.rest() == b"250 2.1.0 OK\r\n421 4.3.2 Closing\r\n"
    assert sink.messages == 0


ALL_BUT_QUIET = [Stage.CONNECT, Stage.EHLO, Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.CONTENT, Stage.DOT]


async def replies_until_the_end(sink: Sink) -> bytes:
    async with visit(sink) as client:
        client.write(b"EHLO x\r\n" + ENVELOPE + MESSAGE + b".\r\n")
        return await client.rest()


@pytest.mark.parametrize("stage", ALL_BUT_QUIET)
async def test_a_cut_ends_the_connection_without_an_answer_to_the_stage(stage: Stage):
    async with Sink(at(stage, Cut())) as sink:
        replies = await replies_until_the_end(sink)
        await until(lambda: not sink.connections)
    position = min(ALL_BUT_QUIET.index(stage), 5)  # the content has no reply of its own
    assert final_codes(replies) == [b"220", b"250", b"250", b"250", b"354"][:position]
    assert sink.messages == 0


async def test_a_cut_is_a_clean_end_even_while_the_client_writes():
    async with Sink(at(Stage.CONTENT, Cut())) as sink, session(sink) as client:
        client.write(ENVELOPE + b"x" * 3_000_000)
        assert await client.codes(3) == [OK, OK, GO_AHEAD]
        assert await client.rest() == b""


@pytest.mark.parametrize("stage", ALL_BUT_QUIET)
async def test_a_reset_is_seen_as_one(stage: Stage):
    async with Sink(at(stage, Reset())) as sink:
        with pytest.raises(ConnectionResetError):
            await replies_until_the_end(sink)
    assert sink.messages == 0


@pytest.mark.parametrize("then, seen", [(Cut(), b""), (Reply("garbage"), b"garbage\r\n"), (Stall(), None)])
async def test_an_accepted_message_stays_accepted_when_its_reply_is_lost(then: Action, seen: bytes | None):
    async with Sink(at(Stage.DOT, Accept(then))) as sink, session(sink) as client:
        client.write(ENVELOPE + MESSAGE + b".\r\n")
        assert await client.codes(3) == [OK, OK, GO_AHEAD]
        if seen is None:
            assert await client.silent()
        else:
            assert await client.line() == seen
        assert messages(sink) == [MESSAGE]


async def test_accept_without_more_is_the_usual_answer():
    async with Sink(at(Stage.DOT, Accept())) as sink, session(sink) as client:
        client.write(ENVELOPE + MESSAGE + b".\r\n")
        assert await client.codes(4) == [OK, OK, GO_AHEAD, OK]
        assert sink.messages == 1


async def test_a_stall_answers_what_came_before_it_and_nothing_else():
    async with Sink(at(Stage.RCPT, Stall())) as sink, session(sink) as client:
        client.write(ENVELOPE + b"NOOP\r\n")
        assert await client.codes(1) == [OK]
        assert await client.silent()
        assert len(sink.connections) == 1
        assert sink.events[-1][2] is Stage.RCPT


async def test_a_deaf_stall_leaves_what_is_written_with_the_client():
    async with Sink(at(Stage.CONTENT, Stall(deaf=True))) as sink, session(sink) as client:
        client.write(ENVELOPE + b"x" * 16_000_000)
        assert await client.codes(3) == [OK, OK, GO_AHEAD]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.writer.drain(), 0.2)
        client.writer.transport.abort()


async def test_a_flood_goes_on_until_the_client_leaves():
    async with Sink(at(Stage.EHLO, Flood(b"x" * 1000))) as sink:
        async with session(sink) as client:
            client.write(b"EHLO x\r\n")
            assert await client.reader.readexactly(1_000_000) == b"x" * 1_000_000
            client.writer.transport.abort()
        await until(lambda: not sink.connections)
        assert sink.visits[0].flooded >= 1_000_000


async def test_a_script_sees_what_came_behind_what_it_is_asked_about():
    behind = {}

    def note(stage: Stage, visit: Visit) -> None:
        behind[stage] = visit.behind

    async with Sink(note) as sink, session(sink) as client:
        client.write(b"EHLO x\r\n" + ENVELOPE + MESSAGE + b".\r\nRSET\r\n")
        await client.codes(4)
        await until(lambda: Stage.RSET in behind)
    assert behind[Stage.DOT] == b"RSET\r\n"
    assert behind[Stage.RSET] == b""


@pytest.mark.parametrize("stage", ALL_BUT_QUIET)
async def test_input_behind_a_hold_waits_its_turn(stage: Stage):
    event = asyncio.Event()
    async with Sink(at(stage, Hold(event))) as sink, visit(sink) as client:
        client.write(b"EHLO x\r\n" + ENVELOPE + MESSAGE + b".\r\nQUIT\r\n")
        await until(lambda: sink.events and sink.events[-1][2] is stage)
        assert sink.messages == 0
        event.set()
        replies = await client.rest()
    assert final_codes(replies) == [b"220", b"250", b"250", b"250", b"354", b"250", b"221"]
    assert messages(sink) == [MESSAGE]


async def test_a_hold_ends_in_what_the_script_says():
    event = asyncio.Event()
    async with Sink(at(Stage.DOT, Hold(event, Reply("451 4.3.0 Later")))) as sink, session(sink) as client:
        client.write(ENVELOPE + MESSAGE + b".\r\n")
        assert await client.codes(3) == [OK, OK, GO_AHEAD]
        event.set()
        assert await client.line() == b"451 4.3.0 Later\r\n"
    assert sink.messages == 0


@pytest.mark.parametrize("stage, kept", [(Stage.DOT, 1), (Stage.DATA, 0)])
async def test_a_client_that_leaves_during_a_hold_has_handed_over_what_it_finished(stage: Stage, kept: int):
    event = asyncio.Event()
    async with Sink(at(stage, Hold(event))) as sink:
        async with session(sink) as client:
            client.write(ENVELOPE if stage is Stage.DATA else ENVELOPE + MESSAGE + b".\r\n")
            await until(lambda: sink.events[-1][2] is stage)
        await until(lambda: not sink.connections)
        event.set()
        await until(lambda: not sink._tasks)
        assert sink.messages == kept


async def test_a_dropped_connection_takes_its_hold_along():
    event = asyncio.Event()
    async with Sink(at(Stage.DOT, Hold(event))) as sink, session(sink) as client:
        client.write(ENVELOPE + MESSAGE + b".\r\n")
        await until(lambda: sink.events[-1][2] is Stage.DOT)
        sink.drop_connections()
        event.set()
        with pytest.raises(ConnectionResetError):
            await client.rest()
        await until(lambda: not sink._tasks)
        assert sink.messages == 0


@pytest.mark.parametrize("reply, kept", [(None, 1), ("250-a\r\n250 b", 1), (b"451 no\r\n", 0)])
async def test_a_trickle_comes_in_pieces_and_takes_effect(reply: bytes | str | None, kept: int):
    script = at(Stage.DOT, Trickle(reply, chunk=2, delay_s=0.001), message=1)
    async with Sink(script) as sink, session(sink) as client:
        client.write(ENVELOPE + MESSAGE + b".\r\nNOOP\r\n")
        assert await client.codes(3) == [OK, OK, GO_AHEAD]
        while (line := await client.line())[3:4] == b"-":
            pass
        assert line[:3] == (b"250" if kept else b"451")
        assert await client.codes(1) == [OK]
        assert sink.messages == kept


async def test_a_trickle_that_nobody_waits_for_takes_no_effect():
    async with Sink(at(Stage.DOT, Trickle(delay_s=0.001))) as sink:
        async with session(sink) as client:
            client.write(ENVELOPE + MESSAGE + b".\r\n")
            assert await client.codes(3) == [OK, OK, GO_AHEAD]
        await until(lambda: not sink._tasks)
        assert sink.messages == 0


async def test_accept_elsewhere_than_at_the_dot_is_a_mistake():
    async with Sink() as sink:
        connection = sink.connection()
        with pytest.raises(ValueError, match="at DOT only"):
            connection._act(Stage.MAIL, b"250 ", Accept())


def on_uvloop(test: Callable[[], Coroutine[None, None, None]]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test())


@pytest.mark.parametrize(
    "law",
    [
        test_a_dot_and_the_next_envelope_may_share_a_write,
        test_a_reply_may_be_the_last_word,
        test_a_cut_is_a_clean_end_even_while_the_client_writes,
        test_a_dropped_connection_takes_its_hold_along,
    ],
    ids=lambda law: law.__name__,
)
def test_uvloop_changes_nothing(law: Callable[[], Coroutine[None, None, None]]):
    on_uvloop(law)


@pytest.mark.parametrize("stage", [Stage.CONNECT, Stage.CONTENT, Stage.DOT])
def test_uvloop_changes_nothing_about_a_reset(stage: Stage):
    on_uvloop(lambda: test_a_reset_is_seen_as_one(stage))


async def send_secretly(contexts: tuple[ssl.SSLContext, ssl.SSLContext], *, implicit: bool) -> None:
    server, trusting = contexts
    async with Sink(tls=server, implicit_tls=implicit, login=("u", "p:ä")) as sink:
        client = aiosmtplib.SMTP(
            hostname="127.0.0.1",
            port=sink.port,
            use_tls=implicit,
            tls_context=trusting,
            username="u",
            password="p:ä",
            timeout=DEADLINE_S,
        )
        async with client:
            await client.sendmail("a@example.com", ["b@example.com"], MESSAGE)
    assert messages(sink) == [MESSAGE]
    assert sink.visits[0].tls
    assert sink.visits[0].authenticated
    assert sink.url.startswith("smtps:" if implicit else "smtp:")


@pytest.mark.parametrize("implicit", [False, True])
async def test_aiosmtplib_sends_through_tls_and_auth(contexts, implicit: bool):
    await send_secretly(contexts, implicit=implicit)


@pytest.mark.parametrize("implicit", [False, True])
def test_uvloop_changes_nothing_about_tls(contexts, implicit: bool):
    on_uvloop(lambda: send_secretly(contexts, implicit=implicit))


async def test_plain_text_behind_starttls_is_dropped(contexts):
    async with Sink(tls=contexts[0]) as sink, session(sink) as client:
        client.write(b"STARTTLS\r\nMAIL FROM:<injected@example.com>\r\n")
        assert await client.codes(1) == [BANNER]
        await client.writer.start_tls(contexts[1], server_hostname="127.0.0.1")
        assert (await client.ask(b"MAIL FROM:<a@example.com>"))[:4] == OK
        assert sink.visits[0].sender == "a@example.com"


async def test_a_broken_handshake_ends_the_visit(contexts):
    async with Sink(tls=contexts[0]) as sink, session(sink) as client:
        assert (await client.ask(b"STARTTLS"))[:4] == BANNER
        client.write(b"this is not TLS\r\n")
        with contextlib.suppress(ConnectionError):
            await client.rest()
        await until(lambda: not sink.connections)

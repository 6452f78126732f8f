import base64

import pytest

from outbox.sandbox.smtp_sink import Sink
from outbox.sandbox.smtp_sink.auth import LoginDialogue
from tests.support.sink_client import OK, session


def encoded(text: str) -> bytes:
    return base64.b64encode(text.encode())


@pytest.mark.parametrize(
    "dialogue, code",
    [
        ([b"AUTH PLAIN " + encoded("\0u\0p")], b"235 "),
        ([b"AUTH PLAIN", encoded("\0u\0p")], b"235 "),
        ([b"AUTH LOGIN", encoded("u"), encoded("p")], b"235 "),
        ([b"auth login " + encoded("u"), encoded("p")], b"235 "),
        ([b"AUTH PLAIN " + encoded("\0u\0wrong")], b"535 "),
        ([b"AUTH LOGIN", encoded("u"), encoded("wrong")], b"535 "),
        ([b"AUTH PLAIN", b"not base64!"], b"535 "),
        ([b"AUTH PLAIN", b"*"], b"501 "),
        ([b"AUTH CRAM-MD5"], b"504 "),
        ([b"AUTH"], b"504 "),
    ],
)
async def test_login_is_mandatory_once_it_is_configured(dialogue: list[bytes], code: bytes):
    async with Sink(login=("u", "p")) as sink, session(sink) as client:
        assert (await client.ask(b"MAIL FROM:<a@b>"))[:4] == b"530 "
        for line in dialogue:
            reply = await client.ask(line)
        assert reply[:4] == code
        assert (await client.ask(b"MAIL FROM:<a@b>"))[:4] == (OK if code == b"235 " else b"530 ")


@pytest.mark.parametrize(
    "mechanism, answers, credentials",
    [
        (b"PLAIN", [encoded("\0u\0p")], ("u", "p")),
        (b"PLAIN", [encoded("u")], ()),
        (b"LOGIN", [encoded("u"), encoded("p:ä")], ("u", "p:ä")),
        (b"LOGIN", [encoded("u"), b"!"], ()),
        (b"PLAIN", [base64.b64encode(b"\xff")], ()),
    ],
)
def test_credentials_are_what_the_client_gave(mechanism: bytes, answers: list[bytes], credentials: tuple[str, ...]):
    login = LoginDialogue(mechanism, [])
    for answer in answers:
        assert login.prompt() is not None
        login.answer(answer)
    assert login.prompt() is None
    assert login.credentials() == credentials

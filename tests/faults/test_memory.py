"""A relay's process stays under 256 MB, the limit of the manifests in docs/deploy, whatever the CHECKs let in.

Real processes; the peak of what they hold in memory is the kernel's own figure (VmHWM).
"""

import asyncio
import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from outbox.relay.claims import SMALL_BYTES
from outbox.sandbox.smtp_sink import Sink
from outbox.settings import MESSAGE_BYTES_MAX
from tests.support.fleet import Fleet

LIMIT_BYTES = 256 * 1000 * 1000
HEAD = b"From: reports@example.com\r\nSubject: large\r\n\r\n"
LARGEST = MESSAGE_BYTES_MAX - 200  # the envelope counts, too

PUT = """
WITH body AS MATERIALIZED (SELECT {message} AS message), made AS (
    INSERT INTO outbox.email (key, sender, recipient, message_id, message)
    SELECT 'mail' || n, 'reports@example.com', 'p' || n || '@example.com', '<' || n || '@x>', message
      FROM generate_series($1::int, $2::int) n, body RETURNING id)
INSERT INTO outbox.delivery (email) SELECT id FROM made
"""
# Bodies of the largest size, made by Postgres.
BODIES = {
    "all one letter": "convert_to(left(repeat(repeat('x', 76) || E'\\r\\n', 300000), {size}), 'UTF8')",
    "empty lines": "convert_to(left(repeat(E'\\r\\n', 12000000), {size} / 2 * 2), 'UTF8')",
    "dots": "convert_to(left(repeat(E'.\\r\\n', 8000000), {size}), 'UTF8')",
    "lone line feeds": "convert_to(left(repeat(E'\\n', 25000000), {size}), 'UTF8')",
    "blanks": "convert_to(left(repeat(repeat(' ', 997) || E'\\r\\n', 24000), {size}), 'UTF8')",
    "no two alike": "(SELECT convert_to(left(string_agg(translate(encode(sha512(i::text::bytea), 'base64'),"
    " E'\\n', E'='), E'\\r\\n'), {size}), 'UTF8') FROM generate_series(1, 240000) i)",
}


async def peak_of(process) -> int:
    """Wait for the end of a process; give the most memory that it had."""
    peak = 0
    while process.process.returncode is None and (now := _peak_so_far(process.pid)) is not None:
        peak = max(peak, now)
        await asyncio.sleep(0.01)
    return peak


def _peak_so_far(pid: int) -> int | None:
    """Bytes; None once it has ended."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


async def put(connection, body, count, *, first=1, size=LARGEST):
    """Emails of that size, stored as they are: Postgres takes seconds to compress one of them."""
    await connection.execute("ALTER TABLE outbox.email ALTER message SET STORAGE EXTERNAL")
    message = f"convert_to({_quoted(HEAD)}, 'UTF8') || {BODIES[body].format(size=size - len(HEAD))}"
    await connection.execute(PUT.format(message=message), first, first + count - 1, timeout=120)


def _quoted(text: bytes) -> str:
    return "E'" + text.decode().replace("\r", "\\r").replace("\n", "\\n") + "'"


def dkim_table(directory: Path) -> str:
    key = rsa.generate_private_key(65537, 2048)
    (directory / "dkim.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return '\n[dkim]\ndomain = "example.com"\nselector = "s1"\nkey_file = "dkim.pem"\n'


@pytest.fixture
async def deaf_sink():
    """A mail server that keeps counts only, in this process, where memory is not measured."""
    async with Sink(keep_messages=False, size_max=64 * 1024 * 1024) as server:
        yield server


@pytest.fixture
def company(database, connection, deaf_sink, tmp_path):
    """Processes of their own: what is forked has the memory of its parent."""
    return Fleet(database, connection, deaf_sink, tmp_path)


async def peak_of_relay(company) -> int:
    process = await company.start("relay", "--until-empty")
    async with asyncio.timeout(120):
        peak = await peak_of(process)
        ended = await process.ended()
    assert ended.code == 0, ended
    return peak


def cases():
    """A few of them always, all of them with `-m slow`."""
    usual = {("lone line feeds", False), ("no two alike", True)}
    for body in BODIES:
        for signed in (False, True):
            marks = [] if (body, signed) in usual else [pytest.mark.slow]
            yield pytest.param(body, signed, marks=marks, id=f"{body}, {'signed' if signed else 'plain'}")


@pytest.mark.parametrize(("body", "signed"), list(cases()))
async def test_many_messages_of_the_largest_size_are_sent_within_the_limit(
    company, connection, deaf_sink, tmp_path, body, signed
):
    await put(connection, body, 4)
    await put(connection, body, 60, first=101, size=SMALL_BYTES - 200)
    if signed:
        company.report = dkim_table(tmp_path)
    assert await peak_of_relay(company) < LIMIT_BYTES
    assert deaf_sink.messages == 64


@pytest.mark.parametrize("scheme", ["lmtp", "file"])
async def test_so_they_are_by_lmtp_and_into_a_maildir(company, connection, tmp_path, scheme):
    await put(connection, "dots", 3)
    async with Sink(keep_messages=False, size_max=64 * 1024 * 1024, lmtp=True) as server:
        company.smtp = server.url if scheme == "lmtp" else f"file://{tmp_path}/mail"
        assert await peak_of_relay(company) < LIMIT_BYTES
        assert server.messages == (3 if scheme == "lmtp" else 0)
    if scheme == "file":
        assert len(list((tmp_path / "mail" / "new").iterdir())) == 3


async def test_what_is_over_the_limit_is_never_read(company, connection, deaf_sink):
    """Older than the limit: 288 MB, which Postgres packs into seven."""
    await connection.execute("ALTER TABLE outbox.email DROP CONSTRAINT email_message_size, DROP CONSTRAINT email_sizes")
    body = "convert_to(repeat(repeat('x', 70) || E'\\r\\n', 4000000), 'UTF8')"
    await connection.execute(PUT.format(message=body), 1, 1, timeout=120)
    await put(connection, "dots", 3, first=2, size=5000)
    assert await peak_of_relay(company) < LIMIT_BYTES
    assert deaf_sink.messages == 3
    assert await company.states() == {"dead": 1, "sent": 3}


async def test_routes_of_one_process_share_the_memory(company, connection, deaf_sink):
    names = ("one", "two", "three")
    company.report = "".join(f'\n[routes.{name}]\nsmtp_url = "{deaf_sink.url}"\n' for name in names)
    for number, name in enumerate(("", *names)):
        await put(connection, "dots", 2, first=10 * number + 1)
        await connection.execute("UPDATE outbox.delivery SET route = $1 WHERE email > $2", name, 2 * number)
    assert await peak_of_relay(company) < LIMIT_BYTES
    assert deaf_sink.messages == 8

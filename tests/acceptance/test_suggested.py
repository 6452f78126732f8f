"""Suggested commands work as printed, in a real shell, for any key."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

KEYS = [
    "--help",
    "-x",
    "--sent",
    "--config=/etc/passwd",
    "two words",
    'it\'s "$(touch pwned)" `touch pwned`; touch pwned',
    "line\nline\n",
    "-\x1b[31m\\c%s\t*",
    "é\u202e~",
]


@pytest.fixture
async def evil(fleet):
    """An email of each key that is in doubt."""
    await fleet.connection.execute(
        """WITH made AS (
             INSERT INTO outbox.email (key, sender, recipient, message_id, message)
             SELECT key, 'reports@example.com', 'p' || n || '@example.com', '<' || n || '@example.com>',
                    convert_to(E'Subject: hello\\r\\n\\r\\nhello\\r\\n', 'UTF8')
               FROM unnest($1::text[]) WITH ORDINALITY AS given (key, n) RETURNING id)
           INSERT INTO outbox.delivery (email, state, attempt, marked_at, doubted_at, relay)
           SELECT id, 'in_doubt', 1, now(), now(), 1 FROM made""",
        KEYS,
    )
    fleet.write_settings()
    return fleet


async def typed(fleet, line):
    """A line as a person types it."""
    (fleet.directory / "bin").mkdir(exist_ok=True)
    program = fleet.directory / "bin" / "outbox"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m outbox "$@"\n')
    program.chmod(0o755)
    process = await asyncio.create_subprocess_shell(
        line,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=fleet.directory,
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(Path.cwd())},
    )
    out, _ = await process.communicate()
    assert not (fleet.directory / "pwned").exists()
    return process.returncode, out.decode()


async def state_of(fleet, key):
    return await fleet.connection.fetchval(
        "SELECT d.state FROM outbox.delivery d JOIN outbox.email m ON m.id = d.email WHERE m.key = $1", key
    )


def remedies(out):
    """Return the commands that `show` suggests."""
    lines = out.splitlines()
    at = next(at for at, line in enumerate(lines) if line.startswith("You may type"))
    return [line.strip() for line in lines[at + 1 :]]


async def test_the_commands_that_status_and_show_print_do_to_that_email_what_they_say(evil):
    troubles = json.loads((await evil.run("status", "--json")).out)["troubles"]
    assert sorted(trouble["key"] for trouble in troubles) == sorted(KEYS)
    printed = {line.strip() for line in (await evil.run("status")).out.splitlines()}
    for trouble in troubles:
        (discard,) = [one["command"] for one in trouble["choices"] if one["name"] == "--discard"]
        assert {trouble["command"], discard} <= printed
        code, out = await typed(evil, trouble["command"])
        assert (code, await state_of(evil, trouble["key"])) == (0, "in_doubt"), out
        code, out = await typed(evil, discard)
        assert (code, await state_of(evil, trouble["key"])) == (0, "dead"), out
    assert set((await evil.states()).items()) == {("dead", len(KEYS))}

    for key in KEYS:
        ended = await evil.run("show", "--", key)
        assert ended.code == 0, ended
        assert remedies(ended.out)[0].startswith(("outbox retry ", "lf="))
        assert (await typed(evil, remedies(ended.out)[0]))[0] == 0
        assert await state_of(evil, key) == "pending"
        ended = await evil.run("show", "--", key)
        (cancel,) = remedies(ended.out)
        assert (await typed(evil, cancel))[0] == 0
        assert await state_of(evil, key) == "cancelled"


async def test_the_commands_in_refusals_work_as_they_are_printed(evil):
    for key in KEYS:
        ended = await evil.run("cancel", "--", key)
        (sentence,) = ended.sentences
        suggested = sentence.split("may have it already; `", 1)[1].removesuffix("` lets it be.")
        code, out = await typed(evil, suggested)
        assert (code, await state_of(evil, key)) == (0, "dead"), out

"""Applications in other languages join their own transaction: `outbox.enqueue` from psql and from Node, for real."""

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import pytest

NODE = Path(__file__).parents[1] / "node"

PSQL = """
BEGIN;
INSERT INTO people (id, email, name) VALUES (98, 'pia@example.com', 'Pia');
SELECT outbox.enqueue(key => 'receipt/98', sender => 'Shop <shop@example.com>', recipient => 'Pia <pia@example.com>',
                      subject => 'Your order ✓', body_text => 'Thank you.', body_html => '<p>Thank you.</p>');
{ending};
"""


async def run(*command, stdin=""):
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    async with asyncio.timeout(60):
        said, _ = await process.communicate(stdin.encode())
    assert process.returncode == 0, said.decode()
    return said.decode()


async def arrives_once_if_committed(fleet, order, address):
    await order("rollback")
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.email") == 0
    await order("commit")
    await fleet.relay("--until-empty")
    assert await fleet.settled() == {"sent": 1}
    assert fleet.sink.addresses == {address: 1}
    (kept,) = fleet.sink.accepted
    assert b"Subject: =?utf-8?b?" in kept.message


@pytest.mark.skipif(shutil.which("psql") is None, reason="psql is not installed")
async def test_from_psql(fleet):
    async def order(ending):
        assert " t\n" in await run("psql", "-v", "ON_ERROR_STOP=1", fleet.database, stdin=PSQL.format(ending=ending))

    await arrives_once_if_committed(fleet, order, "pia@example.com")


@pytest.mark.skipif(shutil.which("npm") is None, reason="Node and npm are not installed")
async def test_from_node(fleet):
    if not (NODE / "node_modules" / "pg").is_dir():
        quick = "--fetch-retries=1", "--fetch-timeout=20000"
        fetch = "npm", "ci", "--prefix", str(NODE), "--no-audit", "--no-fund", *quick
        fetched = await asyncio.create_subprocess_exec(*fetch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said, _ = await fetched.communicate()
        if fetched.returncode != 0 and "CI" not in os.environ:
            pytest.skip("npm cannot fetch the package pg, since its registry is out of reach")
        assert fetched.returncode == 0, said.decode()
    host = await fleet.connection.fetchval("SHOW unix_socket_directories")
    name, port = await fleet.connection.fetchrow("SELECT current_database(), current_setting('port')")

    async def order(ending):
        url = f"postgresql://postgres@/{name}?host={host}&port={port}"
        assert await run("node", str(NODE / "order.js"), url, "receipt/99", ending) == "true\n"

    await arrives_once_if_committed(fleet, order, "nora@example.com")

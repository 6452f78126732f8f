"""Child processes: their lines, their outcome, their end."""

import asyncio
import logging
import sys

import pytest

from outbox.generate.child_process import LINE_MAX, LINES_MAX, run_child


async def run(code):
    lines = []
    outcome = await run_child([sys.executable, "-c", code], lambda *line: lines.append(line))
    return outcome, lines


async def test_success_has_no_problem_and_lines_come_with_their_level():
    outcome, lines = await run("import sys; print('outbox: a'); print('outbox: b', file=sys.stderr)")
    assert outcome is None
    assert sorted(lines) == [(logging.INFO, "a"), (logging.WARNING, "b")]


async def test_the_last_line_on_stderr_is_the_problem():
    assert (await run("import sys; print('x'); sys.exit('outbox: first\\nlast')"))[0] == "last"
    assert (await run("raise SystemExit(3)"))[0] == "outbox ended with 3 and said nothing"
    assert (await run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))[0] == "outbox was ended by SIGKILL"


async def test_many_lines_and_long_ones_are_cut():
    _, lines = await run(f"print('x' * {10 * LINE_MAX}); print('\\n'.join(map(str, range({LINES_MAX + 4}))))")
    assert lines[0] == (logging.INFO, "x" * LINE_MAX)
    assert lines[LINES_MAX:] == [(logging.INFO, "… and 5 more lines")]


async def test_a_cancelled_call_ends_the_child():
    started = asyncio.Event()
    pids = []

    def note(_, line):
        pids.append(int(line))
        started.set()

    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    running = asyncio.create_task(run_child([sys.executable, "-c", code], note))
    await asyncio.wait_for(started.wait(), 20)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    with pytest.raises(ProcessLookupError):
        __import__("os").kill(pids[0], 0)

"""The fault harness itself: what it finds when the promise is broken, and that the promise holds when it is not.

The broken relays are copies of the package in a directory of their own, to which the harness points its servers.
"""

import asyncio
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bench.faults.schedule import Strike
from bench.harness.environment import HOUSE, process_env
from outbox.relay.tick import TICK

TWICE = "no address is sent more than once"


@dataclass(frozen=True)
class Scene:
    """A schedule that meets one of the promise's four pillars where it stands alone."""

    patches: tuple[tuple[str, str, str], ...]  # file of the package, what stands there, what stands there instead
    strikes: tuple[tuple[str, float, int, float, float], ...]  # kind, at_s, host, length_s, coin
    arguments: str
    laws: frozenset[str] = field(default=frozenset({TWICE}))


# Two relays are killed while all of their connections stand between dot and reply: what they were sending is accepted.
KILLED_AT_THE_DOT = (("kill", 0.3, 0, 0.0, 0.5), ("kill", 1.5, 1, 0.0, 0.5))
AT_THE_DOT = "--servers 2 --recipients 60 --minutes 0.05 --dot 0.4"

# The statement that commits a mark, as `tick` has it.
MARKED = TICK.partition("), marked AS (\n")[2].partition("), trail AS (")[0]

SCENES = {
    "the mark": Scene(
        (
            (
                "relay/tick.py",
                MARKED,
                """    SELECT email, attempt + 1 AS attempt, false AS late FROM outbox.delivery
     WHERE email = ANY ($10::bigint[]) AND relay = $9 AND state = 'pending'
""",
            ),
            ("relay/verdicts.py", "marked=tried.marked, outcome", "marked=False, outcome"),
        ),
        KILLED_AT_THE_DOT,
        AT_THE_DOT,
    ),
    "the sweep": Scene(
        (
            (
                "relay/sweep.py",
                "WHERE d.email = h.email AND d.state = 'pending'\n    RETURNING d.email, attempt, state, orphaned",
                "WHERE d.email = h.email\n    RETURNING d.email, attempt, state, orphaned",
            ),
            ("relay/sweep.py", "WHERE d.email = h.email AND d.state = 'sending'\n", "WHERE false\n"),
        ),
        KILLED_AT_THE_DOT,
        AT_THE_DOT,
    ),
    # A relay sleeps while its marks wait for a lock; they are committed, its lease ends, and a person sees that nothing
    # arrived and has it sent again. When it wakes up, the answer to its marks lies in its socket. (Server 0 is whole.)
    "the guard": Scene(
        (
            (
                "relay/marks.py",
                "elif is_too_late():",
                "elif False:",
            ),
            (
                "relay/connections.py",
                "            if connection.current is not None and connection.awaiting_reply is None:\n",
                "            if False:\n",
            ),
            (
                "relay/session_keeper.py",
                "call_later(silent_s, session.lose, reason)",
                "call_later(99, session.lose, reason)",
            ),
        ),
        (("pause-at-mark", 0.5, 1, 8.0, 0.5),),
        f"--servers 2 --recipients 150 --minutes 0.02 --dot 0.1 --resolve-after 0.3 --package {HOUSE}",
    ),
    # All sessions end. A relay that goes on with what its former session claimed, and whose mark asks nobody's leave,
    # sends what others have claimed by then.
    "the fence": Scene(
        (
            ("relay/tick.py", "AND relay = $9 AND state = 'pending'\n    RETURNING", "RETURNING"),
            (
                "relay/session_keeper.py",
                "return session is not None and session.lost is None and relay == session.relay",
                "return True",
            ),
            (
                "relay/parts.py",
                "        self.pool.drop_session()\n",
                "",
            ),
            (
                "relay/connections.py",
                "            if connection.current is not None and connection.awaiting_reply is None:\n",
                "            if False:\n",
            ),
        ),
        (("terminate", 0.5, 0, 0.0, 0.5), ("terminate", 1.5, 0, 0.0, 0.5), ("terminate", 2.5, 0, 0.0, 0.5)),
        "--servers 2 --recipients 120 --minutes 0.07 --dot 0.1",
    ),
}


def broken(directory: Path, patches: tuple[tuple[str, str, str], ...]) -> Path:
    """A copy of the package with these replacements; what is to be replaced must be there, once."""
    shutil.copytree(HOUSE / "outbox", directory / "outbox", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HOUSE / "schema.sql", directory)
    for name, old, new in patches:
        path = directory / "outbox" / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name} has changed: {old}"
        path.write_text(text.replace(old, new))
    return directory


async def faults(out: Path, *arguments: str) -> tuple[int, str, dict]:
    """Run `python -m bench faults`; gives its exit code, what it says and its verdict."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench", "faults", "--out", str(out), *arguments,
        cwd=HOUSE, env=process_env(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said = (await process.communicate())[0].decode()
    return process.returncode, said, verdict_of(out)


def verdict_of(out: Path) -> dict:
    (path,) = out.rglob("verdict.json")
    return json.loads(path.read_text())


def scheduled(path: Path, scene: Scene) -> list[str]:
    strikes = [Strike(number, *strike) for number, strike in enumerate(scene.strikes)]
    path.write_text(json.dumps({"schedule": [strike.as_row() for strike in strikes]}))
    return [*scene.arguments.split(), "--schedule", str(path)]


@pytest.mark.parametrize(
    "scene",
    [
        pytest.param(scene, id=pillar, marks=pytest.mark.slow if pillar == "the fence" else [])  # a minute to its bound
        for pillar, scene in SCENES.items()
    ],
)
async def test_the_checker_catches_a_relay_without_one_of_its_pillars(tmp_path, scene):
    package = broken(tmp_path / "broken", scene.patches)
    for turn in range(3):  # on a busy machine the fault may find nobody at work
        code, said, verdict = await faults(
            tmp_path / f"out{turn}", *scheduled(tmp_path / "schedule", scene), "--package", str(package)
        )
        if not verdict["kept"]:
            break
    assert (code, verdict["kept"]) == (1, False), said
    assert scene.laws <= {violation["law"] for violation in verdict["violations"]}, said
    assert f"again: {verdict['replay']}" in said
    assert f"--package {package}" in verdict["replay"]


@pytest.mark.slow
@pytest.mark.parametrize("pillar", ["the mark", "the guard", "the fence"])
async def test_a_relay_with_all_of_its_pillars_survives_the_same(tmp_path, pillar):
    code, said, verdict = await faults(tmp_path / "out", *scheduled(tmp_path / "schedule", SCENES[pillar]))
    assert (code, verdict["violations"]) == (0, []), said


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
async def test_under_mixed_faults_nothing_is_lost_and_nothing_is_sent_twice(tmp_path, seed):
    arguments = "--servers 3 --recipients 300 --minutes 0.12 --every 0.8"
    code, said, verdict = await faults(tmp_path, "--seed", str(seed), *arguments.split())
    assert (code, verdict["violations"]) == (0, []), said
    assert verdict["tracebacks"] == {}
    counted = verdict["figures"]
    assert counted["accepted"] + counted["in_doubt_not_accepted"] + counted["dead"] == 300
    assert counted["settled_s"] <= counted["settled_bound_s"]
    assert len(verdict["schedule"]) >= 5
    assert all(strike["ended_at"] >= strike["began_at"] > 0 for strike in verdict["schedule"])


async def test_a_fault_that_nobody_knows_is_said_and_nothing_is_started(tmp_path):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench", "faults", "--out", str(tmp_path / "out"), "--faults", "kill,flood",
        cwd=HOUSE, env=process_env(), stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    said = (await process.communicate())[1].decode()
    assert process.returncode == 2
    assert "'flood' is no fault" in " ".join(said.split())
    assert not (tmp_path / "out").exists()

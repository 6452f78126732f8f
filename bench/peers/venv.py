"""The peers' venv, .venv-peers, made from requirements.txt at the first run; a peer that cannot be installed is named.

scripts/lock makes requirements.txt from requirements.in: exact versions, and the hash of every file.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from rich.console import Console

from bench.harness.environment import HOUSE
from bench.peers.entrants import Peer

REQUIREMENTS: Final = Path(__file__).parent / "requirements.txt"
BUILD: Final = HOUSE / "scripts" / "constraints-build.txt"
VENV: Final = HOUSE / ".venv-peers"
PYTHON: Final = VENV / "bin" / "python"
_STAMP: Final = VENV / ".made-for"


def versions() -> dict[str, str]:
    """Return the locked version of each distribution, by its normalised name (PEP 503)."""
    return dict(re.findall(r"(?m)^([a-z0-9-]+)==([^ ;]+)", REQUIREMENTS.read_text()))


def install(peers: list[Peer], console: Console) -> list[Peer]:
    """Install the peers that are available; return a sentence about each other one."""
    if not _STAMP.exists() or _STAMP.read_text() != REQUIREMENTS.read_text():
        console.print(f"Setting up {VENV.name} …", style="dim")
        _make(peers)
    missing = [peer for peer in peers if not _has(peer)]
    for peer in missing:
        console.print(
            f"{peer.name} is skipped: its packages ({', '.join(peer.requirements)}) could not be installed.",
            markup=False,
        )
    return [peer for peer in peers if peer not in missing]


def _make(peers: list[Peer]) -> None:
    """Install all at once; if that fails, each peer by itself, and all again at the next run.

    The locked pip comes first: older ones take no hashes from a file of constraints.
    """
    subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
    _pip("-r", str(BUILD))
    if _pip("-r", str(REQUIREMENTS)):
        _STAMP.write_text(REQUIREMENTS.read_text())
        return
    _pip("-c", str(REQUIREMENTS), "aiosmtplib", "uvloop")
    for peer in peers:
        _pip("-c", str(REQUIREMENTS), *peer.requirements)


def _pip(*arguments: str) -> bool:
    quiet = ["--disable-pip-version-check", "--quiet", "--require-hashes", "--no-build-isolation"]
    return subprocess.run([PYTHON, "-m", "pip", "install", *quiet, *arguments], check=False).returncode == 0


def _has(peer: Peer) -> bool:
    needs = (*peer.imports, "aiosmtplib", "uvloop")
    look = "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))"
    return subprocess.run([PYTHON, "-c", look, *needs], check=False).returncode == 0

"""The peers' venv, .venv-peers, made from requirements.txt at the first run; whoever cannot be had is told of."""

import subprocess
import sys
from pathlib import Path
from typing import Final

from rich.console import Console

from bench.peers.field import Peer
from bench.world import HOUSE

REQUIREMENTS: Final = Path(__file__).parent / "requirements.txt"
VENV: Final = HOUSE / ".venv-peers"
PYTHON: Final = VENV / "bin" / "python"
_STAMP: Final = VENV / ".made-for"


def versions() -> dict[str, str]:
    """What is pinned."""
    lines = (line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#"))
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def install(peers: list[Peer], console: Console) -> list[Peer]:
    """Those of the peers that can be had; a sentence about each other one."""
    if not _STAMP.exists() or _STAMP.read_text() != REQUIREMENTS.read_text():
        console.print(f"Setting up {VENV.name} …", style="dim")
        _make(peers)
    missing = [peer for peer in peers if not _has(peer)]
    for peer in missing:
        console.print(f"{peer.name} is skipped: its packages ({', '.join(peer.requirements)}) could not be installed.")
    return [peer for peer in peers if peer not in missing]


def _make(peers: list[Peer]) -> None:
    """All that is pinned at once; if that cannot be, each peer by itself."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
    if _pip("-r", str(REQUIREMENTS)):
        _STAMP.write_text(REQUIREMENTS.read_text())
        return
    _pip("-c", str(REQUIREMENTS), "aiosmtplib", "uvloop")
    for peer in peers:
        _pip("-c", str(REQUIREMENTS), *peer.requirements)


def _pip(*arguments: str) -> bool:
    quiet = ["--disable-pip-version-check", "--quiet"]
    return subprocess.run([PYTHON, "-m", "pip", "install", *quiet, *arguments], check=False).returncode == 0


def _has(peer: Peer) -> bool:
    needs = (*peer.imports, "aiosmtplib", "uvloop")
    look = "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))"
    return subprocess.run([PYTHON, "-c", look, *needs], check=False).returncode == 0

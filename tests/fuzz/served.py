"""A real command that listens, and raw bytes for it over a real socket."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fuzz.harness import CPU_MAX_S

ANSWER_MAX_S = 20.0  # to answer or to hang up, once the client has said that it says no more
ANSWER_MAX = 8_000_000
ANSWER_EACH_MAX = 10_000  # bytes of the answer to one of many pipelined requests
CPU_EACH_S = 0.005
SILENT_S = 0.1  # some servers drop what they are about to answer when the client has said that it says no more
START_MAX_S = 30.0


class Served:
    """One `outbox` process that answers over HTTP; `secrets` must never be in its log."""

    def __init__(self, process: subprocess.Popen[str], secrets: list[str]) -> None:
        self.process = process
        self.secrets = secrets
        self.log: list[str] = []
        self.address = ("", 0)
        self._said = threading.Condition()
        self._judged = 0  # lines of the log that were looked at
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._said:
                self.log.append(line)
                self._said.notify_all()

    def end(self) -> None:
        """Kill it; nothing of it stays."""
        self.process.kill()
        self.process.wait()
        self._listener.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def wait_until_it_listens(self, event: str) -> None:
        """Wait for the line of its log that says where."""
        with self._said:
            listens = self._said.wait_for(lambda: any(event in line for line in self.log), START_MAX_S)
        assert listens, "".join(self.log)
        (line,) = [line for line in self.log if event in line]
        host, _, port = re.split(r"[/\s]", str(json.loads(line)["place"]))[0].rpartition(":")
        self.address = (host, int(port))

    def cpu_s(self) -> float:
        """CPU time of the process so far; 0 where /proc does not say it."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ask(self, request: bytes, *, silent_s: float = SILENT_S) -> bytes:
        """Send the bytes, and return all that comes back; after so much silence say that there are no more.

        The server must end the connection in time, spend little CPU on it, live on, and log none of its secrets.
        """
        cpu_s, answer = self.cpu_s(), b""
        requests = max(request.count(b" HTTP/"), 1)  # pipelined ones are answered one by one
        ends = time.monotonic() + ANSWER_MAX_S
        with socket.create_connection(self.address, timeout=ANSWER_MAX_S) as client:
            try:
                client.sendall(request)
                client.settimeout(silent_s)
                while (chunk := _heard(client)) != b"":
                    answer += chunk or b""
                    assert len(answer) < ANSWER_MAX + requests * ANSWER_EACH_MAX, "the answer does not end"
                    assert time.monotonic() < ends, f"no end of the answer within {ANSWER_MAX_S:g} s"
            except TimeoutError:
                raise AssertionError(f"neither an answer nor an end within {ANSWER_MAX_S:g} s") from None
            except OSError:
                pass  # it hung up before it had read all: its right
        assert self.process.poll() is None, f"the process ended: {''.join(self.log[-20:])}"
        spent = self.cpu_s() - cpu_s
        assert spent < CPU_MAX_S + requests * CPU_EACH_S, f"the server took {spent:.1f} s of CPU time"
        new = "".join(self.log[self._judged :])
        self._judged = len(self.log)
        assert not any(secret in new for secret in self.secrets), "a secret is in the log"
        assert "Traceback" not in new, new
        return answer


def _heard(client: socket.socket) -> bytes | None:
    """Return the next bytes; b"" if the server has hung up; None after a silence, with our side shut down."""
    try:
        return client.recv(65_536)
    except TimeoutError:
        if client.gettimeout() == ANSWER_MAX_S:
            raise
    client.settimeout(ANSWER_MAX_S)
    client.shutdown(socket.SHUT_WR)
    return None


@contextmanager
def served(*arguments: str, settings: str, event: str, secrets: list[str]) -> Iterator[Served]:
    """Start the command with these settings, and end it at the end."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "outbox.toml")
        path.write_text(settings)
        path.chmod(0o600)
        command = [sys.executable, "-m", "outbox", *arguments, "--config", str(path)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        )
        server = Served(process, secrets)
        try:
            server.wait_until_it_listens(event)
            yield server
        finally:
            server.end()


_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5]\d\d) [ -~]*")
_FIELD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[ \t]?[\t -~\x80-\xff]*")


def heads(answer: bytes) -> list[tuple[int, bytes]]:
    """The status and head of the first answer (several, if requests were pipelined, are not told apart further)."""
    if not answer:
        return []
    head, _, _ = answer.partition(b"\r\n\r\n")
    first, *fields = head.split(b"\r\n")
    status = _STATUS.fullmatch(first)
    assert status, first[:200]
    for field in fields:
        assert _FIELD.fullmatch(field), field[:200]
    return [(int(status[1]), head)]

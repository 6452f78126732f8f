import json
import os
import signal
import smtplib
import subprocess
import sys
from pathlib import Path

import pytest

import outbox
from tests.support.sink_client import DEADLINE_S, MESSAGE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_program_journals_and_counts(tmp_path: Path, number: signal.Signals):
    journal = tmp_path / "journal"
    command = [sys.executable, "-m", "outbox.sandbox.smtp_sink", "--journal", str(journal), "--no-pipelining"]
    root = Path(outbox.__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, env=os.environ) as program:
        assert program.stdout is not None
        word, _, address = program.stdout.readline().decode().strip().partition(" ")
        assert word == "listening"
        host, port = address.split(":")
        with smtplib.SMTP(host, int(port), timeout=DEADLINE_S) as client:
            client.ehlo()
            assert not client.has_extn("pipelining")
            peer_port = client.sock.getsockname()[1]
            for recipients in (["b@example.com", "c@example.com"], ["b@example.com"]):
                client.sendmail("a@example.com", recipients, MESSAGE)
        program.send_signal(number)
        counts = json.loads(program.stdout.read())
    assert program.returncode == 0
    assert counts == {"accepted": 2, "addresses": 2, "duplicates": 1}
    lines = [line.split("\t") for line in journal.read_text().splitlines()]
    assert [line[1:] for line in lines] == [
        [str(peer_port), recipient, "<1@example.com>"]
        for recipient in ("b@example.com", "c@example.com", "b@example.com")
    ]

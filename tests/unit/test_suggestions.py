"""Commands that are suggested to people, read by real shells."""

import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox.suggestions import command, option

EVIL = [
    "plain/2026-W48/1",
    "-x",
    "--help",
    "--",
    "two words",
    " ",
    "it's",
    '"quoted"',
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned",
    "a\nb",
    "-a\n\n",
    "\n",
    "a\n--resend",
    "back\\slash\\n\\0101\\c",
    "100%s%n",
    "*",
    "~",
    "!!",
    "#comment",
    "é ü 日本",
    "tab\tand \x1b[31mred\x07",
    "\u202eright to left",
    "\x7f\x80\u2028",
]
SHELLS = [shell for shell in ("sh", "bash", "dash", "zsh", "ksh") if shutil.which(shell)]


def words_of(line, shell, tmp_path):
    """Return the arguments that a program called `outbox` would get."""
    (tmp_path / "outbox").write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    (tmp_path / "outbox").chmod(0o755)
    ran = subprocess.run(
        [shell, "-c", line], capture_output=True, cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True
    )
    assert not (tmp_path / "pwned").exists()
    assert ran.stderr == b""
    return ran.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("key", EVIL)
def test_a_shell_reads_a_suggested_command_as_it_is_meant(key, shell, tmp_path):
    line = command("resolve", keys=[key, "other"], after=["--sent"])
    assert line.isprintable()
    words = words_of(line, shell, tmp_path)
    if key.startswith("-"):
        assert words == ["resolve", "--sent", "--", key, "other"]
    else:
        assert words == ["resolve", key, "other", "--sent"]


@pytest.mark.parametrize("value", [value for value in EVIL if not value.endswith("\n")])
def test_a_shell_reads_a_suggested_option_as_it_is_meant(value, tmp_path):
    words = words_of(command("list", option("--to", value)), "sh", tmp_path)
    assert words == (["list", f"--to={value}"] if value.startswith("-") else ["list", "--to", value])


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20))
def test_any_key_is_one_word_of_a_shell(tmp_path_factory, key):
    line = command("show", keys=[key])
    assert line.isprintable()
    words = words_of(line, "sh", tmp_path_factory.getbasetemp())
    assert words == ["show", *(["--"] if key.startswith("-") else []), key]


def test_a_plain_key_is_shown_plainly():
    assert command("retry", keys=["progress/2026-W48/1"]) == "outbox retry progress/2026-W48/1"
    assert command("suppress", "--remove", keys=["a@b.example"]) == "outbox suppress --remove a@b.example"

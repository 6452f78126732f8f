"""The pages of docs/ begin with an example that works.

The first block marked `console` of each page is run line by line, as a reader would type it, in a directory with
settings, three people, an empty database and a mail server. What is printed must be what the page shows; `…` stands
for anything, within a line or, alone on one, for any lines. Programs that a page shows before it lie in that directory.
"""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
WITHOUT = {"architecture.md", "decisions.md", "measured.md", "scale.md"}  # nothing to type
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path.name not in WITHOUT)


def example(page):
    """The commands of a page's first console block, each with the output that is shown."""
    text = (DOCS / page).read_text()
    block = re.search(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert block, f"docs/{page} opens with no example"
    assert text[: block.start()].count("\n## ") == 0, f"docs/{page} has sections before its example"
    steps = []
    for line in block[1].splitlines():
        if line.startswith("$ "):
            steps.append((line[2:], []))
        else:
            steps[-1][1].append(line)
    return steps


def files(page):
    """The programs that a page shows before its example, each in a block that begins with its name as a comment."""
    before = (DOCS / page).read_text().partition("```console\n")[0]
    return re.findall(r"^```\w+\n(?:#|--|//) (\S+\.\w+)\n(.*?)^```$", before, re.MULTILINE | re.DOTALL)


def all_files(page):
    """Every file that a page shows, by its name."""
    text = (DOCS / page).read_text()
    return dict(re.findall(r"^```\w+\n(?:#|\{#) (\S+\.\w+)(?: #\})?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def as_pattern(shown):
    parts = [
        "(?:.*\n)*" if line.strip() == "…" else ".*".join(map(re.escape, line.split("…"))) + "\n" for line in shown
    ]
    return re.compile("".join(parts) + r"\s*")


@pytest.mark.parametrize("page", PAGES)
async def test_a_page_opens_with_an_example_that_works(fleet, page):
    await fleet.hire(3)
    fleet.write_settings()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for name, program in files(page):
        (fleet.directory / name).write_text(program)
    for command, shown in example(page):
        process = await asyncio.create_subprocess_exec(
            "bash", "-c", command,
            cwd=fleet.directory,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(60):
            printed, _ = await process.communicate()
        said = re.sub(r"[ \t]+$", "", printed.decode(), flags=re.MULTILINE).rstrip("\n") + "\n"
        assert as_pattern(shown).fullmatch(said), f"$ {command}\n{said}"


def test_every_recipe_of_the_cookbook_works(tmp_path):
    shown = all_files("cookbook.md")
    for name, program in shown.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(program)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:asyncio", "-p", "no:cacheprovider"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    recipes = sum(program.count("def test_") for program in shown.values())
    assert f"{recipes} passed" in ended.stdout

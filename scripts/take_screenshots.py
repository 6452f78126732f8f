"""Take the pictures of the documentation. Started by scripts/screenshots.

They are docs/email.png, docs/report.png and docs/board.png.
A report and its email are shown as `outbox preview` renders them from rows, and the operators' board as `outbox web`
serves it, all in headless Chromium.
"""

import asyncio
import contextlib
import html
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import asyncpg
from PIL import Image, ImageChops

from outbox.database.locks import RELAY_LOCKS
from outbox.database.schema import initialise
from outbox.sandbox.postgres import postgres

BOARD_ADDRESS: Final = "127.0.0.1:18025"
BOARD_OPEN_S: Final = 12
"""Time after which the board is photographed, so that its throughput shows some history."""
PERIOD: Final = "2026-W47"
MARGIN_PX: Final = 42
SETTINGS: Final = """
database_url = "{database}"
sender = "Progress reports <reports@example.com>"
[reports.progress]
timezone = "America/New_York"
recipients = "select id::text as key, email, name, locale from people order by id"
data = '''select day, done, minutes from progress
           where person_id = cast(:key as int) and day >= :starts_at and day < :ends_at order by day'''
link = "https://reports.example.com/r/{{token}}"
unsubscribe = "https://reports.example.com/unsubscribe/{{token}}"
[reports.fortschritt]
title = "Fortschritt"
timezone = "Europe/Berlin"
recipients = "select id::text as key, email, name, locale from people order by id"
data = '''select day as tag, done as erledigt from progress
           where person_id = cast(:key as int) and day >= :starts_at and day < :ends_at order by day'''
link = "https://reports.example.com/r/{{token}}"
"""
ROWS: Final = """
CREATE TABLE people (id int PRIMARY KEY, email text, name text, locale text);
CREATE TABLE progress (person_id int, day date, done int, minutes int);
INSERT INTO people VALUES (1, 'ada@example.com', 'Ada', 'en'), (2, 'emmy@example.com', 'Emmy', 'de');
INSERT INTO progress SELECT p, date '2026-11-16' + d, done, done * 17 + d
  FROM generate_series(1, 2) p, unnest(ARRAY[9, 14, 6, 17, 11, 3, 1]) WITH ORDINALITY AS n (done, at),
       LATERAL (SELECT at::int - 1 AS d) AS day;
"""
# A Monday of three editions: the newest is being sent, one email is in doubt, two that were refused are dead letters.
OUTBOX: Final = """
INSERT INTO outbox.edition (report, period, starts_at, ends_at, expected, completed_at)
SELECT 'progress', '2026-W' || 43 + n, date '2026-10-19' + 7 * n, date '2026-10-26' + 7 * n, 1200,
       CASE WHEN n < 4 THEN now() - (4 - n) * interval '7 days' END FROM generate_series(2, 4) n;
INSERT INTO outbox.report (edition, recipient_key, token, title, html)
SELECT e, n, e || '-' || n, 'Progress', 'h' FROM generate_series(1, 3) e, generate_series(1, 1200) n ORDER BY e, n;
INSERT INTO outbox.email (key, report, sender, recipient, message_id, message)
SELECT 'progress/' || period || '/' || recipient_key, r.id, 'reports@example.com',
       (ARRAY['ada', 'emmy', 'grace', 'hedy', 'mary', 'rosa'])[1 + r.id % 6] || r.id || '@example.com',
       '<' || r.id || '@example.com>', 'Subject: Progress'
  FROM outbox.report r JOIN outbox.edition e ON e.id = r.edition ORDER BY r.id;
INSERT INTO outbox.delivery (email, state, attempt, relay, marked_at, settled_at, doubted_at, due_at)
SELECT id, state, (state <> 'pending')::int, CASE WHEN state <> 'pending' THEN 1 + id % 3 END,
       CASE WHEN state <> 'pending' THEN now() END,
       CASE WHEN state NOT IN ('pending', 'in_doubt') THEN now() - interval '54 minutes'
            * (1 - power(greatest(id - 2400, 0) / 1200.0, 0.7)) - (id <= 2400)::int * interval '8 days' END,
       CASE WHEN state = 'in_doubt' THEN now() END,
       CASE WHEN state = 'in_doubt' THEN 'infinity' ELSE now() - interval '40 seconds' END
  FROM (SELECT id, CASE WHEN id = 3000 THEN 'in_doubt' WHEN id IN (417, 2807) THEN 'dead' WHEN id <= 3420 THEN 'sent'
                        ELSE 'pending' END AS state FROM outbox.email) e;
INSERT INTO outbox.attempt (email, attempt, relay, verdict, reply)
SELECT email, 1, relay, CASE state WHEN 'sent' THEN 'accepted' WHEN 'dead' THEN 'refused' ELSE state END,
       CASE state WHEN 'sent' THEN '250 2.0.0 Ok: queued' WHEN 'dead' THEN '550 5.1.1 no such user'
                  ELSE 'the connection was lost before a reply to the message' END
  FROM outbox.delivery WHERE state <> 'pending';
INSERT INTO outbox.relay (host, pid, backend_pid, version, started_at, sent, last_reply)
SELECT 'mail' || n, 4700 + n, pg_backend_pid(), '0.1.0', now() - interval '3 days', 3000 + 61 * n,
       '250 2.0.0 Ok: queued' FROM generate_series(1, 3) n;
"""
FRAMES: Final = """<!DOCTYPE html><meta charset="utf-8"><style>
body { margin: 0; padding: 28px; background: #d5dbe4; display: inline-flex; gap: 28px; align-items: flex-start; }
iframe { border: 0; border-radius: 18px; box-shadow: 0 6px 24px rgb(20 23 28 / .22); }
</style>%s<script>
onload = () => document.querySelectorAll('iframe').forEach((frame) => {
  frame.style.height = Math.min(frame.contentDocument.documentElement.scrollHeight, 1320) + 'px'
})
</script>"""


def frame(directory: Path, name: str, width: int, *, dark: bool = False) -> str:
    """Return an iframe of that width with one of the previewed files, on request in dark mode."""
    page = (directory / name).read_text()
    if dark:
        page = page.replace("(prefers-color-scheme: dark)", "(min-width: 1px)")
    return f'<iframe width="{width}" srcdoc="{html.escape(page)}"></iframe>'


class Camera:
    """Headless Chromium that takes pictures of frames."""

    def __init__(self, chromium: str, directory: Path) -> None:
        self._chromium = chromium
        self._directory = directory

    def take(self, frames: list[str], width: int, picture: Path, *, colours: int = 128) -> None:
        """Write one picture of all frames side by side, cut where the last of them ends."""
        page, shot = self._directory / "frames.html", self._directory / "shot.png"
        page.write_text(FRAMES % "".join(frames))
        command = [
            self._chromium,
            "--headless",
            "--disable-gpu",
            "--hide-scrollbars",
            "--force-device-scale-factor=1.5",
        ]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []
        command += [f"--user-data-dir={self._directory / 'profile'}", f"--window-size={width},1400"]
        subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], check=True, stderr=subprocess.DEVNULL)
        image = crop(Image.open(shot).convert("RGB"))
        image.quantize(colours, dither=Image.Dither.NONE).save(picture, optimize=True)
        sys.stdout.write(f"{picture}: {image.width} x {image.height}, {picture.stat().st_size // 1024} kB\n")


def crop(image: Image.Image) -> Image.Image:
    """Return the image without the empty ground right of and below the frames, but for a margin."""
    ground = Image.new("RGB", image.size, image.getpixel((0, 0)))
    shadows_too = ImageChops.difference(image, ground).point([255 * (level > 12) for level in range(256)] * 3)  # noqa: PLR2004
    _, _, right, bottom = shadows_too.getbbox() or (0, 0, *image.size)
    return image.crop((0, 0, min(right + MARGIN_PX, image.width), min(bottom + MARGIN_PX, image.height)))


def preview(directory: Path, report: str, key: str) -> Path:
    """Write the files of `outbox preview` and return their directory."""
    out = directory / f"{report}-{key}"
    subprocess.run(
        [".venv/bin/outbox", "preview", report, "--for", key, "--period", PERIOD, "--out", out, "--no-open"],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OUTBOX_CONFIG": str(directory / "outbox.toml")},
    )
    return out


async def send_slowly(connection: asyncpg.Connection) -> None:
    """Act as three relays: hold their locks, and report now and then how much they have sent."""
    for relay in (1, 2, 3):
        await connection.execute("SELECT pg_advisory_lock($1::int, $2::int)", RELAY_LOCKS, relay)
    while True:
        await asyncio.sleep(0.5)
        await connection.execute("UPDATE outbox.relay SET sent = sent + id")


@contextlib.contextmanager
def board(directory: Path) -> Iterator[str]:
    """Run `outbox web` and yield the link with which its operator signs in."""
    server = subprocess.Popen(
        [".venv/bin/outbox", "web", "--http", BOARD_ADDRESS, "--config", str(directory / "outbox.toml")],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    try:
        link = None
        while link is None:  # printed with the first line
            link = re.search(r"http://\S+token=[\w-]+", server.stderr.readline())
        yield link[0]
    finally:
        server.terminate()
        server.wait()


def watch_board(link: str) -> str:
    """Sign in, look at the board for `BOARD_OPEN_S`, and return its last page."""
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    address, page, ends_at = link, "", time.monotonic() + BOARD_OPEN_S
    while time.monotonic() < ends_at:
        time.sleep(0.5)
        with contextlib.suppress(OSError):  # it does not listen yet
            page = browser.open(address).read().decode()
            address = f"http://{BOARD_ADDRESS}/"  # signed in by the cookie from now on
    return page


async def board_frames(directory: Path, url: str) -> list[str]:
    """Return the board in a window, and on a phone in dark mode."""
    connection = await asyncpg.connect(url)
    await initialise(connection)
    await connection.execute(OUTBOX)
    await connection.execute("VACUUM ANALYZE")
    relays = asyncio.create_task(send_slowly(connection))

    def visit() -> str:
        with board(directory) as link:
            return watch_board(link)

    page = await asyncio.to_thread(visit)
    relays.cancel()
    head, _, rest = page.partition("<script")
    (directory / "board-page.html").write_text(head + rest.partition("</script>")[2])
    return [frame(directory, "board-page.html", 1180), frame(directory, "board-page.html", 380, dark=True)]


async def fill(url: str) -> None:
    """Create the tables from which the reports are made."""
    connection = await asyncpg.connect(url)
    await connection.execute(ROWS)
    await connection.close()


def main() -> None:
    """Take all pictures with the Chromium that is the first argument."""
    with tempfile.TemporaryDirectory(prefix="outbox-") as name, postgres() as server:
        directory = Path(name)
        camera = Camera(sys.argv[1], directory)
        asyncio.run(fill(server.url))
        (directory / "outbox.toml").write_text(SETTINGS.format(database=server.url))
        english, german = preview(directory, "progress", "1"), preview(directory, "fortschritt", "2")
        emails = [
            frame(english, "email.html", 640),
            frame(english, "email.html", 360, dark=True),
            frame(german, "email.html", 360),
        ]
        camera.take(emails, 1560, Path("docs/email.png"))
        pages = [frame(english, "report.html", 900), frame(english, "report.html", 360, dark=True)]
        camera.take(pages, 1400, Path("docs/report.png"))
        boards = asyncio.run(board_frames(directory, server.url))
        camera.take(boards, 1700, Path("docs/board.png"), colours=256)


if __name__ == "__main__":
    main()

"""Cost of making reports: against a bare loop without a database, with more processes, trivial, and very many."""

import asyncio
import os
import time
from email.message import EmailMessage
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from email.policy import SMTP
from typing import Any, Final

from bench.harness.environment import Environment, median, open_environment
from bench.harness.figures import Spread, Target, keep, show
from bench.harness.render_baseline import SENDER, STARTS_AT
from outbox.mail import message
from outbox.mail.mailbox import Mailbox
from outbox.reports.render import PACKAGED

# A report that was rendered elsewhere: the template only hands it on.
TRIVIAL: Final = {
    "subject.txt.j2": "Your week",
    "email.txt.j2": "Done: {{ rows[0].done }}. {{ link }}",
    "email.html.j2": "<p>Done: {{ rows[0].done }}. <a href='{{ link }}'>Read</a>",
    "report.html.j2": "<p>Done: {{ rows[0].done }}",
}
TRIVIAL_DATA: Final = "select key, 1 as done from unnest(cast(:keys as text[])) as n (key)"
RSS_LOOK_S: Final = 0.05
GENERATE: Final = "outbox generate"
BARE: Final = "bare loop without a database"


async def measure(url: str, *, recipients: int, many: int, runs: int) -> None:
    """Alternate all of them; a table and bench/results/generate.json."""
    found: dict[str, list[dict[str, float]]] = {}
    async with open_environment(url, connections=1) as environment:
        for number in range(runs):
            for who, one in (
                (GENERATE, await _generate(environment, recipients)),
                (BARE, await _bare(environment, recipients)),
                (f"{GENERATE}, 4 processes", await _generate(environment, recipients, processes=4)),
                ("trivial report", await _generate(environment, 5 * recipients, trivial=True)),
                (
                    "trivial report, 2 processes",
                    await _generate(environment, 5 * recipients, trivial=True, processes=2),
                ),
                *_mimes().items(),
            ):
                found.setdefault(who, []).append(one)
            print(f"run {number + 1} of {runs}")
        if many:
            for count in (many // 100, many):
                found[f"trivial report, {count:,} recipients"] = [await _generate(environment, count, trivial=True)]
    _report(found, recipients)


def _report(found: dict[str, list[dict[str, float]]], recipients: int) -> None:
    rates = {who: Spread.of([one["per_s"] for one in measured]) for who, measured in found.items()}
    show(
        f"making reports for {recipients:,} recipients",
        ("what", "per s", "CPU µs each", "peak RSS MB"),
        [
            (who, rates[who].text(",.0f"),
             *(f"{median([one.get(what, 0.0) for one in measured]):,.0f}" for what in ("cpu_us", "rss_mb")))
            for who, measured in found.items()
        ],
    )  # fmt: skip

    def target(what: str, one: str, other: str, least: float) -> Target:
        return Target(what, rates[one].median / rates[other].median, least, "times", at_least=True)

    targets = [
        target("generate against a bare loop", GENERATE, BARE, 0.7),
        target("generate: 4 processes against one", f"{GENERATE}, 4 processes", GENERATE, 1.7),
        target("building a message against EmailMessage", "message.build", "EmailMessage", 3),
        Target(
            "a trivial report, 2 processes", rates["trivial report, 2 processes"].median, 10_000, "/s", at_least=True
        ),
    ]
    keep("generate", {"recipients": recipients, "found": found}, targets)


async def _generate(
    environment: Environment, recipients: int, *, processes: int = 1, trivial: bool = False
) -> dict[str, float]:
    """Measure from the edition's row to the last report's: start-up and imports do not count."""
    await environment.reset(0 if trivial else recipients)
    settings = environment.directory / "outbox.toml"
    if trivial:
        templates = environment.directory / "templates" / "progress"
        templates.mkdir(parents=True, exist_ok=True)
        for name, text in TRIVIAL.items():
            (templates / name).write_text(text)
        query = (
            "select n::text as key, 'p' || n || '@example.com' as email, '' as name"
            f" from generate_series(1, {recipients}) n"
        )
        lines = settings.read_text().split("recipients = ")
        settings.write_text(
            lines[0] + f'recipients = "{query}"\ndata = "{TRIVIAL_DATA}"\nlink = "https://example.com/r/{{token}}"\n'
        )
    else:
        for name in TRIVIAL:
            (environment.directory / "templates" / "progress" / name).unlink(missing_ok=True)
    before = os.times()
    running = [await environment.start("outbox", "generate") for _ in range(processes)]
    watches = [asyncio.create_task(_peak_rss_mb(one.pid)) for one in running]
    for one in running:
        said, _ = await one.communicate()
        assert one.returncode == 0, said.decode() + environment.log_tail()
    after = os.times()
    took_s, made = await environment.connection.fetchrow(
        "SELECT extract(epoch FROM max(r.created_at) - min(e.created_at))::float8, count(*)"
        " FROM outbox.report r JOIN outbox.edition e ON e.id = r.edition"
    )
    assert made == recipients, f"{made} of {recipients} were made"
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return {
        "per_s": recipients / took_s,
        "cpu_us": 1e6 * cpu_s / recipients,
        "rss_mb": max([await watch for watch in watches]),
    }


async def _peak_rss_mb(pid: int) -> float:
    """Return the largest memory that a process had (VmHWM), until it ends."""
    peak = 0.0
    while True:
        try:
            with open(f"/proc/{pid}/status") as status:  # noqa: ASYNC230, PTH123 - a file without a disk
                lines = [line for line in status if line.startswith("VmHWM")]
        except OSError:
            return peak
        if not lines:
            return peak
        peak = int(lines[0].split()[1]) / 1024
        await asyncio.sleep(RSS_LOOK_S)


async def _bare(environment: Environment, count: int) -> dict[str, float]:
    before = os.times()
    process = await environment.start("bench.harness.render_baseline", str(count))
    said, _ = await process.communicate()
    after = os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return {"per_s": count / float(said), "cpu_us": 1e6 * cpu_s / count}


TEXT: Final = "\n".join(f"Mon {day} Nov    {day * 7}" for day in range(1, 15))


def _mimes(count: int = 1000) -> dict[str, dict[str, float]]:
    """Measure the same mail of two parts built by us and by the standard library's two ways."""
    html = (PACKAGED / "email.html.j2").read_text()

    def ours(number: int) -> bytes:
        return message.build(
            sender=SENDER,
            recipient=Mailbox("Ada Lovelace", f"p{number}@example.com"),
            subject="Your progress",
            text=TEXT,
            html=html,
            date=STARTS_AT,
            message_id=f"<{number}@example.com>",
        )

    def modern(number: int) -> bytes:
        mail = EmailMessage(policy=SMTP)
        mail["From"], mail["To"] = "Progress reports <reports@example.com>", f"Ada Lovelace <p{number}@example.com>"
        mail["Subject"], mail["Message-ID"] = "Your progress", f"<{number}@example.com>"
        mail.set_content(TEXT)
        mail.add_alternative(html, subtype="html")
        return mail.as_bytes()

    def old(number: int) -> bytes:
        mail = MIMEMultipart("alternative")
        mail["From"], mail["To"] = "Progress reports <reports@example.com>", f"Ada Lovelace <p{number}@example.com>"
        mail["Subject"], mail["Message-ID"] = "Your progress", f"<{number}@example.com>"
        mail.attach(MIMEText(TEXT, "plain", "utf-8"))
        mail.attach(MIMEText(html, "html", "utf-8"))
        return mail.as_bytes()

    found: dict[str, Any] = {}
    for who, build in (("message.build", ours), ("EmailMessage", modern), ("MIMEText", old)):
        began_at = time.perf_counter()
        for number in range(count):
            build(number)
        took_s = time.perf_counter() - began_at
        found[who] = {"per_s": count / took_s, "cpu_us": 1e6 * took_s / count}
    return found

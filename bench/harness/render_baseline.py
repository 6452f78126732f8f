"""Bare loop that renders the packaged templates and builds the mail for rows in memory: no database.

usage: python -m bench.harness.render_baseline COUNT
"""

import secrets
import sys
import time
from datetime import UTC, datetime, timedelta

from outbox.generate.report_builder import CivilPeriod
from outbox.mail import message
from outbox.mail.mailbox import Mailbox
from outbox.reports.render import Templates

STARTS_AT = datetime(2026, 11, 16, tzinfo=UTC)
PERIOD = CivilPeriod("2026-W47", "16 \N{EN DASH} 22 November 2026", STARTS_AT, STARTS_AT + timedelta(days=7))
SENDER = Mailbox("Progress reports", "reports@example.com")


def main(count: int, templates: Templates) -> float:
    """Return the seconds for so many mails of a week's rows each."""
    rows = [{"day": (STARTS_AT + timedelta(days=day)).date(), "done": day} for day in range(7)]
    size = 0
    began_at = time.perf_counter()
    for number in range(count):
        token = secrets.token_urlsafe(16)
        recipient = {"key": str(number), "email": f"p{number}@example.com", "name": f"Person {number}"}
        rendered = templates.render({
            "report": "progress", "title": "Progress", "period": PERIOD, "recipient": recipient, "rows": rows,
            "columns": ["day", "done"], "link": f"https://reports.example.com/r/{token}", "sender": SENDER.name,
        })  # fmt: skip
        size += len(
            message.build(
                sender=SENDER,
                recipient=Mailbox(recipient["name"], recipient["email"]),
                subject=rendered.subject,
                text=rendered.text,
                html=rendered.html,
                date=STARTS_AT,
                message_id=f"<{number}.{secrets.token_hex(4)}@example.com>",
                list_id="<progress.example.com>",
            )
        )
    assert size
    return time.perf_counter() - began_at


if __name__ == "__main__":
    print(main(int(sys.argv[1]), Templates(None, "progress")))

"""`outbox digest` as cron runs it: many reports, one email per address and period, whoever closes it and how often."""

import asyncio
import re
from email import message_from_bytes, policy

from tests.support.fleet import RECIPIENTS, until

WEEK, NEXT = "2026-W47", "2026-W48"
LINK = re.compile(r"https://reports\.example\.com/r/[\w-]{22}(?![\w-])")

# A second report, whose keys for the same people are others, and whose addresses are spelled otherwise.
TWO = """deliver = "digest"
[reports.sales]
deliver = "digest"
cadence = "daily"
recipients = "select 's' || id as key, replace(email, 'example', 'Example') as email, '' as name from people"
data = "select 1 as sold where :key <> ''"
link = "https://reports.example.com/r/{token}"
[digest]
link = "https://reports.example.com/d/{token}"
"""

ITEMS = """
SELECT i.report, i.link, i.address, m.recipient, m.key FROM outbox.digest_item i
  LEFT JOIN outbox.email m ON m.report = i.digest ORDER BY i.report
"""


async def mails(fleet):
    """What the mail server has, parsed, and each of them with the links in its text."""
    assert set(await fleet.settled()) == {"sent"}
    parsed = [message_from_bytes(mail.message, policy=policy.default) for mail in fleet.sink.accepted]
    return [(mail["To"].addresses[0].addr_spec, texts(mail)) for mail in parsed]


def texts(mail):
    """The links to reports, which both bodies of a mail have."""
    plain, html = (LINK.findall(mail.get_body((kind,)).get_content()) for kind in ("plain", "html"))
    assert plain == html
    return plain


async def told_once(fleet):
    """Gives the items; those that a digest took up are in one email each, the one that the database says."""
    items = await fleet.connection.fetch(ITEMS)
    found = [(address, link) for address, links in await mails(fleet) for link in links]
    assert sorted(found) == sorted((item["address"], item["link"]) for item in items if item["key"])
    assert all(item["recipient"] == item["address"] for item in items if item["key"])
    return items


async def collected(fleet, people):
    fleet.report = TWO
    await fleet.hire(people)
    for name, period in (("progress", WEEK), ("sales", "2026-11-20")):
        ended = await fleet.run("generate", name, "--period", period)
        assert ended.out == f"{name} {period}: {people} made here, 0 elsewhere, 0 failed, of {people} recipients.\n", (
            ended
        )


async def test_three_crons_close_a_digest_once_and_what_is_late_goes_into_the_next(fleet):
    await collected(fleet, 30)
    assert await fleet.states() == {}, "collected reports have no email of their own"
    await fleet.relay()
    crons = await asyncio.gather(*(fleet.start("digest", "--period", WEEK) for _ in range(3)))
    ends = [await cron.ended() for cron in crons]
    assert [(end.code, end.err) for end in ends] == [(0, "")] * 3
    made = [int(re.match(rf"digest {WEEK}: (\d+) made here, ", end.out)[1]) for end in ends]
    assert sum(made) == 30
    items = await told_once(fleet)
    assert len(items) == 60
    assert {address: n for address, n in fleet.sink.addresses.items() if n != 1} == {}
    assert {item["key"] for item in items} == {f"digest/{WEEK}/p{n}@example.com" for n in range(1, 31)}
    audit = await fleet.run("audit", "sales", "2026-11-20")
    assert (audit.code, audit.out.splitlines()[-1]) == (
        0, "All is well: sales 2026-11-20 is sent to all of its 30 recipients.",
    )  # fmt: skip

    # The next day's reports come after the digest; who was not told of anything this week still is.
    assert (await fleet.run("generate", "sales", "--period", "2026-11-21")).code == 0
    await fleet.hire(1, first=31)
    assert (await fleet.run("generate", "progress", "--period", WEEK)).code == 0
    again = await fleet.run("digest", "--period", WEEK)
    assert again.out.splitlines() == [
        f"digest {WEEK}: 1 made here, 30 already made, 0 failed, of 31 recipients.",
        "30 reports wait for the next digest.",
    ]
    assert sum(item["key"] is None for item in await told_once(fleet)) == 30
    later = await fleet.run("digest", "--period", NEXT)
    assert later.out == f"digest {NEXT}: 30 made here, 0 elsewhere, 0 failed, of 30 recipients.\n"
    assert all(item["key"] for item in await told_once(fleet))
    assert len(fleet.sink.accepted) == 61


async def test_a_kill_while_a_digest_is_closed_loses_nothing_and_tells_nothing_twice(fleet):
    """A report's row is locked, so the first closer stands in its transaction when it is killed."""
    await collected(fleet, 8)
    async with fleet.connection.transaction():
        await fleet.connection.execute("SELECT FROM outbox.digest_item WHERE address = 'p3@example.com' FOR UPDATE")
        closer = await fleet.start("digest", "--period", WEEK)

        async def waits():
            return await fleet.connection.fetchval(
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND transactionid = pg_current_xact_id()::xid"
            )

        await until(waits, "the closer waits for the row")
        await closer.kill()
    # Two digests at once, of this week and the next: each report is in one of them.
    crons = await asyncio.gather(*(fleet.start("digest", "--period", period) for period in (WEEK, NEXT, WEEK)))
    ends = [await cron.ended() for cron in crons]
    assert [(end.code, end.err) for end in ends] == [(0, "")] * 3
    await fleet.relay()
    items = await told_once(fleet)
    assert len(items) == 16
    assert all(item["key"] for item in items)
    assert len(fleet.sink.accepted) == await fleet.connection.fetchval("SELECT count(*) FROM outbox.email") == 8
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.report") == 16 + 8


async def test_what_cannot_be_closed_is_said_in_one_sentence(fleet):
    fleet.recipients = RECIPIENTS
    fleet.report = 'deliver = "digest"'
    missing = await fleet.run("generate")
    assert (missing.code, missing.sentences) == (2, [(
        'digest: is missing, but reports.progress has deliver = "digest"; write a table [digest] with a link,'
        ' such as link = "https://reports.example.com/r/{token}".'
    )])  # fmt: skip
    fleet.report = ""
    none = await fleet.run("digest")
    assert (none.code, none.sentences) == (2, [
        "digest: is not set; write a table [digest] with a link in outbox.toml, or set OUTBOX_DIGEST.",
    ])  # fmt: skip
    table = {"OUTBOX_DIGEST": '{link = "https://reports.example.com/d/{token}", timezone = "Asia/Tokyo"}'}
    nobody = await fleet.run("digest", "--period", WEEK, environment=table)
    assert (nobody.code, nobody.out) == (0, f"digest {WEEK}: 0 made here, 0 elsewhere, 0 failed, of 0 recipients.\n")
    table["OUTBOX_DIGEST"] = table["OUTBOX_DIGEST"].replace("Asia/Tokyo", "UTC")
    other = await fleet.run("digest", "--period", WEEK, environment=table)
    assert (other.code, other.sentences) == (2, [(
        "digest: the fleet generates this report with timezone = 'Asia/Tokyo' (here 'UTC'); correct it here,"
        " or run `outbox init --redefine digest` to change it for the fleet."
    )])  # fmt: skip
    twice = await fleet.run("generate", "digest", environment=table)
    assert (twice.code, twice.sentences) == (2, [
        "The digest is closed by `outbox digest`, not by `outbox generate`; run that.",
    ])  # fmt: skip

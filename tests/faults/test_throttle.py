"""Relays and a scripted server that limits the rate in words of its own, defers everybody, or only some."""

import time

import pytest

from outbox.sandbox.smtp_sink import Cut, Reply, Stage
from tests.support.fault_levers import At, all_sent, delivery, post, status, trail
from tests.support.fleet import until

LATER = Reply("451 4.7.0 please come back some time")


class Limited:
    """A script: more than so many messages in a second are refused."""

    def __init__(self, per_s, *, stage=Stage.RCPT, reply=LATER):
        self.per_s, self.stage, self.reply = per_s, stage, reply
        self.began_at = self.count = self.refused = 0

    def __call__(self, stage, _visit):
        if stage is not self.stage:
            return None
        now = time.monotonic()
        if now - self.began_at >= 1:
            self.began_at, self.count = now, 0
        self.count += 1
        if self.count <= self.per_s:
            return None
        self.refused += 1
        return self.reply


async def tries_beyond_the_first(fleet):
    return await fleet.connection.fetchval("SELECT count(*) FROM outbox.delivery WHERE attempt - withdrawn > 1")


@pytest.mark.parametrize("stage", [Stage.RCPT, Stage.DATA, Stage.DOT])
async def test_a_rate_limit_in_words_of_its_own_is_found_by_how_many_are_refused(fleet, stage):
    fleet.sink.script = limited = Limited(40, stage=stage)
    await fleet.put_emails(400)
    for _ in range(2):
        await fleet.relay()
    await all_sent(fleet, 400, 60)
    print(f"{limited.refused} refused")  # noqa: T201
    assert limited.refused <= 60
    assert fleet.twice == {}


async def test_a_relay_obeys_the_rate_that_another_one_has_found(fleet):
    fleet.sink.script = limited = Limited(20)
    await fleet.relay()
    await post(fleet, 40)
    await all_sent(fleet, 40, 30)
    found = await fleet.connection.fetchval("SELECT found_rate FROM outbox.pace")
    assert found < 30
    (shown,) = (await status(fleet))["rates"]
    assert shown["per_s"] >= found
    assert "please come back some time" in shown["said"]
    assert "emails a second" in (await fleet.run("status")).out
    limited.per_s = 10**6
    second = await fleet.relay()
    began_at = time.monotonic()
    await post(fleet, 60, first=100)
    await until(lambda: fleet.sink.messages == 100, "all are sent")
    assert time.monotonic() - began_at >= 60 / (2 * found) - 1
    await second.says("takes about")


async def test_a_deferral_that_all_recipients_get_is_not_counted_as_a_try(fleet):
    """The fleet's emails have four tries each here, and the server says no for much longer than those take."""
    fleet.sink.script = closed = At(Stage.RCPT, LATER)
    for _ in range(2):
        await fleet.relay()
    await post(fleet, 40)
    await closed.reached(60)
    assert await fleet.states() == {"pending": 40}
    assert await tries_beyond_the_first(fleet) == 0

    async def is_said():
        return any("please come back some time" in (one["trouble"] or "") for one in (await status(fleet))["relays"])

    await until(is_said, "status shows why nothing is sent")
    closed.on = False
    await all_sent(fleet, 40)
    assert await tries_beyond_the_first(fleet) == 0


async def test_a_deferral_of_its_own_is_a_try_and_the_last_one_makes_a_dead_letter(fleet):
    full = {f"p{n}@example.com" for n in (7, 23)}
    fleet.sink.script = At(Stage.RCPT, Reply("452 4.2.2 mailbox full"), when=lambda v: v.recipients[-1] in full)
    await fleet.relay()
    await fleet.put_emails(40)
    assert await fleet.settled() == {"sent": 38, "dead": 2}
    assert await trail(fleet, "mail7") == 4 * ["deferred"]
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.pace WHERE found_rate IS NOT NULL") == 0


async def test_greylisting_is_a_try_of_each_and_does_not_slow_the_fleet_down(fleet):
    seen = set()

    def first_time(visit):
        recipient = visit.recipients[-1]
        return recipient not in seen and not seen.add(recipient)

    fleet.sink.script = At(Stage.RCPT, Reply("451 4.7.1 Greylisted, please try again later"), when=first_time)
    await fleet.relay()
    await post(fleet, 60)
    await all_sent(fleet, 60)
    assert await tries_beyond_the_first(fleet) == 60
    assert (await delivery(fleet))["withdrawn"] == 0
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.pace WHERE found_rate IS NOT NULL") == 0


async def test_greylisting_that_is_not_named_delays_no_email_for_ever(fleet):
    seen = {}

    def too_soon(visit):
        now = time.monotonic()
        return now - seen.setdefault(visit.recipients[-1], now) < 2

    fleet.sink.script = At(Stage.RCPT, Reply("451 4.7.1 Try again later"), when=too_soon)
    for _ in range(2):
        await fleet.relay()
    await post(fleet, 60)
    await all_sent(fleet, 60, 60)


async def test_what_a_server_put_off_by_its_rate_does_not_quarantine_an_email_whose_connections_are_cut(fleet):
    """Twenty times the server said no to all, and then it restarts while the email is under way, twice."""
    fleet.top = "messages_per_connection_max = 1"
    await fleet.put_emails(3)
    await fleet.connection.execute("UPDATE outbox.delivery SET attempt = 19, withdrawn = 19 WHERE email = 1")
    await fleet.connection.execute(
        "INSERT INTO outbox.attempt (email, attempt, verdict, reply)"
        " SELECT 1, n, 'withdrawn', '451 4.7.0 please come back some time' FROM generate_series(1, 19) n"
    )
    fleet.sink.script = At(Stage.DATA, Cut(), times=2, when=lambda visit: visit.recipients == ["p1@example.com"])
    await fleet.relay()
    await all_sent(fleet, 3)
    assert (await trail(fleet))[-2:] == ["withdrawn", "accepted"]


@pytest.mark.parametrize("stage", [Stage.MAIL, Stage.RCPT])
@pytest.mark.parametrize(
    "said", ["450 4.7.1 message limit reached", "451 4.7.0 please come back some time", "452 4.3.1 out of resources"]
)
async def test_a_limit_of_the_connection_in_words_of_a_rate_ends_with_the_connection(fleet, stage, said):
    """Waiting on the same connection would change nothing, however long."""
    fleet.top = "connections_max = 1"
    fleet.sink.script = At(stage, Reply(said), when=lambda visit: visit.accepted >= 20)
    await fleet.relay()
    await post(fleet, 60)
    await all_sent(fleet, 60, 20)


@pytest.mark.parametrize("stage", [Stage.RCPT, Stage.DOT])
async def test_one_recipient_who_meets_a_rate_limit_of_his_own_has_tries_and_slows_nobody_down(fleet, stage):
    fleet.sink.script = At(
        stage, Reply("450 4.7.1 rate limit exceeded"), when=lambda visit: visit.recipients == ["p7@example.com"]
    )
    await fleet.relay()
    for batch in range(60):
        await post(fleet, 20, first=1 + 20 * batch)
        await until(lambda: fleet.sink.messages >= 20 * (batch + 1) - 1, f"batch {batch} is sent", 30)  # noqa: B023
        if (await delivery(fleet, "mail7"))["state"] == "dead":
            break
    assert (await delivery(fleet, "mail7"))["state"] == "dead"
    assert set(await trail(fleet, "mail7")) <= {"deferred", "withdrawn"}

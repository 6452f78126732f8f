"""A server that takes its time to answer QUIT: a connection that says goodbye is no connection that waits for mail."""

import asyncio

from outbox.sandbox.smtp_sink import Hold, Reply, Stage, Visit
from tests.support.fault_levers import SLOW, all_sent, post
from tests.support.fleet import Fleet, Process, until

BLOCKED = Reply("550 5.4.5 Daily user sending limit exceeded")


class Tarpit:
    """Three emails come over a connection each. Then one dot is slow, one email is refused, and QUIT hangs."""

    def __init__(self) -> None:
        self.together, self.slow, self.goodbye = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.dots, self.quits, self.is_refused = 0, 0, False

    def __call__(self, stage: Stage, visit: Visit):
        recipient = visit.recipients[-1] if visit.recipients else ""
        if stage is Stage.DOT:
            self.dots += 1
            return Hold(self.together) if self.dots <= 3 else Hold(self.slow) if self.dots == 4 else None
        if stage is Stage.RCPT and recipient == "p5@example.com" and not self.is_refused:
            self.is_refused = True
            return BLOCKED
        if stage is Stage.QUIT:
            self.quits += 1
            return Hold(self.goodbye)
        return None


def crash_of(relay: Process) -> str:
    """Return the traceback in its log, if there is one."""
    return "".join(relay.log).partition("Traceback")[2]


async def test_no_email_starts_on_a_connection_that_has_said_quit(fleet: Fleet):
    fleet.top = SLOW + "\nconnections_max = 3"
    fleet.sink.script = tarpit = Tarpit()
    await fleet.put_emails(3)
    relay = await fleet.relay()
    await until(lambda: tarpit.dots == 3, "three connections are open")
    tarpit.together.set()
    await all_sent(fleet, 3)

    await post(fleet, 1, first=4)
    await until(lambda: tarpit.dots == 4, "its dot waits for the reply")
    await post(fleet, 1, first=5)
    await relay.says("refuses this sender or host")
    await until(lambda: tarpit.quits, "the idle connection says QUIT")
    await asyncio.sleep(1.0)  # the pause after the refusal is over
    tarpit.slow.set()  # so the server takes mail
    await until(lambda: crash_of(relay) or tarpit.dots == 5, "the refused email is tried again, or the relay crashes")
    assert crash_of(relay) == ""
    await all_sent(fleet, 5)
    assert fleet.twice == {}

"""Which relay may take a suspect: of all that fall together one at a time, so that a guilty one falls alone."""

from outbox.relay.supervisor import Relays
from outbox.relay.suspects import PROVEN_S, SuspectRule
from outbox.settings import Settings
from outbox.smtp.outgoing import OutgoingEmail, Try


def test_a_relay_that_has_just_begun_takes_no_suspect_since_it_may_die_of_something_else():
    rule = SuspectRule()
    assert not rule.may_take(100.0, 100.0)
    assert rule.may_take(100.0, 100.0 + PROVEN_S)


def test_a_relay_takes_no_suspect_while_another_of_its_process_holds_one():
    rule, held = SuspectRule(), []
    rule.join(lambda: bool(held))
    rule.join(lambda: False)
    assert rule.may_take(0.0, 60.0)
    held.append("a suspect")
    assert not rule.may_take(0.0, 60.0), "what one of them holds takes the other down, too"


async def test_the_relays_of_one_process_share_one_rule_for_whatever_they_hold():
    settings = Settings(
        database_url="postgresql://user@host/db",
        smtp_url="smtp://one.example",
        routes={"other": {"smtp_url": "smtp://two.example"}},
    )
    one, other = Relays(settings).each
    assert one._parts.intake._suspects is other._parts.intake._suspects
    suspect = OutgoingEmail(1, 1, "mail1", 0, 0, "a@example.com", "b@example.com", "<1@x>", b"x", suspect=True)
    pool = one.pool
    for hold, forget in (
        (lambda: pool.ready.put_first(Try(suspect)), pool.ready.take_all),
        (lambda: pool.returns.release(suspect), pool.returns.take),
        (lambda: pool.returns.rest(suspect), pool.returns.take),
        (lambda: pool.returns.hold(suspect, 1.0), pool.returns.take),
        (lambda: pool.verdicts.dropped.append((Try(suspect), "cut")), pool.verdicts.forget_undecided),
    ):
        hold()
        assert one._parts.intake.holds_suspect()
        assert not other._parts.intake._suspects.may_take(0.0, 60.0), "what one of them holds takes the other down, too"
        forget()
        assert other._parts.intake._suspects.may_take(0.0, 60.0)

from outbox.relay.circuit_breaker import PAUSE_MAX_S
from outbox.relay.returns import Returns
from tests.support.sending import a_try


def test_each_group_rests_for_a_time_of_its_own_and_is_taken_once():
    returns = Returns()
    released, rested, soon, later = (a_try().outgoing for _ in range(4))
    returns.release(released)
    returns.rest(rested)
    returns.hold(soon, 5.0)
    returns.hold(later, PAUSE_MAX_S)
    assert set(returns) == {released, rested, soon, later}
    assert returns.take() == [
        (0.0, [released.email]),
        (PAUSE_MAX_S, [rested.email]),
        (5.0, [soon.email, later.email]),
    ]
    assert not returns
    assert returns.take() == []

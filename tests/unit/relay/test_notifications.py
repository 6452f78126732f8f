"""A flood of notifications does not keep a relay busy, and one that leads to an email is acted upon at once."""

from outbox.relay.notifications import REST_FIRST_S, REST_MAX_S, Notifications


def look(notifications, now, *, found=False):
    notifications.begin_look()
    return notifications.end_look(now, found=found)


def after_a_flood(looks=9):
    notifications = Notifications()
    for _ in range(looks):
        assert notifications.hear(notifications.rest_until) == 0.0
        look(notifications, notifications.rest_until)
    return notifications


def test_a_flood_leads_to_fewer_and_fewer_looks():
    notifications = Notifications()
    now, looks, look_at = 100.0, 0, None
    while now < 110.0:  # a thousand a second, for ten seconds
        wait_s = notifications.hear(now)
        if wait_s is not None:
            look_at = now + wait_s
        if look_at is not None and look_at <= now:
            look_at = None
            looks += 1
            look(notifications, now)
        now += 0.001
    assert looks <= 7 + 10, "10 ms, 20 ms, … up to once a second"


def test_the_rests_double_up_to_a_second():
    notifications = Notifications()
    now, rests = 0.0, []
    for _ in range(9):
        assert notifications.hear(now) == 0.0
        look(notifications, now)
        rests.append(round(notifications.rest_until - now, 6))
        now = notifications.rest_until
    assert rests[:3] == [REST_FIRST_S, 2 * REST_FIRST_S, 4 * REST_FIRST_S]
    assert rests[-1] == REST_MAX_S


def test_one_that_comes_during_a_rest_is_acted_upon_at_its_end_and_only_once():
    notifications = after_a_flood(1)
    assert notifications.hear(0.004) == REST_FIRST_S - 0.004
    assert notifications.hear(0.005) is None


def test_one_that_comes_during_a_look_is_looked_for_again():
    """The look may have begun before the commit that it tells of."""
    notifications = Notifications()
    for found, wait_s in ((True, 0.0), (False, REST_FIRST_S)):
        notifications.hear(0.0)
        notifications.begin_look()
        assert notifications.hear(0.0) == 0.0
        assert notifications.end_look(0.0, found=found) == wait_s
    assert look(Notifications(), 0.0) is None


def test_a_claim_that_finds_something_ends_the_rests():
    notifications = after_a_flood()
    notifications.hear(notifications.rest_until - 0.001)
    look(notifications, notifications.rest_until - 0.001, found=True)
    assert notifications.hear(notifications.rest_until) == 0.0
    look(notifications, 1.0)
    assert notifications.rest_until == 1.0 + REST_FIRST_S


def test_a_look_for_another_reason_changes_nothing():
    notifications = after_a_flood(3)
    until = notifications.rest_until
    look(notifications, until + 0.001)
    assert notifications.rest_until == until


def test_a_flood_of_long_ago_is_forgotten():
    notifications = after_a_flood()
    later = notifications.rest_until + 2 * REST_MAX_S
    assert notifications.hear(later) == 0.0
    look(notifications, later)
    assert notifications.rest_until == later + REST_FIRST_S

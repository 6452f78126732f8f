import itertools
from zoneinfo import available_timezones

import pytest

from outbox.reports.timezones import alternatives, canonical, current


@pytest.mark.parametrize("former, name", [
    ("US/Eastern", "America/New_York"), ("Asia/Calcutta", "Asia/Kolkata"), ("Europe/Kiev", "Europe/Kyiv"),
    ("GB", "Europe/London"), ("America/Indianapolis", "America/Indiana/Indianapolis"), ("Zulu", "Etc/UTC"),
    ("Asia/Saigon", "Asia/Ho_Chi_Minh"), ("America/Godthab", "America/Nuuk"), ("NZ", "Pacific/Auckland"),
])  # fmt: skip
def test_a_former_name_has_a_current_one(former, name):
    assert current(former) == name
    assert canonical(former) == canonical(name)
    assert set(alternatives(former)) == set(alternatives(name))


@pytest.mark.parametrize("name", ["UTC", "GMT", "America/New_York", "Europe/Amsterdam", "Europe/Oslo", "Etc/GMT+5"])
def test_a_current_name_stays(name):
    assert current(name) == name
    assert next(alternatives(name)) == name


def test_different_zones_stay_different():
    names = ["America/New_York", "America/Chicago", "Europe/London", "Europe/Lisbon", "UTC", "Asia/Kolkata"]
    assert all(canonical(one) != canonical(other) for one, other in itertools.combinations(names, 2))


def test_every_name_that_settings_accept_has_a_canonical_one_that_is_no_link():
    for name in available_timezones():
        assert canonical(canonical(name)) == canonical(name)
        assert canonical(current(name)) == canonical(name)

import pytest

from outbox.settings import Settings, duration_s


@pytest.mark.parametrize(("rate", "per_s"), [("14/s", 14.0), ("600/min", 10.0), ("7200 / h", 2.0), ("0.5/s", 0.5)])
def test_a_rate_is_read_per_second(rate, per_s):
    assert Settings(rate=rate).rate_per_s == per_s


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("90min", 5400), ("48h", 172_800), ("400d", 34_560_000), ("2w", 1_209_600)]
)
def test_a_length_of_time_is_read_in_seconds(text, seconds):
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "5", "-3d", "1e3d", "5 days", "inf h"])
def test_what_is_no_length_of_time_is_none(text):
    assert duration_s(text) == 0

import pytest

from outbox.settings import Settings, duration_s
from outbox.settings.values import address_of, is_duration, shown


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


@pytest.mark.parametrize("text", ["36500d", "1s", "0.5min"])
def test_a_duration_is_above_zero_and_one_that_postgres_can_add(text):
    assert is_duration(text)
    assert not is_duration("0s")
    assert not is_duration("36501d")


@pytest.mark.parametrize(("text", "address"), [("A@Example.COM", "A@example.com"), ("ü@b", "ü@b")])
def test_an_address_is_in_the_form_that_smtp_takes(text, address):
    assert address_of(text) == address


@pytest.mark.parametrize("text", ["a@bücher.example", "a..b@c", "a@x.invalid", "A <a@b>", "", "a@b, c@d"])
def test_a_text_that_is_no_address_with_a_domain_in_ascii_is_none(text):
    assert address_of(text) is None


@pytest.mark.parametrize("value", ["smtp://bob:s3cr3t@mail", "a@b", "x:y", "a\nb"])
def test_a_value_that_may_be_a_url_with_a_password_is_not_shown(value):
    assert shown(value) == "this"
    assert (shown("weekly"), shown(5)) == ('"weekly"', "5")

"""Recipients: rows of a source, keys and addresses, windows."""

import pytest

from outbox.errors import SourceError
from outbox.generate.recipients import (
    REPEATED_MAX,
    Recipient,
    RepeatedKeys,
    SharedAddresses,
    Window,
    label_of,
    recipient_of,
    windows,
)


def person(key, email=None):
    return Recipient(key, f"{key}@example.com" if email is None else email)


async def in_windows(recipients, size, on_repeat=lambda _: None):
    async def stream():
        for one in recipients:
            yield one

    return [[one.key for one in window] async for window in windows(stream(), size, on_repeat)]


async def test_the_first_row_of_a_key_counts_however_far_apart_the_rows_are():
    repeated = []
    rows = [person("1"), person("2"), person("3"), person("1", "other@example.com"), person("2")]
    assert await in_windows(rows, 2, repeated.append) == [["1", "2"], ["3"]]
    assert [one.email for one in repeated] == ["other@example.com", "2@example.com"]


async def test_the_last_window_may_be_empty():
    assert await in_windows([], 2) == [[]]
    assert await in_windows([person("1"), person("2")], 2) == [["1", "2"], []]


def test_a_window_has_each_recipient_once_as_wanted_failed_or_waived():
    rows = [person("1"), person("2", "no address"), person("3", " "), person("4"), Recipient("", "x@example.com")]
    window = Window.of(rows, {"4"}, SharedAddresses())
    assert list(window.wanted) == ["1"]
    assert window.waived == {"4"}
    assert list(window.failed) == ["2", "3", "(no key, x@example.com)"]
    assert window.failed["3"].startswith("there is no email address (it is NULL or empty)")


def test_a_withdrawn_recipient_is_no_longer_wanted():
    window = Window.of([person("1"), person("2")], (), SharedAddresses())
    window.withdraw(["1"])
    assert list(window.wanted) == ["2"]


def test_addresses_are_shared_whatever_their_case(caplog):
    addresses = SharedAddresses()
    Window.of([person("1", "a@example.com"), person("2", "A@example.com"), person("3")], (), addresses)
    assert (addresses.count, addresses.first) == (1, "A@example.com")
    addresses.log()
    assert "1 recipients have an address that another key has, too, such as A@example.com" in caplog.text


def test_only_the_first_repeated_keys_are_named_in_the_log(caplog):
    repeated = RepeatedKeys()
    for number in range(REPEATED_MAX + 3):
        repeated.note(person(str(number)))
    repeated.log_rest()
    assert [record.getMessage() for record in caplog.records][-2:] == [
        f"recipient {REPEATED_MAX - 1} comes twice; the first row counts",
        "3 further rows repeat a key",
    ]


def test_labels_of_keys_that_postgres_cannot_hold_differ():
    assert {label_of(person(key)) for key in ("a", "a\0", "a\0\0")} == {"a", r"'a\x00'", r"'a\x00\x00'"}


@pytest.mark.parametrize(
    "row, lacks",
    [({}, "no column key and no column email"), ({"key": 1}, "no column email"), ({"email": "x"}, "no column key")],
)
def test_a_row_without_key_or_email_is_refused_by_the_name_of_the_column(row, lacks):
    with pytest.raises(SourceError, match=lacks):
        recipient_of(row, "reports.progress.recipients")


def test_nulls_are_empty_and_numbers_are_text():
    row = {"key": 7, "email": None, "name": None, "team": None}
    assert recipient_of(row, "x") == Recipient("7", "", "", {"team": None})

from datetime import UTC, datetime

import pytest

from outbox.database.values import decode_timestamp, encode_timestamp, storable
from outbox.reports.period import INFINITY, MINUS_INFINITY

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


def test_a_text_loses_only_what_postgres_cannot_hold():
    assert storable("a\0b\ud800c \U0001f600é") == "ab?c \U0001f600é"


@pytest.mark.parametrize("at", [EPOCH, datetime(2026, 11, 24, 6, 0, 0, 1, tzinfo=UTC), INFINITY, MINUS_INFINITY])
def test_a_time_survives_both_ways(at):
    assert decode_timestamp(*encode_timestamp(at)) == at


@pytest.mark.parametrize("microseconds", [2**63 - 2, -(2**63) + 1])
def test_a_time_out_of_range_is_not_taken_for_an_infinite_one(microseconds):
    assert MINUS_INFINITY < decode_timestamp(microseconds) < INFINITY
    with pytest.raises(OverflowError):
        decode_timestamp(microseconds, clamps=False)


def test_an_infinite_time_of_asyncpg_is_encoded_as_infinite():
    assert encode_timestamp(datetime.max) == encode_timestamp(INFINITY)  # noqa: DTZ901
    assert encode_timestamp(datetime.min) == encode_timestamp(MINUS_INFINITY)  # noqa: DTZ901

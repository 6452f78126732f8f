"""Errors of queries as sentences."""

import asyncpg
import pytest

from outbox.generate.query_errors import describe, describe_parameter, describe_refusal, is_in, message_of
from outbox.reports.query_parameters import parse


@pytest.mark.parametrize(
    ("sql", "message", "fix"),
    [
        ("select 1 where a = :key", "operator does not exist: integer = text", "compare with cast(:key as int)"),
        ("select 1 where a = :key", "operator does not exist: text = uuid", "compare with cast(:key as uuid)"),
        ("select 1 where a = any(:keys)", "operator does not exist: integer = text", "any(cast(:keys as int[]))"),
        (
            "select 1 where a in (:keys)",
            "operator does not exist: integer = text[]",
            "any(cast(:keys as int[])) in place of in (:keys)",
        ),
        (
            "select 1 where a in (:keys)",
            "operator does not exist: text = text[]",
            "= any(:keys) in place of in (:keys)",
        ),
    ],
)
def test_a_comparison_with_text_is_refused_with_the_cast_that_it_needs(sql, message, fix):
    words = describe_refusal(parse(sql), asyncpg.UndefinedFunctionError(f"{message}\nHINT: none"))
    assert words.startswith(message)
    assert words.endswith(fix)


def test_a_parameter_is_named_as_the_query_names_it():
    error = asyncpg.PostgresError("could not determine data type of parameter $2, and of $9")
    words = describe_refusal(parse("select :key, :period"), error)
    assert words == "could not determine data type of parameter :period, and of $9"


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("timestamp", "it compares :starts_at with a timestamp without time zone; say in which time zone"),
        ("date", "it uses :starts_at as date, but it is a timestamp with time zone; cast it: :starts_at::timestamptz"),
    ],
)
def test_a_bound_that_does_not_fit_its_type_is_named_with_the_fix(wanted, says):
    query = parse("select :starts_at")
    error = asyncpg.DataError("invalid input for query argument $1: datetime(…)")
    assert describe_parameter(query, [wanted], error).startswith(says)
    assert describe_parameter(query, [wanted], asyncpg.DataError("another")) is None


def test_errors_are_one_line_and_have_a_name_if_they_have_no_words():
    assert describe(ValueError("a\n  b")) == "a b"
    assert describe(ValueError()) == "ValueError"
    assert message_of(Exception("a\nb [SQL: select secret]")) == "a b"


def test_classes_of_errors_are_those_of_sqlstate():
    assert is_in(asyncpg.DeadlockDetectedError("x"), ("40",))
    assert not is_in(asyncpg.DeadlockDetectedError("x"), ("42",))
    assert not is_in(ValueError("x"), ("40",))

"""Sources without a database: a class of the user's in all its shapes, and the two queries over a reader of rows."""

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from outbox.errors import SourceError
from outbox.generate.query_errors import QueryError, RowError
from outbox.generate.recipients import Recipient
from outbox.generate.source import PythonSource, SqlSource, load_source
from outbox.reports.period import Period

PERIOD = Period("2026-W48", datetime(2026, 11, 23, tzinfo=UTC), datetime(2026, 11, 30, tzinfo=UTC))
ONE, TWO = Recipient("1", "one@example.com"), Recipient("2", "two@example.com")


def python(**methods):
    return PythonSource("progress", SimpleNamespace(**methods))


async def listed(source):
    return [recipient async for recipient in source.recipients(PERIOD)]


async def _async_list():
    return [ONE, TWO]


async def _async_generator():
    for one in (ONE, TWO):
        yield one


def _generator():
    yield from (ONE, TWO)


@pytest.mark.parametrize(
    "give",
    [lambda: [ONE, TWO], lambda: (ONE, TWO), _generator, _async_generator, _async_list, lambda: iter([ONE, TWO])],
    ids=["list", "tuple", "generator", "async generator", "awaitable", "iterator"],
)
async def test_recipients_come_from_any_iterable_async_iterable_or_awaitable(give):
    assert await listed(python(recipients=lambda _: give())) == [ONE, TWO]


async def test_mappings_serve_as_recipients():
    given = [{"key": 1, "email": "one@example.com", "name": None, "team": "red"}]
    assert await listed(python(recipients=lambda _: given)) == [Recipient("1", "one@example.com", "", {"team": "red"})]


@pytest.mark.parametrize("given", [None, 3, object()])
async def test_what_cannot_be_iterated_is_a_fault_of_the_source(given):
    with pytest.raises(SourceError, match=r"reports\.progress\.source: .* return an iterable of Recipient"):
        await listed(python(recipients=lambda _: given))


async def test_a_generator_that_raises_midway_is_a_fault_of_the_source_in_one_line():
    def broken(_):
        yield ONE
        raise ValueError("two\nlines")

    with pytest.raises(SourceError, match=r"recipients\(\) raised ValueError: two lines; correct it there\.$"):
        await listed(python(recipients=broken))


async def test_an_awaitable_that_raises_is_a_fault_of_the_source():
    async def broken(_):
        raise LookupError("gone")

    with pytest.raises(SourceError, match=r"LookupError: gone"):
        await listed(python(recipients=broken))


@pytest.mark.parametrize(
    "given, content",
    [
        ([{"done": 1}], [{"done": 1}]),
        (({"done": n} for n in (1, 2)), [{"done": 1}, {"done": 2}]),
        ([], []),
        ({"headline": "x"}, {"headline": "x"}),
    ],
    ids=["rows", "generator", "nothing", "mapping"],
)
async def test_build_gives_rows_or_a_mapping(given, content):
    assert await python(build=lambda *_: given).build([ONE], PERIOD) == {"1": content}


@pytest.mark.parametrize("given", [None, "text", [1], 5])
async def test_a_build_that_gives_neither_fails_for_its_recipient_only(given):
    built = await python(build=lambda r, _: given if r is ONE else []).build([ONE, TWO], PERIOD)
    assert isinstance(built["1"], RowError)
    assert built["2"] == []


async def test_a_build_that_raises_fails_for_its_recipient_only():
    async def build(recipient, _):
        if recipient is ONE:
            raise KeyError("missing")
        return [{"done": 1}]

    built = await python(build=build).build([ONE, TWO], PERIOD)
    assert str(built["1"]) == "build() raised KeyError: 'missing'"
    assert built["2"] == [{"done": 1}]


async def test_a_plain_function_that_gives_an_awaitable_is_awaited():
    async def rows():
        return [{"done": 1}]

    assert await python(build=lambda *_: rows()).build([ONE], PERIOD) == {"1": [{"done": 1}]}


async def test_build_is_given_the_recipient_and_the_period():
    asked = []
    await python(build=lambda *words: asked.append(words) or []).build([ONE, TWO], PERIOD)
    assert asked == [(ONE, PERIOD), (TWO, PERIOD)]


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "module, code, reference, says",
    [
        ("found_1", "class A:\n def recipients(self, p): ...\n def build(self, r, p): ...\n", "found_1:A", None),
        ("found_2", "class A: ...", "found_2:B", "AttributeError"),
        ("found_3", "class A: ...", "found_3:A", "lacks recipients"),
        ("found_4", "1 / 0", "found_4:A", "ZeroDivisionError"),
        ("found_5", "A = 5", "found_5:A", "TypeError"),
        ("found_6", "", "found_none:A", "ModuleNotFoundError"),
    ],
)
def test_a_class_beside_the_settings_is_found_or_the_fault_is_named(
    tmp_path, monkeypatch, module, code, reference, says
):
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / f"{module}.py").write_text(code)
    if says is None:
        assert isinstance(load_source("progress", reference, tmp_path), PythonSource)
        return
    with pytest.raises(SourceError, match=rf"^reports\.progress\.source: {reference} .*{says}"):
        load_source("progress", reference, tmp_path)


# ── the two queries ──────────────────────────────────────────────────────────────────────────────────────────────────


class Reader:
    """Rows by statement and keys; remembers what it was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    async def rows(self, _statement, parameters):
        self.asked.append(parameters)
        return self.answer(parameters)

    async def stream(self, _statement, parameters, portion):
        self.asked.append(parameters)
        found = self.answer(parameters)
        for at in range(0, len(found), portion):
            yield found[at : at + portion]


def sql(answer, *, batched=False):
    reader = Reader(answer)
    return SqlSource("progress", "recipients", "data", batched, reader), reader


def spoiled_by(*keys):
    def answer(parameters):
        asked = parameters.get("keys") or [parameters["key"]]
        if set(asked) & set(keys):
            raise RowError("division by zero")
        return [{"key": key, "done": 1} for key in asked]

    return answer


def people(count):
    return [Recipient(str(n), f"p{n}@example.com") for n in range(count)]


async def test_the_period_goes_with_every_query():
    source, reader = sql(lambda _: [])
    await listed(source)
    await source.build([ONE], PERIOD)
    bounds = {"period": "2026-W48", "starts_at": PERIOD.starts_at, "ends_at": PERIOD.ends_at}
    assert reader.asked == [bounds, {**bounds, "key": "1"}]


async def test_one_key_at_a_time_is_one_query_each():
    source, reader = sql(spoiled_by("3"))
    built = await source.build(people(5), PERIOD)
    assert len(reader.asked) == 5
    assert [key for key, content in built.items() if isinstance(content, RowError)] == ["3"]


async def test_a_batch_is_one_query_and_rows_go_to_their_keys_without_the_key():
    source, reader = sql(
        lambda _: [{"key": 1, "done": 7}, {"key": "2", "done": 8}, {"key": 1, "done": 9}], batched=True
    )
    assert await source.build([ONE, TWO], PERIOD) == {"1": [{"done": 7}, {"done": 9}], "2": [{"done": 8}]}
    assert [asked["keys"] for asked in reader.asked] == [["1", "2"]]


async def test_rows_of_keys_that_were_not_asked_for_are_left_out():
    source, _ = sql(lambda _: [{"key": "9", "done": 7}], batched=True)
    assert await source.build([ONE], PERIOD) == {"1": []}


async def test_of_a_spoiled_batch_only_the_spoilers_fail():
    source, _ = sql(spoiled_by("13", "77"), batched=True)
    built = await source.build(people(100), PERIOD)
    assert len(built) == 100
    assert {key for key, content in built.items() if isinstance(content, RowError)} == {"13", "77"}


async def test_a_query_that_is_wrong_as_such_ends_the_run():
    def refuse(_):
        raise QueryError("syntax error")

    for batched in (False, True):
        source, reader = sql(refuse, batched=batched)
        with pytest.raises(SourceError, match=r"^reports\.progress\.data: .*syntax error"):
            await source.build(people(100), PERIOD)
        assert len(reader.asked) == 1
    with pytest.raises(SourceError, match=r"^reports\.progress\.recipients: .*syntax error"):
        await listed(source)


async def test_a_batch_without_a_column_key_says_what_to_return():
    source, _ = sql(lambda _: [{"done": 1}], batched=True)
    with pytest.raises(SourceError, match="returns no column key"):
        await source.build([ONE], PERIOD)

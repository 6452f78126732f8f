"""What is a parameter of a query, and what is a colon otherwise."""

import tomllib

import pytest

from outbox.reports.query_parameters import NAMES, objection, parse

KEY, KEYS = "($1::pg_catalog.text)", "($1::pg_catalog.text[])"

# A query, and what Postgres is given.
FOUND = [
    ("select :key", f"select {KEY}"),
    ("id = :key::int", f"id = {KEY}::int"),
    ("id = :key :: int", f"id = {KEY} :: int"),
    ("id::text = :key", f"id::text = {KEY}"),
    ("id::text=:key", f"id::text={KEY}"),
    ("id = cast(:key as int)", f"id = cast({KEY} as int)"),
    ("id = any(:keys::int[])", f"id = any({KEYS}::int[])"),
    ("(:keys)[1]", f"({KEYS})[1]"),
    (":keys[1]", f"{KEYS}[1]"),
    ("day >= :starts_at::date", "day >=  $1::date"),
    ("x=1 and:starts_at < at", "x=1 and $1 < at".replace("and", "and")),
    (":key || :key", f"{KEY} || {KEY}"),
    ("array[:key]", f"array[{KEY}]"),
    ("array[[:key], [:key]]", f"array[[{KEY}], [{KEY}]]"),
    ("tags[:key]", f"tags[{KEY}]"),
    ("tags[1: :key]", f"tags[1: {KEY}]"),
    ("tags[:key:n]", f"tags[{KEY}:n]"),
    ("tags[f(:key):n]", f"tags[f({KEY}):n]"),
    ("tags[case when true then :key end:n]", f"tags[case when true then {KEY} end:n]"),
    ("f(a := :key)", f"f(a := {KEY})"),
    ("select :key;  -- the :key; \n ;", f"select {KEY};  -- the :key; \n ;"),
    ("select /* a */ :key", f"select /* a */ {KEY}"),
]

# Texts in which no colon begins a parameter; Postgres is given them as they are.
COPIED = [
    "select ':key'",
    "select 'it''s :key'",
    r"select E'it\'s :key'",
    r"select e'\\' || 'x:key'",
    r"select 'a\' || ':key'",
    "select U&'d\\0061t :key'",
    "select $$:key$$",
    "select $a$ :key $$ :keys $b$ :key $a$",
    'select ":key"',
    'select "a"":key"',
    "select 1 -- :key\n",
    "select 1 /* :key */ + 1",
    "select 1 /* :key /* :keys */ :key */ + 1",
    "select tags[1:n]",
    "select tags[:n]",
    "select tags[lo:hi]",
    "select tags[lo:key]",
    "select (tags)[2:n][1:m]",
    "select (array[1,2])[1:key]",
    "select 'x'::text, 1::int, a.b::date",
    "select f(key := 1, keys=>2)",
    "select time '12:30'",
    "select ':key",
    "select /* :key",
    "select $$ :key",
    "select typee':key'",
]


@pytest.mark.parametrize("sql, text", FOUND)
def test_a_parameter_is_found_wherever_postgres_would_read_an_operand(sql, text):
    assert parse(sql).text == text
    assert set(parse(sql).names) <= set(NAMES)


@pytest.mark.parametrize("sql", COPIED)
def test_a_colon_of_postgres_own_begins_no_parameter(sql):
    query = parse(sql)
    assert query.names == ()
    assert query.text == sql


def test_each_name_has_one_number_so_that_equal_expressions_stay_equal():
    query = parse("select :starts_at, :key, :ends_at where :key <> :period group by :starts_at")
    assert query.names == ("starts_at", "key", "ends_at", "period")
    assert query.values({"period": "p", "key": "k", "starts_at": 1, "ends_at": 2, "keys": []}) == [1, "k", 2, "p"]


@pytest.mark.parametrize("sql", [r"select \:foo", r"select '\:foo'", r"select ':foo'"])
def test_a_backslash_keeps_a_colon(sql):
    assert parse(sql).names == ()
    assert ":foo" in parse(sql).text
    assert "\\" not in parse(sql).text


def test_the_message_about_an_unknown_parameter_holds_in_both_kinds_of_strings_of_toml():
    words = objection(parse("select :foo"), {"period": "", "key": ""})
    assert words.startswith("it uses :foo, but there are only :period, :key")
    assert r"\:foo in a '…' string" in words
    assert r'\\:foo in a "…" string' in words
    literal, basic = tomllib.loads(r"q = 'select \:foo'")["q"], tomllib.loads(r'q = "select \\:foo"')["q"]
    assert parse(literal).text == parse(basic).text == "select :foo"


def test_a_position_in_place_of_a_name_is_refused():
    words = objection(parse("select $1"), {"period": "", "starts_at": None})
    assert words == "it uses $1, but parameters have names: :period, :starts_at"
    assert parse("select '$1', $a$ $1 $a$").positions == ()

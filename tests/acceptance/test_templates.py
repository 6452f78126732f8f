"""Templates and rows as a user has them: through `generate`, `preview` and `doctor`, on real Postgres."""

import html
import json
import re

import pytest

from tests.unit.reports.test_jinja import write

# As the page shows them, in the order of the columns: the types of Postgres that a query may give.
TYPES = {
    "array['backend', 'urgent']": "backend, urgent",
    "cast('{{1,2},{3,4}}' as int[])": "(1, 2), (3, 4)",
    "cast('{}' as text[])": "\u2013",
    "cast(null as text[])": "\u2013",
    """'["a", "b"]'::jsonb""": "a, b",
    """'{"city": "Ulm", "at": [1, null]}'::jsonb""": "at: (1, \u2013), city: Ulm",
    "array(select p from people p)": "(id: 1, email: p1@example.com, name: Person 1, active: yes)",
    "(select p from people p)": "id: 1, email: p1@example.com, name: Person 1, active: yes",
    "row(1, 'x', null)": "1, x, \u2013",
    "int4range(1, 5)": "1 \u2013 4",
    "daterange('2026-11-16', '2026-11-23')": "Mon 16 Nov \u2013 Sun 22 Nov",
    "daterange('2026-11-16', 'infinity')": "Mon 16 Nov \u2013 …",
    "int4multirange '{[1,5),[8,9)}'": "1 \u2013 4, 8",
    "tstzrange('2026-11-16 03:00+00', null)": "Sun 15 Nov 22:00 \u2013 …",
    "interval '26 hours 5 minutes'": "26 h 5 min",
    "true": "yes",
    "numeric '12.50'": "12.5",
    "numeric 'NaN'": "\u2013",
    "numeric '1e1000'": "1E+1000",
    "float8 '-infinity'": "\u2013",
    "bit '101'": "101",
    "point(1.5, 2)": "1.5, 2",
    "polygon '((0,0),(1,1))'": "(0, 0), (1, 1)",
    "inet '10.0.0.1/8'": "10.0.0.1/8",
    "bytea 'abc'": "3 bytes",
    "date 'infinity'": "31 Dec 9999",
    "date '-infinity'": "1 Jan 1",
    "timestamp '9999-12-31 23:59:59'": "31 Dec 9999 23:59",
    "timestamptz 'infinity'": "31 Dec 9999 23:59",
    "timestamptz '-infinity'": "1 Jan 1 00:00",
}
SENTINELS = {
    "Europe/Berlin": ("9999-12-31 23:59:59+00", "31 Dec 9999 23:59"),
    "America/New_York": ("0001-01-01 01:00:00+00", "1 Jan 1 01:00"),
    "Pacific/Kiritimati": ("9999-12-31 12:00:00+00", "31 Dec 9999 12:00"),
    "Etc/GMT+12": ("0001-01-01 00:00:00+00", "1 Jan 1 00:00"),
}


async def page(fleet):
    ended = await fleet.run("preview", "progress", "--json", "--period", "2026-W47")
    assert ended.code == 0, ended
    return json.loads(ended.out)


def cells(page):
    return [html.unescape(cell) for cell in re.findall(r"<td[^>]*>([^<]*)</td>", page)]


async def test_each_type_of_postgres_reads_as_a_person_writes_it(fleet):
    await fleet.hire(1)
    columns = ", ".join(f"{value} as c{number}_id" for number, value in enumerate(TYPES))
    fleet.data = f"select {columns} where :key <> ''"
    assert cells((await page(fleet))["page"]) == list(TYPES.values())


@pytest.mark.parametrize("zone", SENTINELS)
async def test_a_date_at_an_end_of_time_is_shown_and_everybody_gets_a_report(fleet, zone):
    await fleet.hire(2)
    value, shown = SENTINELS[zone]
    fleet.timezone = zone
    fleet.data = f"select timestamptz '{value}' as due where :key <> ''"
    ended = await fleet.run("generate", "--period", "2026-W47")
    assert (ended.code, ended.err) == (0, ""), ended
    pages = await fleet.connection.fetch("SELECT html FROM outbox.report")
    assert [cells(row["html"]) for row in pages] == [[shown]] * 2


async def test_what_is_misspelt_is_said_by_preview_generate_and_doctor_and_what_is_included_is_not(fleet):
    await fleet.hire(1)
    write(fleet.directory / "templates", {
        "progess/email.html.j2": "x",
        "progress/emial.txt.j2": "x",
        "progress/subject.txt.j2": "{{ period }}: {% include 'progress/part.txt' %}",
        "progress/part.txt": "for {{ recipient.name }}",
    })  # fmt: skip
    ended = await fleet.run("preview", "progress", "--out", "seen", "--period", "2026-W47")
    assert ended.code == 0, ended
    said = ended.err.splitlines()
    assert [line.removeprefix(f"outbox: {fleet.directory}/templates/") for line in said] == [
        "progess/: is not used, since no report has this name (did you mean progress?); rename it",
        "progress/emial.txt.j2: is not used (did you mean email.txt.j2?); rename it",
    ]
    assert "subject  16 \u2013 22 November 2026: for Person 1" in ended.out
    assert (await fleet.run("generate", "--period", "2026-W47")).err.splitlines() == said
    found = json.loads((await fleet.run("doctor", "--json")).out)
    notes = [f"outbox: {one['found']}; {one['mend']}" for one in found["checks"] if one["check"] == "templates"]
    assert notes == said
    assert "part.txt" not in json.dumps(found)


async def test_a_template_that_fails_is_explained_with_file_line_and_the_names_there_are(fleet):
    await fleet.hire(2)
    write(fleet.directory / "templates", {"progress/subject.txt.j2": "Hi\n{{ recipient.nickname }}"})
    ended = await fleet.run("generate", "--period", "2026-W47")
    assert ended.code == 1
    path = fleet.directory / "templates/progress/subject.txt.j2"
    assert f"recipient 1: {path}, line 2: recipient has no nickname; it has key, email, name." in ended.err
    assert "recipient 2: " in ended.err

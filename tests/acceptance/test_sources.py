"""Who is owed a report and what it says: queries, Python classes and templates as users write them, right and wrong."""

import signal

import pytest

from outbox.generate.buckets import bucket_of
from tests.support.fleet import until

PEOPLE = """
INSERT INTO people (id, email, name) VALUES
  (1, 'p1@example.com', 'One'), (2, 'p2@example.com', 'Two'), (3, 'p3@example.com', NULL)
"""


async def pages(fleet):
    """The page of each recipient, by key."""
    rows = await fleet.connection.fetch("SELECT recipient_key, html FROM outbox.report ORDER BY recipient_key")
    return {row["recipient_key"]: row["html"] for row in rows}


async def messages(fleet):
    rows = await fleet.connection.fetch("SELECT recipient, message FROM outbox.email")
    return {row["recipient"]: row["message"].decode() for row in rows}


def source(fleet, code):
    (fleet.directory / "mine.py").write_text("from outbox import Recipient\n" + code)
    fleet.source = "mine:Mine"


def template(fleet, name, text):
    path = fleet.directory / "templates" / "progress" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ── queries ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_query_with_keys_runs_once_per_batch_and_each_row_goes_to_its_recipient(fleet):
    fleet.data = """with counted as (insert into build (key) values (array_to_string(:keys, ' ')) returning key)
    select k as key, 'row of ' || k as said from counted, unnest(:keys) k"""
    await fleet.hire(150)
    ended = await fleet.run("generate")
    assert (ended.code, ended.err) == (0, ""), ended
    found = await pages(fleet)
    assert len(found) == 150
    assert all(f"row of {key}<" in page for key, page in found.items())
    batches = [row["key"].split() for row in await fleet.connection.fetch("SELECT key FROM build")]
    assert sorted(key for batch in batches for key in batch) == sorted(found)
    assert len(batches) < 150 / 4


async def test_one_recipient_who_spoils_a_batch_is_named_and_the_others_go_on(fleet):
    fleet.data = "select k as key, 1 / (cast(k as int) - 7) as share from unnest(:keys) k"
    await fleet.hire(20)
    ended = await fleet.run("generate")
    assert ended.code == 1
    assert [s.partition(", recipient ")[2] for s in ended.sentences] == ["7: division by zero"]
    assert "19 made here, 0 elsewhere, 1 failed, of 20 recipients." in ended.out
    assert set(await pages(fleet)) == {str(n) for n in range(1, 21)} - {"7"}


async def test_one_recipient_whose_query_fails_is_named_and_the_next_run_makes_what_was_mended(fleet):
    fleet.data = "select 1 / (cast(:key as int) - 2) as share"
    await fleet.connection.execute(PEOPLE)
    ended = await fleet.run("generate")
    assert (ended.code, len(ended.sentences)) == (1, 1)
    assert ended.sentences[0].endswith(", recipient 2: division by zero")
    fleet.data = "select cast(:key as int) as share"
    mended = await fleet.run("generate")
    assert (mended.code, mended.err) == (0, "")
    assert "1 made here, 2 already made, 0 failed, of 3 recipients." in mended.out


async def test_every_server_says_who_failed(fleet):
    fleet.data = "select 1 / (cast(:key as int) - 2) as share"
    await fleet.connection.execute(PEOPLE)
    first, second = await fleet.start("generate"), await fleet.start("generate")
    for ended in (await first.ended(), await second.ended()):
        assert ended.code == 1
        assert ended.sentences[0].endswith(", recipient 2: division by zero")


async def test_the_period_and_its_bounds_reach_both_queries(fleet):
    fleet.recipients = """select '1' as key, 'p1@example.com' as email
      where :period = '2026-W45' and :starts_at = timestamptz '2026-11-02 00:00 America/New_York'"""
    fleet.data = """select 'ends on the ninth' as said
      where :ends_at = timestamptz '2026-11-09 00:00 America/New_York' and :period = '2026-W45' and :key = '1'"""
    ended = await fleet.run("generate", "--period", "2026-W45")
    assert (ended.code, ended.err) == (0, ""), ended
    assert "ends on the ninth" in (await pages(fleet))["1"]


async def test_a_batch_is_skipped_for_those_without_rows_who_get_an_empty_report(fleet):
    fleet.data = "select k as key, 'busy' as said from unnest(:keys) k where k <> '2'"
    await fleet.connection.execute(PEOPLE)
    assert (await fleet.run("generate")).code == 0
    found = await pages(fleet)
    assert ["busy" in found[key] for key in "123"] == [True, False, True]
    assert "Nothing was recorded" in (await messages(fleet))["p2@example.com"]


async def test_a_value_that_python_cannot_hold_is_told_by_recipient_column_and_value(fleet):
    fleet.data = "select case when :key = '7' then date '20226-11-24' else date '2026-11-24' end as due"
    await fleet.hire(20)
    ended = await fleet.run("generate")
    assert (ended.code, len(ended.sentences)) == (1, 1), ended
    assert ", recipient 7: column due has the value 20226-11-24, which Python cannot represent" in ended.sentences[0]
    assert "19 made here, 0 elsewhere, 1 failed, of 20 recipients." in ended.out
    fleet.recipients = "select id::text as key, email, case id when 7 then time '24:00' end as at from people"
    for words in (("generate",), ("audit", "progress"), ("preview", "progress", "--for", "7")):
        ended = await fleet.run(*words)
        assert ended.code == 1
        (said,) = ended.sentences
        assert "reports.progress.recipients: column at has the value 24:00:00 in the row of key 7, which" in said


async def test_a_key_without_an_address_and_an_address_of_two_keys_are_told(fleet):
    await fleet.connection.execute("INSERT INTO people (id, email) VALUES (1, 'a@x.com'), (2, NULL), (3, 'A@x.com')")
    ended = await fleet.run("generate")
    assert ended.code == 1
    assert any("recipient 2: there is no email address (it is NULL or empty); " in one for one in ended.sentences)
    assert any(
        "1 recipients have an address that another key has, too, such as A@x.com" in one for one in ended.sentences
    )
    fleet.recipients = "select '' as key, null as email"
    assert "recipient (no key, no email address): the key is empty" in (await fleet.run("generate")).err


async def test_people_who_cannot_be_written_to_are_named_and_the_others_go_on(fleet):
    await fleet.connection.execute(
        """INSERT INTO people (id, email, name) VALUES
          (1, 'p1@example.com', 'One'), (2, 'no-at-sign', 'Two'), (3, '', 'Three'), (4, NULL, 'Four'),
          (5, 'a@b@c', 'Five'), (6, E'x@example.com\\r\\nBcc: all@example.com', 'Six'), (7, 'sp ace@example.com', 'S'),
          (8, 'jürgen@example.com', 'Jürgen'), (9, 'x@münchen.example', 'IDN'), (10, ' padded@example.com ', NULL),
          (11, '<p11@example.com>', 'Eleven'), (12, 'a@example.com,b@example.com', 'Two at once')"""
    )
    ended = await fleet.run("generate")
    assert ended.code == 1
    named = {s.partition(", recipient ")[2].partition(": ")[0] for s in ended.sentences}
    assert named == {"2", "3", "4", "5", "6", "7", "11", "12"}, ended.err
    assert len(ended.sentences) == 8
    written_to = {"p1@example.com", "jürgen@example.com", "x@xn--mnchen-3ya.example", "padded@example.com"}
    assert set(await messages(fleet)) == written_to
    assert "4 made here, 0 elsewhere, 8 failed, of 12 recipients." in ended.out


async def test_people_without_a_key_are_named_by_their_address_and_each_one_is_counted(fleet):
    fleet.recipients = """select case when id < 3 then null when id = 3 then '' else id::text end as key, email
      from people order by id"""
    await fleet.hire(4)
    ended = await fleet.run("generate")
    assert ended.code == 1
    assert len(ended.sentences) == 3
    assert all(f"p{n}@example.com" in s and "key" in s for n, s in enumerate(ended.sentences, 1)), ended.err
    assert "1 made here, 0 elsewhere, 3 failed, of 4 recipients." in ended.out


async def test_a_key_that_comes_twice_is_named_and_gets_one_report(fleet):
    fleet.recipients = "select 'same' as key, email from people order by id"
    fleet.data = "select :key as said"
    await fleet.hire(2)
    ended = await fleet.run("generate")
    assert ended.code == 0
    (sentence,) = ended.sentences
    assert "recipient same comes twice" in sentence
    assert list(await messages(fleet)) == ["p1@example.com"]
    assert "1 made here, 0 elsewhere, 0 failed, of 1 recipients." in ended.out


# ── Python classes ───────────────────────────────────────────────────────────────────────────────────────────────────

TWO = "[Recipient('1', 'p1@example.com', 'One', {'team': 'red'}), Recipient('2', 'p2@example.com')]"
BUILD = "    def build(self, recipient, period):\n        return [{'said': f'for {recipient.key} in {period.key}'}]\n"
KINDS = {
    "a list": f"    def recipients(self, period):\n        return {TWO}\n",
    "a generator": f"    def recipients(self, period):\n        yield from {TWO}\n",
    "an async generator": f"    async def recipients(self, period):\n        for one in {TWO}: yield one\n",
    "an awaitable": f"    async def recipients(self, period):\n        return {TWO}\n",
    "mappings": "    def recipients(self, period):\n"
    "        return [{'key': 1, 'email': 'p1@example.com', 'name': None}, {'key': 2, 'email': 'p2@example.com'}]\n",
}


@pytest.mark.parametrize("kind", KINDS)
async def test_the_recipients_of_a_python_class_may_be(fleet, kind):
    source(fleet, "class Mine:\n" + KINDS[kind] + BUILD)
    ended = await fleet.run("generate", "--period", "2026-W47")
    assert (ended.code, ended.err) == (0, ""), ended
    found = await pages(fleet)
    assert list(found) == ["1", "2"]
    assert "for 2 in 2026-W47" in found["2"]


async def test_an_async_build_and_one_that_raises_and_one_that_forgets_to_return(fleet):
    source(
        fleet,
        f"class Mine:\n{KINDS['a list']}"
        "    async def build(self, recipient, period):\n"
        "        if recipient.key == '1':\n"
        "            raise LookupError('no such person')\n",
    )
    ended = await fleet.run("generate")
    assert ended.code == 1
    assert [s.partition(", recipient ")[2][:1] for s in ended.sentences] == ["1", "2"]
    assert "LookupError: no such person" in ended.sentences[0]


async def test_a_plain_build_may_block_for_longer_than_the_lease(fleet):
    fleet.top = "lease_s = 2\nguard_s = 1"
    source(
        fleet,
        f"import time\nclass Mine:\n{KINDS['a list']}"
        "    def build(self, recipient, period):\n"
        "        time.sleep(2.5 if recipient.key == '1' else 0)\n        return []\n",
    )
    ended = await fleet.run("generate")
    assert (ended.code, ended.err) == (0, ""), ended
    assert "2 made here" in ended.out


async def test_an_import_and_plain_recipients_may_block_for_longer_than_the_lease(fleet):
    fleet.top = "lease_s = 2\nguard_s = 1"
    source(
        fleet,
        "import time\ntime.sleep(2.5)\nclass Mine:\n"
        f"    def recipients(self, period):\n        time.sleep(2.5)\n        return {TWO}\n" + BUILD,
    )
    ended = await fleet.run("generate", deadline_s=15)
    assert (ended.code, ended.err) == (0, ""), ended
    assert "2 made here" in ended.out


async def test_an_async_build_that_blocks_the_loop_past_the_lease_costs_time_only(fleet):
    """The server takes the silent session for a dead one's; what was built meanwhile is made under the next one."""
    fleet.top = "lease_s = 2\nguard_s = 1"
    source(
        fleet,
        f"import time\nclass Mine:\n{KINDS['a list']}"
        "    async def build(self, recipient, period):\n        time.sleep(2.5)\n        return []\n",
    )
    crons = [await fleet.start("generate") for _ in range(2)]
    ended = [await cron.ended(60) for cron in crons]
    assert [one.code for one in ended] == [0, 0], ended
    assert list(await pages(fleet)) == ["1", "2"]
    assert sum(int(one.out.partition(" made here")[0].split()[-1]) for one in ended) == 2


@pytest.mark.parametrize("definition", ["def", "async def"])
async def test_a_build_that_wants_to_exit_costs_its_own_report_only(fleet, definition):
    source(
        fleet,
        f"import sys\nclass Mine:\n{KINDS['a list']}"
        f"    {definition} build(self, recipient, period):\n"
        "        if recipient.key == '1':\n            sys.exit(3)\n        return []\n",
    )
    ended = await fleet.run("generate")
    assert ended.code == 1
    (sentence,) = ended.sentences
    assert "SystemExit: 3" in sentence
    assert list(await pages(fleet)) == ["2"]


SLIPS = {
    "a next() of nothing": "def build(self, recipient, period):\n"
    "        return [next(iter([{'n': 1}] if recipient.key == '1' else []))]\n",
    "an exit while it yields": "def build(self, recipient, period):\n"
    "        if recipient.key == '2':\n            raise SystemExit(3)\n        yield {'n': 1}\n",
    "a task of its own that was cancelled": "async def build(self, recipient, period):\n"
    "        if recipient.key == '2':\n            task = asyncio.create_task(asyncio.sleep(10))\n"
    "            await asyncio.sleep(0)\n            task.cancel()\n            await task\n"
    "        return [{'n': 1}]\n",
}


@pytest.mark.parametrize("slip", SLIPS)
async def test_a_slip_of_a_build_costs_its_own_report_only(fleet, slip):
    source(fleet, f"import asyncio\nclass Mine:\n{KINDS['a list']}    {SLIPS[slip]}")
    ended = await fleet.run("generate")
    assert ended.code == 1
    (sentence,) = ended.sentences
    assert "recipient 2" in sentence
    assert list(await pages(fleet)) == ["1"]


async def test_recipients_that_run_out_of_something_are_one_sentence(fleet):
    source(fleet, f"class Mine:\n    def recipients(self, period):\n        return [next(iter([]))]\n{BUILD}")
    ended = await fleet.run("generate")
    assert ended.code == 1
    (sentence,) = ended.sentences
    assert "StopIteration" in sentence


async def test_a_build_that_yields_its_rows_may_block_for_longer_than_the_lease(fleet):
    fleet.top = "lease_s = 2\nguard_s = 1"
    source(
        fleet,
        f"import time\nclass Mine:\n{KINDS['a list']}    def build(self, recipient, period):\n"
        "        time.sleep(2.5)\n        yield {'n': 1}\n",
    )
    ended = await fleet.run("generate")
    assert (ended.code, ended.err) == (0, ""), ended


@pytest.mark.parametrize("definition", ["def", "async def"])
async def test_a_generate_whose_build_hangs_can_be_interrupted(fleet, definition):
    source(
        fleet,
        f"import pathlib, time\nclass Mine:\n{KINDS['a list']}    {definition} build(self, recipient, period):\n"
        "        pathlib.Path('begun').touch()\n        time.sleep(1000)\n",
    )
    cron = await fleet.start("generate")
    await until((fleet.directory / "begun").exists, "a build is under way")
    cron.send(signal.SIGINT)
    assert (await cron.ended(8)).code == 130


async def test_names_and_keys_of_python_objects_are_taken_as_a_query_would_give_them(fleet):
    source(
        fleet,
        "class Mine:\n    def recipients(self, period):\n"
        "        yield Recipient(1, 'p1@example.com', None)\n"
        "        yield Recipient('2', None)\n        yield Recipient('3', 'p3@example.com')\n" + BUILD,
    )
    ended = await fleet.run("generate")
    assert ended.code == 1
    (sentence,) = ended.sentences
    assert ", recipient 2: " in sentence
    assert list(await pages(fleet)) == ["1", "3"]


async def test_rows_within_a_mapping_are_shown_like_rows_alone(fleet):
    source(
        fleet,
        f"class Mine:\n{KINDS['a list']}    def build(self, recipient, period):\n"
        "        return {'rows': [{'said': 'this is shown'}], 'title': 'Another title'}\n",
    )
    assert (await fleet.run("generate")).code == 0
    page = (await pages(fleet))["1"]
    assert "this is shown" in page
    assert "Another title" in page


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(None, id="no such module"),
        pytest.param("class Other: pass", id="no such class"),
        pytest.param("def broken(:", id="a syntax error"),
        pytest.param("import nothing_of_that_name", id="an import that fails"),
        pytest.param("class Mine:\n    def recipients(self, period): return []", id="no build"),
        pytest.param(
            "class Mine:\n    def __init__(self): raise OSError('secret store')", id="a constructor that raises"
        ),
        pytest.param("class Mine:\n    def recipients(self, period): 1 / 0\n" + BUILD, id="recipients that raise"),
        pytest.param(
            "class Mine:\n    def recipients(self, period): return None\n" + BUILD, id="recipients of no kind"
        ),
        pytest.param(
            "class Mine:\n    def recipients(self, period): return [1]\n" + BUILD, id="recipients of a wrong kind"
        ),
        pytest.param(
            "class Mine:\n    def recipients(self, period): return [{'email': 'a@example.com'}]\n" + BUILD, id="no key"
        ),
    ],
)
async def test_a_class_that_cannot_be_used_is_one_sentence(fleet, code):
    fleet.source = "mine:Mine"
    if code is not None:
        source(fleet, code)
    ended = await fleet.run("generate")
    assert ended.code == 1
    (sentence,) = ended.sentences
    assert sentence.startswith("reports.progress.source: ")
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.report") == 0


# ── templates ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_further_columns_reach_the_users_templates_and_the_others_stay_packaged(fleet):
    fleet.recipients = "select id::text as key, email, name, 'red' as team from people"
    await fleet.connection.execute(PEOPLE)
    template(fleet, "subject.txt.j2", "{{ recipient.team }} team, {{ recipient.name or 'you' }}, {{ period.key }}\n")
    ended = await fleet.run("generate", "--period", "2026-W47")
    assert (ended.code, ended.err) == (0, ""), ended
    found = await messages(fleet)
    assert "\r\nSubject: red team, One, 2026-W47\r\n" in found["p1@example.com"]
    assert "\r\nSubject: red team, you, 2026-W47\r\n" in found["p3@example.com"]
    assert "Open the full report" in found["p1@example.com"]


async def test_a_template_that_cannot_be_compiled_is_one_sentence_with_file_and_line_and_makes_nothing(fleet):
    path = template(fleet, "email.html.j2", "<p>\n\n{% if %}\n")
    await fleet.hire(2)
    ended = await fleet.run("generate")
    assert ended.code in (1, 2)
    (sentence,) = ended.sentences
    assert f"{path}, line 3" in sentence
    assert await fleet.connection.fetchval("SELECT count(*) FROM outbox.report") == 0


async def test_a_template_that_raises_for_one_recipient_names_him_with_file_and_line(fleet):
    fleet.recipients = "select id::text as key, id, email, name from people"
    path = template(fleet, "report.html.j2", "<h1>{{ recipient.name }}</h1>\n{{ 10 // (recipient.id - 2) }}\n")
    await fleet.connection.execute(PEOPLE)
    ended = await fleet.run("generate")
    assert ended.code == 1
    (sentence,) = ended.sentences
    assert f"recipient 2: {path}, line 2: ZeroDivisionError" in sentence
    assert await pages(fleet) == {"1": "<h1>One</h1>\n-10\n", "3": "<h1></h1>\n10\n"}


async def test_a_name_that_a_template_misspells_is_an_error_and_no_hole_in_the_mail(fleet):
    template(fleet, "email.txt.j2", "Dear {{ recipient.nmae }}\n")
    await fleet.connection.execute(PEOPLE)
    ended = await fleet.run("generate")
    assert ended.code == 1
    assert len(ended.sentences) == 3
    assert all("nmae" in s and "line 1" in s for s in ended.sentences)


async def test_what_people_call_themselves_cannot_inject_markup_into_pages(fleet):
    await fleet.connection.execute("INSERT INTO people VALUES (1, 'p1@example.com', '<script>alert(1)</script>')")
    fleet.data = "select '<img src=x onerror=alert(1)>' as said, :key as key"
    await fleet.run("generate")
    page = (await pages(fleet))["1"]
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page


async def test_pages_that_take_long_to_render_do_not_outlast_the_lease(fleet):
    """A batch of pages is rendered between two statements; the session has to stay alive meanwhile."""
    fleet.top = "lease_s = 2\nguard_s = 1"
    template(fleet, "report.html.j2", "{% for n in range(45000) %}{{ n }}{% endfor %}")
    fleet.data = "select :key as key"
    # All in one bucket, so that they come in one batch.
    keys = [key for key in map(str, range(20_000)) if bucket_of(key) == 0][:100]
    listed = ", ".join(f"('{key}')" for key in keys)
    fleet.recipients = f"select key, 'k' || key || '@example.com' as email from (values {listed}) as v (key)"
    ended = await fleet.run("generate", deadline_s=20)
    assert (ended.code, ended.err) == (0, ""), ended.err

"""How dates, numbers and phrases are written for readers of different languages."""

import string
from datetime import date, datetime, time, timedelta
from decimal import Decimal

import pytest
from babel import Locale

from outbox.reports.language import ENGLISH, find
from outbox.reports.number_format import percent_of
from outbox.reports.table import table_of
from outbox.reports.translations import PHRASES
from outbox.reports.values import cell
from outbox.settings import Settings

MONDAY, NEXT = datetime(2026, 11, 16), datetime(2026, 11, 23)  # noqa: DTZ001 - civil times of any zone
NNBSP, NBSP, MINUS = "\N{NARROW NO-BREAK SPACE}", "\N{NO-BREAK SPACE}", "\N{MINUS SIGN}"


def language(tag):
    found = find(tag)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("tag", "week", "two_months", "month", "moment", "last_year", "number", "percent"),
    [
        ("en", "16 – 22 November 2026", "30 November – 6 December 2026", "November 2026", "Mon 16 Nov 09:05",
         "16 Nov 2025", f"{MINUS}1{NNBSP}234{NNBSP}567.5", "42%"),
        ("en_US", "November 16 – 22, 2026", "November 30 – December 6, 2026", "November 2026",
         f"Mon, Nov 16, 9:05{NNBSP}AM", "Nov 16, 2025", f"{MINUS}1,234,567.5", "42%"),
        ("de", "16.–22. November 2026", "30. November – 6. Dezember 2026", "November 2026", "Mo., 16. Nov., 09:05",
         "16. Nov. 2025", f"{MINUS}1.234.567,5", f"42{NBSP}%"),
        ("de_CH", "16.–22. November 2026", "30. November – 6. Dezember 2026", "November 2026", "Mo., 16. Nov., 09:05",
         "16. Nov. 2025", f"{MINUS}1’234’567.5", "42%"),
        ("fr", "16–22 novembre 2026", "30 novembre – 6 décembre 2026", "novembre 2026", "lun. 16 nov. 09:05",
         "16 nov. 2025", f"{MINUS}1{NNBSP}234{NNBSP}567,5", f"42{NBSP}%"),
        ("pt-BR", "16–22 de novembro de 2026", "30 de novembro – 6 de dezembro de 2026", "novembro de 2026",
         "seg., 16 de nov. 09:05", "16 de nov. de 2025", f"{MINUS}1.234.567,5", "42%"),
        ("hi", "16–22 नवंबर 2026", "30 नवंबर – 6 दिसंबर 2026", "नवंबर 2026", "सोम, 16 नव॰, 9:05 am",
         "16 नव॰ 2025", f"{MINUS}12,34,567.5", "42%"),
        ("ja", "2026年11月16日～22日", "2026年11月30日～12月6日", "2026年11月", "11月16日(月) 9:05",
         "2025年11月16日", f"{MINUS}1,234,567.5", "42%"),
        ("he", "16–22 בנובמבר 2026", "30 בנובמבר – 6 בדצמבר 2026", "נובמבר 2026", "יום ב׳, 16 בנוב׳, 9:05",
         "16 בנוב׳ 2025", f"\N{LEFT-TO-RIGHT MARK}{MINUS}1,234,567.5", "42%"),
    ],
)  # fmt: skip
def test_dates_and_numbers_are_as_the_reader_writes_them(
    tag, week, two_months, month, moment, last_year, number, percent
):
    reader = language(tag)
    later = datetime(2026, 11, 30), datetime(2026, 12, 7)  # noqa: DTZ001
    assert reader.label(MONDAY, NEXT, "weekly") == week
    assert reader.label(*later, "weekly") == two_months
    assert reader.label(datetime(2026, 11, 1), datetime(2026, 12, 1), "monthly") == month  # noqa: DTZ001
    assert cell(datetime(2026, 11, 16, 9, 5), None, 2026, reader) == moment  # noqa: DTZ001
    assert cell(date(2025, 11, 16), None, 2026, reader) == last_year
    assert cell(Decimal("-1234567.5"), None, 2026, reader) == number
    assert cell(1234, None, 2026, reader) == "1234", "four figures may be a year"
    assert percent_of(0.42, 0, reader) == percent


def test_a_column_of_figures_aligns_in_any_language():
    rows = [{"who": "a", "hours": 1.5}, {"who": "b", "hours": 12000.25}, {"who": "c", "hours": None}]
    shown = table_of(["who", "hours"], rows, starts_at=MONDAY, language=language("de"))
    assert [row.cells[1] for row in shown.rows] == ["1,50", "12.000,25", "–"]
    assert shown.totals == ["Summe", "12.001,75"]
    assert [column.total for column in shown.headline] == ["12.001,75"]


def test_years_days_and_durations_never_fail_in_any_language_that_there_is():
    for tag in ("ar", "fa", "zh-Hant-TW", "ko", "th", "hu", "eu", "lt", "vi", "ru", "tr", "fi", "cs", "bn", "am", "ur"):
        reader = language(tag)
        for starts_at, days in ((MONDAY, 7), (datetime(2026, 12, 28), 7), (MONDAY, 1)):  # noqa: DTZ001
            ends_at = starts_at + timedelta(days=days)
            said = reader.label(starts_at, ends_at, "weekly" if days == 7 else "daily")
            assert str(starts_at.day) in said
        for value in (date.max, time(23, 59), timedelta(seconds=-61), datetime(1, 1, 1), True, b"abc"):  # noqa: DTZ001
            assert cell(value, None, 2026, reader)


@pytest.mark.parametrize(
    ("tag", "found"),
    [
        ("en", "en"), ("EN", "en"), ("en-XX", "en"), ("de", "de"), ("de-XX", "de"), ("de_Latn_CH", "de-CH"),
        ("pt_br", "pt-BR"), ("en_US.UTF-8", "en-US"), ("de_DE@euro", "de-DE"), (" fr-CA ", "fr-CA"), ("no", "nb"),
        ("zh-TW", "zh-Hant-TW"), ("iw", "he"),
        ("", None), ("xx", None), ("C", None), ("POSIX", None), ("und", None), ("../../etc/passwd", None),
        ("de; drop table", None), ("d" * 10_000, None), ("de\0", None), ("日本", None), ("12", None), ("_", None),
    ],
)  # fmt: skip
def test_a_tag_names_the_nearest_language_or_none(tag, found):
    reader = find(tag)
    assert (reader and reader.tag) == found


def test_there_is_one_object_for_each_language():
    assert find("de_DE") is find("de-DE.UTF-8")
    assert find("en-XX") is ENGLISH


def names(phrase):
    texts = [phrase] if isinstance(phrase, str) else phrase.values()
    return [sorted(name for _, name, _, _ in string.Formatter().parse(text) if name) for text in texts]


@pytest.mark.parametrize("tag", PHRASES)
def test_each_language_says_every_phrase_with_all_that_is_given_in_every_plural(tag):
    mine, english = PHRASES[tag], PHRASES["en"]
    assert mine.keys() == english.keys()
    for phrase, text in mine.items():
        assert isinstance(text, str) == isinstance(english[phrase], str), phrase
        if isinstance(text, str):
            assert names(text) == names(english[phrase])
        else:
            assert text.keys() == {*Locale.parse(tag).plural_form.tags, "other"}, phrase
            # one may say the number in words, where one means one
            assert all(found == ["n"] for form, (found,) in ((f, names(t)) for f, t in text.items()) if form != "one")
    reader = language(tag)
    for count in (1, 2, 5, 21, 22, 101, 1_000_000):
        assert "{" not in reader.say("more rows", n=count)
    assert "12" in reader.say("digest more", n=12_000)


def test_plurals_follow_the_language():
    polish = language("pl")
    assert [polish.say("bytes", n=count) for count in (1, 2, 5, 22)] == ["1 bajt", "2 bajty", "5 bajtów", "22 bajty"]
    assert ENGLISH.say("bytes", n=1) == "1 byte"
    assert language("fr").say("bytes", n=1_000_000) == f"1{NNBSP}000{NNBSP}000 d’octets"


def test_without_a_translation_the_words_are_english_and_the_dates_are_not():
    hebrew = language("he")
    assert (hebrew.direction, hebrew.spoken, hebrew.is_translated) == ("rtl", "en", False)
    week = hebrew.label(MONDAY, NEXT, "weekly")
    assert hebrew.say("here", period=week) == f"Here is your report for \N{FIRST STRONG ISOLATE}{week}\u2069."
    assert language("ru").say("more rows", n=22) == "… and 22 more rows in the full report."
    assert language("en-GB").is_translated
    assert language("de-AT").spoken == "de"


def test_a_locale_of_the_settings_that_names_no_language_is_refused():
    report = {"link": "https://example.com/{token}", "recipients": "select 1", "data": "select 1 where :key = ''"}
    assert Settings(reports={"a": report | {"locale": "de-CH"}}).report("a").locale == "de-CH"
    with pytest.raises(ValueError, match='"deutsch" names no language; write one like en, de'):
        Settings(reports={"a": report | {"locale": "deutsch"}})


@pytest.mark.parametrize(
    ("starts", "ends", "cadence", "said"),
    [
        ((2026, 11, 16), (2026, 11, 23), "weekly", "16 \u2013 22 November 2026"),
        ((2026, 11, 30), (2026, 12, 7), "weekly", "30 November \u2013 6 December 2026"),
        ((2026, 12, 28), (2027, 1, 4), "weekly", "28 December 2026 \u2013 3 January 2027"),
        ((2026, 11, 24), (2026, 11, 25), "daily", "24 November 2026"),
        ((2026, 11, 1), (2026, 12, 1), "monthly", "November 2026"),
    ],
)
def test_a_period_is_said_as_a_person_says_it(starts, ends, cadence, said):
    assert ENGLISH.label(datetime(*starts), datetime(*ends), cadence) == said  # noqa: DTZ001

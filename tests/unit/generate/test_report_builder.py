"""Reports from a recipient and content, without a database."""

from datetime import UTC, datetime
from email import message_from_bytes, policy

import pytest

from outbox.errors import SourceError
from outbox.generate.recipients import Recipient
from outbox.generate.report_builder import CollectedReport, NewReport, ReportBuilder, check_size
from outbox.mail.mailbox import Mailbox
from outbox.reports.period import Cadence, period_of
from outbox.settings import DIGEST, ReportSettings

NOW = datetime(2026, 11, 30, 11, tzinfo=UTC)
ANN = Recipient("42", "ann@example.com", "Ann", {"team": "red"})
ROWS = [{"day": "Monday", "done": 3}]


@pytest.fixture
def builder(tmp_path):
    def made(name="progress", **settings):
        settings = {
            "link": "https://r.example.com/{token}",
            "recipients": "select 1",
            "data": "select :key",
            **settings,
        }
        report = ReportSettings(**settings)
        period = period_of("2026-W48", cadence=Cadence.WEEKLY, timezone=report.zone)
        sender = Mailbox("Reports", "reports@example.com")
        return ReportBuilder(name, report, period, sender=sender, templates=tmp_path, now=NOW)

    return made


def template(directory, name, source):
    (directory / name).write_text(source)


def test_a_report_has_its_page_its_email_and_the_key_that_makes_the_email_one(builder):
    made = builder().build(ANN, ROWS, "secret", 7)
    assert isinstance(made, NewReport)
    assert (made.key, made.address, made.sender) == ("progress/2026-W48/42", "ann@example.com", "reports@example.com")
    email = message_from_bytes(made.message, policy=policy.default)
    assert email["Message-ID"] == made.message_id
    assert made.message_id.startswith("<7.")
    assert email["Date"].datetime == NOW
    assert "https://r.example.com/secret" in email.get_body(("plain",)).get_content()
    assert "Monday" in made.html


def test_a_report_that_a_digest_collects_has_no_email(builder):
    made = builder(deliver="digest").build(ANN, ROWS, "secret", 0)
    assert isinstance(made, CollectedReport)
    assert (made.key, made.address, made.link) == (
        "progress/2026-W48/42", "ann@example.com", "https://r.example.com/secret",
    )  # fmt: skip


def test_the_email_of_a_digest_keeps_the_reports_that_it_names(builder):
    row = {"report": "sales", "title": "Sales", "period": "2026-W48", "link": "x", "made_at": NOW, "waiting": 2}
    assert builder(DIGEST).build(ANN, [{**row, "id": 5}, {**row, "id": 6}], "secret", 1).items == [5, 6]


def test_columns_of_the_recipients_query_reach_the_templates_and_a_mapping_adds_names(builder, tmp_path):
    template(tmp_path, "report.html.j2", "{{ recipient.team }} {{ period }} {{ total }} {{ rows|length }}")
    made = builder().build(ANN, {"total": 9, "rows": ROWS}, "secret", 1)
    assert made.html == "red 23 \N{EN DASH} 29 November 2026 9 1\n"


def test_a_locale_chooses_the_language_and_only_the_first_unknown_one_is_logged(builder, caplog):
    built = builder()
    assert built.language_of(Recipient("1", "a@b", "", {"locale": "de"})).tag == "de"
    for locale in ("xx-unknown", 5, None, ""):
        assert built.language_of(Recipient("1", "a@b", "", {"locale": locale})).tag == "en"
    assert [record.getMessage() for record in caplog.records] == [
        "recipient 1: the locale 'xx-unknown' names no language, so the report is in en; further ones are not named"
    ]


def test_templates_are_read_when_they_are_needed(builder, tmp_path):
    template(tmp_path, "email.txt.j2", "{% if %}")
    built = builder()
    with pytest.raises(SourceError, match=r"email\.txt\.j2"):
        built.read_templates()


def test_what_the_database_would_refuse_is_refused_before(builder):
    made = builder().build(ANN, ROWS, "secret", 1)
    check_size(made, len(made.message))
    with pytest.raises(ValueError, match=r"more than message_bytes_max \(10\)"):
        check_size(made, 10)
    long = builder().build(Recipient("k" * 1000, "ann@example.com"), ROWS, "secret", 1)
    with pytest.raises(ValueError, match="an email key of more than 1000 octets"):
        check_size(long, 10**7)

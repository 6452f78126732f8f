import pytest

from tests.support.settings_files import REPORT, faults, read


def test_the_digest_is_a_report_without_queries_that_must_be_there_when_one_is_collected():
    collected, link = REPORT + 'deliver = "digest"\n', 'link = "https://x/{token}"\n'
    settings = read(f"{collected}[digest]\n{link}")
    assert settings.reports["progress"].is_collected
    assert settings.report("digest") == settings.digest
    assert (settings.digest.title, settings.digest.cadence, settings.digest.is_collected) == (
        "Your reports",
        "weekly",
        False,
    )
    assert read(collected, OUTBOX_DIGEST=f"{{{link.strip()}}}").digest == settings.digest
    assert list(settings.editions) == ["progress", "digest"]
    (missing,) = faults(collected)
    assert missing.startswith(
        'digest: is missing, but reports.progress has deliver = "digest"; write a table [digest] '
    )
    wrong = faults(f'{collected}send_before = "2h"\n[digest]\n{link}data = "x"\ncadense = "daily"')
    assert [fault.partition(";")[0] for fault in wrong] == [
        "reports.progress.deliver: stands beside send_before, but the report has no email of its own",
        "digest.data: is not a key that outbox knows",
        "digest.cadense: is not a key that outbox knows",
    ]
    assert faults(REPORT.replace("[reports.progress]", "[reports.digest]")) == [
        "reports: no report can be called digest, since that is the name of the digest; call it otherwise."
    ]


@pytest.mark.parametrize(
    "name",
    ["localtime", "right/America/New_York", "posix/UTC", "America", "../UTC", "/etc/localtime", "", "utc+1"],
)
def test_a_zone_that_servers_may_read_differently_is_refused(name):
    (fault,) = faults(f'{REPORT}timezone = "{name}"')
    assert fault.startswith(f'reports.progress.timezone: "{name}" is no IANA timezone;')


def test_a_query_may_cast_and_use_keys_for_a_batch():
    data = "select key from t where key = any(:keys) and day >= :starts_at::date"
    assert read(REPORT.replace("select day from progress where person_id = cast(:key as int)", data))

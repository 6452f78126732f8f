import logging

import pytest

from outbox.database import opening
from outbox.database.opening import ignored_parameters, lease_settings
from outbox.settings.urls import DatabaseUrl


@pytest.fixture(autouse=True)
def nothing_was_ignored(monkeypatch):
    monkeypatch.setattr(opening, "_ignored", opening._Ignored())


@pytest.mark.parametrize(
    "words",
    [
        'unrecognized configuration parameter "frobnicate"',
        "nicht erkannter Konfigurationsparameter »frobnicate«",
        "paramètre de configuration « frobnicate » non reconnu".replace("« ", "«").replace(" »", "»"),
    ],
)
def test_a_setting_that_the_server_does_not_know_is_found_in_its_sentence_in_any_language(words):
    assert opening._unrecognized(ValueError(words), ["jit", "frobnicate"]) == "frobnicate"
    assert opening._unrecognized(ValueError(words), ["jit"]) == ""


def test_an_ignored_parameter_is_logged_once(caplog):
    url = DatabaseUrl.parse("postgresql://a@b/c?schema=app&frobnicate=1")
    for _ in range(2):
        opening._ignored.note_unknown("frobnicate")
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert [sentence.split()[1] for sentence in ignored_parameters(url)] == ["schema", "frobnicate"]


def test_a_lease_ends_a_session_after_its_time_and_a_statement_only_where_asked_to():
    lease = lease_settings(2.5, statements_too=False)
    assert lease["idle_session_timeout"] == lease["idle_in_transaction_session_timeout"] == "2500"
    assert "statement_timeout" not in lease
    both = lease_settings(2.5, statements_too=True)
    assert (both["statement_timeout"], both["lock_timeout"]) == ("2500", "1250")

from pathlib import Path

import pytest

from outbox.errors import ConfigurationError
from outbox.settings import WhenInDoubt, load
from outbox.trust import distrust_of
from tests.support.settings_files import LINK, SECRET, WHOLE, faults, read


def test_a_variable_wins_over_the_whole_key_of_the_file():
    settings = read(
        WHOLE + "[retry]\nattempts_max = 3",
        OUTBOX_DATABASE_URL="postgres://other/app",
        OUTBOX_LEASE_S="20.5",
        OUTBOX_IN_DOUBT="resend",
        OUTBOX_RETRY="{base_s = 1}",
        OUTBOX_REPORTS=f'{{other = {{source = "a:B", link = "{LINK}"}}}}',
    )
    assert str(settings.database_url) == "postgresql://other/app"
    assert (settings.lease_s, settings.in_doubt) == (20.5, WhenInDoubt.RESEND)
    assert (settings.retry.base_s, settings.retry.attempts_max) == (1, 12)
    assert list(settings.reports) == ["other"]


def test_a_secret_may_stand_in_a_file_that_a_variable_names():
    Path("secret").write_text(f"postgres://bob:{SECRET}@db/app\n")
    Path("empty").write_text(" \n")
    settings = read(WHOLE, OUTBOX_DATABASE_URL_FILE="secret", OUTBOX_SMTP_URL_FILE=" ")
    assert settings.database_url is not None
    assert settings.database_url.dsn == f"postgresql://bob:{SECRET}@db/app"
    assert str(settings.smtp_url) == "smtp://mail:25"
    settings = read(WHOLE, OUTBOX_DATABASE_URL_FILE="nothing-here", OUTBOX_DATABASE_URL="postgresql:///app")
    assert str(settings.database_url) == "postgresql:///app"
    with pytest.raises(ConfigurationError) as caught:
        read(WHOLE, OUTBOX_DATABASE_URL_FILE="nothing-here", OUTBOX_SMTP_URL_FILE="empty")
    assert caught.value.faults == [
        (
            "OUTBOX_DATABASE_URL_FILE: nothing-here cannot be read (No such file or directory); "
            "name a file that this user can read."
        ),
        "OUTBOX_SMTP_URL_FILE: empty is empty; write the value into it.",
    ]


def test_a_variable_that_is_empty_or_unknown_changes_nothing():
    settings = read(WHOLE, OUTBOX_DATABASE_URL="", OUTBOX_LEASE_S=" ", OUTBOX_SHOE_SIZE="9", OUTBOX_DIRECTORY="/x")
    assert settings == read(WHOLE)


def test_the_file_is_the_one_of_the_argument_else_of_the_variable_else_of_the_directory(here):
    for name, lease_s in (("outbox", 11), ("variable", 12), ("argument", 13)):
        (here / name).mkdir()
        (here / name / "my.toml").write_text(f"lease_s = {lease_s}")
    (here / "outbox.toml").write_text("lease_s = 10")
    environ = {"OUTBOX_CONFIG": "variable/my.toml"}
    assert load(Path("argument/my.toml"), environ).lease_s == 13
    assert load(environ=environ).lease_s == 12
    assert load(environ={}).lease_s == 10
    assert load(environ=environ).directory == here / "variable"
    assert load(environ={}).directory == here


def test_a_file_that_somebody_puts_there_after_it_was_looked_for_is_not_read(here, monkeypatch):
    """As another user can in /tmp: between the look at who may write the file and its opening."""

    def looked_at_just_before(path):
        try:
            return distrust_of(path)
        finally:
            (here / "outbox.toml").write_text("lease_s = 77")

    with monkeypatch.context() as patch:
        patch.setitem(load.__globals__, "distrust_of", looked_at_just_before)
        assert load(environ={}).lease_s != 77
    assert load(environ={}).lease_s == 77


def test_without_any_file_the_variables_are_enough(here):
    settings = load(environ={"OUTBOX_DATABASE_URL": "postgresql:///app"})
    settings.require("database_url")
    assert settings.directory == here


def test_a_file_that_was_named_must_be_there():
    with pytest.raises(ConfigurationError) as caught:
        load(Path("x.toml"), {})
    assert caught.value.faults == ["--config: x.toml does not exist; name a file that does."]
    with pytest.raises(ConfigurationError) as caught:
        load(environ={"OUTBOX_CONFIG": "y.toml"})
    assert caught.value.faults == ["OUTBOX_CONFIG: y.toml does not exist; name a file that does."]


def test_a_file_that_cannot_be_read_is_a_fault(here):
    with pytest.raises(ConfigurationError) as caught:
        load(here, {})
    assert caught.value.faults == [f"{here}: cannot be read (Is a directory); make it a file that this user can read."]
    Path("outbox.toml").write_bytes(b'sender = "a@b"\ntitle = "\xff"')
    with pytest.raises(ConfigurationError) as caught:
        load(environ={})
    assert caught.value.faults == ["outbox.toml, line 2: is not UTF-8; save the file as UTF-8."]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_byte_order_mark_and_line_ends_of_windows_are_no_part_of_the_settings(here, newline):
    (here / "outbox.toml").write_bytes(b"\xef\xbb\xbf" + WHOLE.replace("\n", newline).encode())
    (here / "url").write_bytes(b"\xef\xbb\xbfsmtp://other:25" + newline.encode())
    (here / "reports").write_bytes(b'\xef\xbb\xbf{weekly = {link = "https://x/{token}", source = "a:B"}}')
    settings = load(environ={"OUTBOX_SMTP_URL_FILE": "url", "OUTBOX_REPORTS_FILE": "reports"})
    assert settings.sender == "Progress reports <reports@example.com>"
    assert (settings.smtp_url.host, list(settings.reports)) == ("other", ["weekly"])
    (here / "outbox.toml").write_bytes(b"\xef\xbb\xbfa = 1\nb = J\xfc")
    assert faults_of({}) == ["outbox.toml, line 2: is not UTF-8; save the file as UTF-8."]
    (here / "outbox.toml").write_bytes("sender = 'a'".encode("utf-16"))
    assert faults_of({}) == ["outbox.toml, line 1: is not UTF-8; save the file as UTF-8."]


def faults_of(environ):
    with pytest.raises(ConfigurationError) as caught:
        load(environ=environ)
    return caught.value.faults


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (f"a = 1\ndatabase_url = postgresql://bob:{SECRET}@db", "outbox.toml, line 2, column 16"),
        (f'smtp_url = "smtp://bob:{SECRET}@mail', "outbox.toml, last line"),
    ],
)
def test_a_file_that_is_not_toml_says_the_line_and_no_secret(text, where):
    (fault,) = faults(text)
    assert fault.startswith(f"{where}: is not TOML (")
    assert fault.endswith("); correct it there or in the line before.")
    assert SECRET not in fault

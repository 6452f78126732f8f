import os
import pickle
import time
from pathlib import Path

import pytest

from outbox.settings import load
from outbox.settings.secret_files import age_s


def settings_of(path: Path, **variables: str):
    return load(path if path.exists() else None, {f"OUTBOX_{key}": str(value) for key, value in variables.items()})


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outbox.toml"


def test_a_changed_file_gives_the_new_login_of_the_database(config, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("postgresql://app:old@db/app")
    url = settings_of(config, DATABASE_URL_FILE=secret).database_url
    assert url.login.renew() is None
    secret.write_text("postgresql://app:new@db/app\n")
    assert url.login.has_changed()
    assert url.login.renew().dsn == "postgresql://app:new@db/app"
    assert url.login.current.dsn == "postgresql://app:new@db/app"
    assert not url.login.has_changed()
    assert url.login.renew() is None


def test_a_file_that_changed_before_the_first_refusal_is_noticed(config, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("postgresql://app:old@db/app")
    url = settings_of(config, DATABASE_URL_FILE=secret).database_url
    secret.write_text("postgresql://app:new@db/app")
    assert url.login.has_changed()
    assert url.login.renew().dsn.startswith("postgresql://app:new@")


@pytest.mark.parametrize("name, text, field", [
    ("smtp_url", 'smtp_url = "smtp://app:{}@mail:587"', ""),
    ("routes", 'smtp_url = "smtp://mail:25"\n[routes.bulk]\nsmtp_url = "smtp://app:{}@bulk:587"', "bulk"),
])  # fmt: skip
def test_a_login_in_the_settings_file_is_read_again_for_each_route(config, name, text, field):
    config.write_text(text.format("old"))
    login = settings_of(config).smtp_login(field)
    assert login.current.password == "old"
    config.write_text(text.format("new-one"))
    assert login.renew().password == login.current.password == "new-one"


def test_routes_of_a_variables_file_are_read_again(config, tmp_path):
    secret = tmp_path / "routes"
    config.write_text('smtp_url = "smtp://mail:25"')
    secret.write_text('{bulk = {smtp_url = "smtps://app:old@bulk"}}')
    login = settings_of(config, ROUTES_FILE=secret).on_route("bulk").smtp_login("bulk")
    secret.write_text('{bulk = {smtp_url = "smtps://other:newer@bulk"}}')
    assert (login.renew().username, login.current.password) == ("other", "newer")


def test_a_secret_that_kubernetes_replaces_is_noticed(config, tmp_path):
    """Kubernetes writes the new files into a new directory and turns one symbolic link to it."""
    for version, password in ("1", "old"), ("2", "new"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "url").write_text(f"postgresql://app:{password}@db/app")
        os.utime(tmp_path / version / "url", (1, 1))
    (tmp_path / "data").symlink_to("1")
    url = settings_of(config, DATABASE_URL_FILE=tmp_path / "data" / "url").database_url
    assert url.login.renew() is None
    (tmp_path / "turned").symlink_to("2")
    (tmp_path / "turned").replace(tmp_path / "data")
    assert url.login.has_changed()
    assert "new" in url.login.renew().dsn


@pytest.mark.parametrize("text", [
    "", "postgresql://app:new@elsewhere/app", "postgresql://app:new@db/other", "mysql://app:new@db/app", None,
    "postgresql://app:new@db/app?sslmode=disable",
])  # fmt: skip
def test_another_server_and_a_file_that_cannot_be_used_keep_the_login(config, tmp_path, text):
    secret = tmp_path / "secret"
    secret.write_text("postgresql://app:old@db/app")
    url = settings_of(config, DATABASE_URL_FILE=secret).database_url
    secret.unlink() if text is None else secret.write_text(text)
    assert url.login.renew() is None
    assert url.login.current.dsn == url.dsn
    assert url.login.problem
    assert "new" not in url.login.problem.replace("now names", "")
    secret.write_text("postgresql://app:new@db/app")
    assert url.login.renew() is not None
    assert url.login.problem == ""


def test_a_login_for_another_mail_server_is_not_taken(config):
    config.write_text('smtp_url = "smtp://app:old@mail:587"')
    login = settings_of(config).smtp_login("")
    config.write_text('smtp_url = "smtp://app:newer@mail:25"')
    assert login.renew() is None
    assert "restart" in login.problem


def test_settings_without_files_have_nothing_to_read_again(config):
    settings = settings_of(config, DATABASE_URL="postgresql://app:old@db/app", SMTP_URL="smtp://mail:25")
    assert settings.database_url.login is None
    assert not settings.smtp_login("").has_changed()
    assert settings.smtp_login("").renew() is None


def test_sources_show_no_secret_and_settings_with_one_can_be_copied(config, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("postgresql://app:old-secret@db/app")
    settings = settings_of(config, DATABASE_URL_FILE=secret)
    assert pickle.loads(pickle.dumps(settings)) == settings
    for shown in (repr(settings), repr(settings.database_url), repr(settings.database_url.login)):
        assert "old-secret" not in shown


def test_relative_paths_are_those_of_the_start(config, tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("postgresql://app:old@db/app")
    config.write_text('sender = "a@example.com"')
    url = load(Path("outbox.toml"), {"OUTBOX_DATABASE_URL_FILE": "secret"}).database_url
    (tmp_path / "secret").write_text("postgresql://app:new@db/app")
    monkeypatch.chdir("/")
    assert url.login.renew().dsn == "postgresql://app:new@db/app"


def test_the_age_is_that_of_the_newest_file_and_a_file_that_is_gone_has_none(tmp_path):
    old, new, gone = tmp_path / "old", tmp_path / "new", tmp_path / "gone"
    old.write_text("")
    new.write_text("")
    os.utime(old, (1, 1))
    os.utime(new, (time.time() - 3600, time.time() - 3600))
    assert age_s((old, new, gone)) == pytest.approx(3600, abs=600)
    assert age_s((gone,)) is None
    assert age_s((old / "below",)) is None

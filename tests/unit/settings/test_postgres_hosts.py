import pytest

from outbox.settings.postgres_hosts import Host, plan_of
from outbox.settings.urls import DatabaseUrl


@pytest.mark.parametrize("dsn, hosts", [
    ("postgresql://u:p@a,b:6432,[::1]:7432/d", [Host("a", 5432), Host("b", 6432), Host("::1", 7432)]),
    ("postgresql:///d?host=a,b&port=1,2", [Host("a", 1), Host("b", 2)]),
    ("postgresql:///d?host=a,b&port=6432", [Host("a", 6432), Host("b", 6432)]),
    ("postgresql:///d?host=/run/one,/run/two", [Host("/run/one", 5432), Host("/run/two", 5432)]),
    ("postgresql://%2Frun%2Fone/d", [Host("/run/one", 5432)]),
    ("postgresql:///d?host=db&hostaddr=10.0.0.1", [Host("db", 5432, "10.0.0.1")]),
    ("postgresql:///d?hostaddr=10.0.0.1,::1", [Host("10.0.0.1", 5432, "10.0.0.1"), Host("::1", 5432, "::1")]),
    ("postgresql:///d?host=::1", [Host("::1", 5432)]),
    ("postgresql:///d", []),
])  # fmt: skip
def test_hosts_are_those_of_libpq(dsn, hosts):
    assert list(plan_of(dsn, {}).hosts) == hosts


def test_the_environment_names_hosts_as_libpq_takes_them():
    environ = {"PGHOST": "a,b", "PGPORT": "1,2", "PGCONNECT_TIMEOUT": "3", "PGTARGETSESSIONATTRS": "read-write"}
    plan = plan_of("postgresql:///d", environ)
    assert [str(host) for host in plan.hosts] == ["a:1", "b:2"]
    assert (plan.connect_timeout_s, plan.target_session_attrs, plan.is_ordered) == (3.0, "read-write", False)
    assert plan_of("postgresql://c/d", {"PGPORT": "7"}).hosts == (Host("c", 7),)


def test_what_asyncpg_gets_names_no_host_and_keeps_login_database_and_other_parameters():
    plan = plan_of(
        "postgresql://u%40x:p(%2F)s@a,[::1]:5/d%20b?connect_timeout=2&sslmode=require&hostaddr=::1,::2"
        "&load_balance_hosts=random&options=-c%20geqo%3Doff&target_session_attrs=primary&gssencmode=disable",
        {},
    )
    assert plan.dsn == "postgresql://u%40x:p(%2F)s@/d%20b?sslmode=require&options=-c%20geqo%3Doff"
    assert (plan.connect_timeout_s, plan.target_session_attrs, plan.shuffles) == (2.0, "primary", True)
    assert "p(" not in repr(plan)


@pytest.mark.parametrize("query, words", [
    ("connect_timeout=soon", "connect_timeout"),
    ("target_session_attrs=writer", "target_session_attrs"),
    ("load_balance_hosts=yes", "load_balance_hosts"),
    ("host=a,b,c&port=1,2", "port"),
    ("host=a,b&hostaddr=::1", "hostaddr"),
    ("host=a,,b", "empty host"),
])  # fmt: skip
def test_a_bad_parameter_is_a_mistake_in_the_settings(query, words):
    with pytest.raises(ValueError, match=words):
        DatabaseUrl.parse(f"postgresql:///d?{query}")

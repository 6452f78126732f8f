import pytest

from outbox.settings.postgres_hosts import plan_of
from outbox.settings.postgres_local import require_user, resolve
from outbox.settings.postgres_parameters import translate
from outbox.settings.urls import DatabaseUrl

VERIFIED = {"sslmode": "verify-full", "sslrootcert": "system"}


@pytest.mark.parametrize("url", [
    "postgres://u:p@h/d", "postgresql://u:p@h/d", "postgresql+psycopg://u:p@h/d", "postgresql+psycopg2://u:p@h/d",
    "postgresql+asyncpg://u:p@h/d", "postgresql+pg8000://u:p@h/d", "postgres+psycopg_async://u:p@h/d",
    "POSTGRESQL://u:p@h/d", "pgsql://u:p@h/d", "psql://u:p@h/d", "postgis://u:p@h/d", "ecto://u:p@h/d",
    "jdbc:postgresql://h/d?user=u&password=p",
])  # fmt: skip
def test_the_schemes_of_frameworks_are_accepted(url):
    parsed = DatabaseUrl.parse(url)
    assert parsed.dsn.startswith("postgresql://")
    assert [str(host) for host in plan_of(parsed.dsn, {}).hosts] == ["h:5432"]


@pytest.mark.parametrize("url", ["mysql://h/d", "mysql+asyncpg://h/d", "sqlite:///x", "postgresql+://h/d", "h/d"])
def test_other_databases_are_refused(url):
    with pytest.raises(ValueError, match="is not a Postgres URL"):
        DatabaseUrl.parse(url)


# As providers and tools show them to copy: query, what reaches the driver, and the names in warnings.
@pytest.mark.parametrize("query, kept, ignored", [
    ("sslmode=require&channel_binding=require", VERIFIED, []),  # Neon
    ("sslmode=require&options=endpoint%3Dep-cool-1", {"sslmode": "require", "options": "endpoint=ep-cool-1"}, []),
    ("pgbouncer=true&connection_limit=1&pool_timeout=0", {}, ["pgbouncer", "connection_limit", "pool_timeout"]),
    ("schema=app&sslmode=no-verify", {"sslmode": "require"}, ["schema"]),  # Prisma, node-postgres
    ("sslaccept=strict", VERIFIED, []),
    ("sslaccept=accept_invalid_certs&sslmode=require", {"sslmode": "require"}, []),
    ("supa=base-pooler.x&workaround=supabase-pooler.vercel", {}, ["supa", "workaround"]),
    ("ssl=true", {"sslmode": "require"}, []),  # Heroku, JDBC; libpq reads it so
    ("ssl=require", {"sslmode": "require"}, []),  # SQLAlchemy with asyncpg
    ("ssl=false", {"sslmode": "disable"}, []),
    ("SSLMODE=verify-full&SslRootCert=system", VERIFIED, []),
    ("requiressl=1", {"sslmode": "require"}, []),
    ("tls=true", {"sslmode": "require"}, []),
    ("encrypt=true", {"sslmode": "require"}, []),
    ("encrypt=false", {}, []),
    ("ssl=true&sslmode=verify-full", {"sslmode": "verify-full"}, []),
    ("ssl_require=true&conn_max_age=600", {"sslmode": "require"}, ["conn_max_age"]),  # Django
    ("currentSchema=app&ApplicationName=x&sslMode=require", {"sslmode": "require"}, ["currentSchema"]),  # JDBC
    ("prepareThreshold=0&targetServerType=primary", {"target_session_attrs": "primary"}, ["prepareThreshold"]),
    ("targetServerType=preferSecondary", {"target_session_attrs": "prefer-standby"}, []),
    ("loadBalanceHosts=true", {"load_balance_hosts": "random"}, []),
    ("prepared_statement_cache_size=0", {}, ["prepared_statement_cache_size"]),  # SQLAlchemy
    ("pool_max_conns=10&default_query_exec_mode=simple_protocol", {}, ["pool_max_conns", "default_query_exec_mode"]),
    ("pool=5&prepared_statements=false&encoding=unicode", {}, ["pool", "prepared_statements", "encoding"]),  # Rails
    ("host=/cloudsql/project:region:db", {"host": "/cloudsql/project:region:db"}, []),  # Cloud SQL
    ("unix_sock=/cloudsql/p:r:db/.s.PGSQL.5432", {"host": "/cloudsql/p:r:db"}, []),
    ("sslrootcert=system", VERIFIED, []),
    ("sslrootcert=/rds/global-bundle.pem&sslmode=verify-full",
     {"sslrootcert": "/rds/global-bundle.pem", "sslmode": "verify-full"}, []),  # RDS
    ("channel_binding=require&sslrootcert=/ca.pem", {"sslmode": "verify-full", "sslrootcert": "/ca.pem"}, []),
    ("keepalives=1&keepalives_idle=30&keepalives_interval=10&keepalives_count=3&tcp_user_timeout=5", {}, []),
    ("connect_timeout=5&gssencmode=disable&channel_binding=prefer", {"connect_timeout": "5"}, []),
    ("application_name=app&fallback_application_name=x&sslsni=1&sslcompression=0", {}, []),
    ("client_encoding=UTF-8", {}, []),
    ("client_encoding=latin1", {}, ["client_encoding"]),
    ("statement_timeout=5000&search_path=app", {"statement_timeout": "5000", "search_path": "app"}, []),  # the server's
    ("oauth_issuer=x&sslkeylogfile=/k", {}, ["oauth_issuer", "sslkeylogfile"]),
])  # fmt: skip
def test_a_providers_string_works_as_it_is_pasted(query, kept, ignored):
    url = DatabaseUrl.parse(f"postgresql://u:p@h/d?{query}")
    found = plan_of(url.dsn, {}).parameters
    assert dict(found.given) == kept
    assert [sentence.split()[1] for sentence in found.warnings] == ignored


@pytest.mark.parametrize("query, words", [
    ("require_auth=scram-sha-256", "require_auth"),
    ("requirepeer=postgres", "requirepeer"),
    ("gssencmode=require", "gssencmode=prefer|sslmode=verify-full"),
    ("gssencmode=maybe", "gssencmode"),
    ("channel_binding=always", "channel_binding"),
    ("channel_binding=require&sslmode=disable", "sslmode=require"),
    ("sslrootcert=system&sslmode=require", "sslmode=verify-full"),
    ("sslmode=on", "sslmode"),
    ("SSLMODE=on", "sslmode"),
    ("ssl=maybe", "ssl"),
    ("sslnegotiation=direct", "sslmode=require"),
    ("sslnegotiation=direct&sslmode=prefer", "sslmode=require"),
    ("replication=database", "replication"),
    ("targetServerType=writer", "target_session_attrs"),
])  # fmt: skip
def test_a_parameter_that_protects_is_refused_where_it_cannot_be_kept(query, words):
    with pytest.raises(ValueError, match=words):
        DatabaseUrl.parse(f"postgresql://u:p@h/d?{query}")


def test_the_environment_asks_for_protection_as_the_url_does():
    assert translate({}, {"PGCHANNELBINDING": "require"}).given == VERIFIED
    assert translate({}, {"PGSSLROOTCERT": "system"}).given == VERIFIED
    with pytest.raises(ValueError, match="gssencmode=require"):
        translate({}, {"PGGSSENCMODE": "require"})


def test_a_warning_about_a_schema_says_how_queries_find_their_tables():
    (warning,) = translate({"schema": "app"}, {}).warnings
    assert "Prisma" in warning
    assert "options=-csearch_path%3DNAME" in warning


@pytest.mark.parametrize("parameter", ["sslrootcert", "sslcert", "sslkey", "sslcrl"])
def test_a_file_of_tls_that_cannot_be_used_is_named_with_its_parameter(tmp_path, parameter):
    path = tmp_path / "file.pem"
    with pytest.raises(ValueError, match=f"^{parameter}: {path} cannot be read .No such file"):
        resolve({"sslmode": "require", parameter: str(path)}, {})
    path.write_bytes(b"\x30\x82 DER")
    with pytest.raises(ValueError, match=f"^{parameter}: {path} is not PEM"):
        resolve({"sslmode": "require", parameter: str(path)}, {})
    with pytest.raises(ValueError, match=f"^PG{parameter.upper()}: "):
        resolve({}, {f"PG{parameter.upper()}": str(path), "PGSSLMODE": "require"})
    assert resolve({"sslmode": "disable", parameter: str(path)}, {})[parameter] == str(path)


def test_verification_without_authorities_says_how_to_name_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="write sslrootcert=system"):
        resolve({"sslmode": "verify-full"}, {})
    (tmp_path / ".postgresql").mkdir()
    (tmp_path / ".postgresql/root.crt").touch()
    assert resolve({"sslmode": "verify-full"}, {}) == {"sslmode": "verify-full"}


def test_a_user_without_a_name_is_asked_for_one(monkeypatch):
    def getuser():
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr("getpass.getuser", getuser)
    with pytest.raises(ValueError, match=r"names no user, and the user id .* set PGUSER"):
        require_user(["", None])
    require_user(["", "app"])

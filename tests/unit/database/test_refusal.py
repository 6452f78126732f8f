import socket
import ssl

import asyncpg
import pytest

from outbox.database.connection import is_lost
from outbox.database.dialing import SilenceError
from outbox.database.opening import connect
from outbox.database.refusal import (
    DatabaseLoginError,
    DatabaseRefusedError,
    Kind,
    explain_refusal,
    explain_refusals,
    reason_of,
    refusal_of,
)
from outbox.errors import DatabaseUnavailableError, UnsafeDatabaseError
from outbox.settings.urls import DatabaseUrl

URL = DatabaseUrl.parse("postgresql://app:hidden@a,b/reports")

# As the servers send them. SQLSTATE 08P01 is PgBouncer's for all that has no code of its own.
SENTENCES = [
    ("08P01", "unsupported startup parameter: lock_timeout", Kind.UNSAFE),
    ("08P01", "unsupported startup parameter in options: jit", Kind.UNSAFE),
    ("08P01", "no such database: reports", Kind.REFUSED),
    ("3D000", "no such database: reports", Kind.REFUSED),
    ("3D000", 'database "reports" does not exist', Kind.REFUSED),
    ("08P01", "password authentication failed", Kind.LOGIN),
    ("28P01", 'password authentication failed for user "app"', Kind.LOGIN),
    ("28000", 'no pg_hba.conf entry for host "10.0.0.1", user "app"', Kind.LOGIN),
    ("08P01", "SASL authentication failed", Kind.LOGIN),
    ("08P01", "auth failed", Kind.LOGIN),
    ("08P01", "no such user: app", Kind.LOGIN),
    ("08P01", "login rejected", Kind.LOGIN),
    ("XX000", "Tenant or user not found", Kind.LOGIN),
    ("08P01", "no more connections allowed (max_client_conn)", Kind.AWAY),
    ("08P01", "server login has been failing, try again later (server_login_retry)", Kind.AWAY),
    ("08P01", "server login has been failing, cached error: connect failed (server_login_retry)", Kind.AWAY),
    ("08P01", "query_wait_timeout", Kind.AWAY),
    ("08P01", "pgbouncer cannot connect to server", Kind.AWAY),
    ("08P01", 'database "reports" is disabled', Kind.AWAY),
    ("08P01", "the pooler is shutting down", Kind.AWAY),
    ("53300", "sorry, too many clients already", Kind.AWAY),
    ("53300", "Sorry, too many clients already", Kind.AWAY),
    ("57P03", "the database system is starting up", Kind.AWAY),
    ("XX000", "all backend nodes are down, pgpool requires at least one valid node", Kind.AWAY),
    ("XX000", "MaxClientsInSessionMode: max clients reached", Kind.AWAY),
    ("08P01", "something new", Kind.AWAY),
    ("0A000", "RDS Proxy currently doesn't support this option", Kind.UNSAFE),
    ("42704", 'unrecognized configuration parameter "idle_session_timeout"', Kind.REFUSED),
]


def error_of(code, words):
    return asyncpg.PostgresError.new({"S": "FATAL", "V": "FATAL", "C": code, "M": words, "D": "detail", "H": "hint"})


@pytest.mark.parametrize("code, words, kind", SENTENCES)
def test_each_sentence_of_a_server_or_pooler_has_its_class_and_a_message_with_a_fix(code, words, kind):
    error = error_of(code, words)
    assert refusal_of(error).kind is kind
    explained = explain_refusal(URL, error)
    assert words in str(explained)
    assert "\n" not in str(explained)
    assert "hidden" not in str(explained)
    assert "; " in str(explained)
    assert "transaction mode" not in str(explained)
    expected = {
        Kind.UNSAFE: UnsafeDatabaseError, Kind.LOGIN: DatabaseLoginError, Kind.REFUSED: DatabaseRefusedError,
        Kind.AWAY: DatabaseUnavailableError,
    }[kind]  # fmt: skip
    assert type(explained) is expected
    assert is_lost(explained) is (kind is Kind.AWAY)


def test_an_error_that_is_no_refusal_stays_as_it_is():
    error = error_of("42601", "syntax error")
    assert refusal_of(error) is None
    assert explain_refusal(URL, error) is error


@pytest.mark.parametrize("error, words", [
    (ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 1)"), "Connection refused"),
    (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
    (SilenceError(2.0), "no answer within 2 s"),
    (TimeoutError(), "TimeoutError"),
    (ssl.SSLCertVerificationError(1, "certificate verify failed"), "certificate verify failed"),
    (error_of("26000", "prepared statement does not exist"), "prepared statement does not exist"),
])  # fmt: skip
def test_a_reason_is_one_line(error, words):
    assert words in reason_of(error)
    assert "\n" not in reason_of(error)


REFUSED = ConnectionRefusedError(111, "no")
LOGIN = error_of("28P01", "password authentication failed")
STANDBY = asyncpg.exceptions.TargetServerAttributeNotMatched("no")


@pytest.mark.parametrize("errors, expected, words", [
    ([SilenceError(10), REFUSED], DatabaseUnavailableError,
     "does not answer (a:5432: no answer within 10 s; b:5432: Connection refused); start it"),
    ([LOGIN, SilenceError(2)], DatabaseLoginError, "gives no session (a:5432: refuses the user or password"),
    ([SilenceError(2), LOGIN], DatabaseLoginError, "correct the user or password of database_url."),
    ([STANDBY, STANDBY], DatabaseUnavailableError, "a:5432: is not of the kind that target_session_attrs asks for"),
    ([STANDBY, SilenceError(10)], DatabaseUnavailableError, "b:5432: no answer within 10 s"),
    ([error_of("3D000", 'database "x" does not exist'), REFUSED], DatabaseRefusedError, "create it or correct"),
    ([UnicodeError("label empty or too long"), REFUSED], DatabaseRefusedError, "a:5432: has a host name"),
    ([error_of("08P01", "unsupported startup parameter: jit"), REFUSED], UnsafeDatabaseError, "pooler"),
])  # fmt: skip
def test_one_error_names_each_host_and_a_refusal_weighs_more_than_silence(errors, expected, words):
    found = explain_refusals(URL, list(zip(("a:5432", "b:5432"), errors, strict=True)))
    assert type(found) is expected
    assert words in str(found)
    assert "hidden" not in str(found)


@pytest.mark.parametrize("file", ["sslrootcert=/no/such&sslmode=verify-full", "sslcert=/no/such&sslmode=require"])
async def test_a_missing_file_of_tls_is_not_called_a_server_that_does_not_answer(file):
    url = DatabaseUrl.parse(f"postgresql://app:hidden@127.0.0.1:1/reports?{file}")
    with pytest.raises(DatabaseRefusedError, match=r"sslrootcert: /no/such cannot|sslcert: /no/such cannot") as found:
        await connect(url, application="test")
    assert "hidden" not in str(found.value)

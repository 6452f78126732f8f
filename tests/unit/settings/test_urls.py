import pytest

from outbox.settings.urls import DatabaseUrl, SmtpAddress
from tests.support.settings_files import SECRET, faults


@pytest.mark.parametrize(
    ("url", "dsn", "redacted"),
    [
        (
            "postgresql://bob:s3cr3t@db:5433/app",
            "postgresql://bob:s3cr3t@db:5433/app",
            "postgresql://bob:***@db:5433/app",
        ),
        ("postgresql+asyncpg://bob@db/app", "postgresql://bob@db/app", "postgresql://bob@db/app"),
        (" postgres://db/app\n", "postgresql://db/app", "postgresql://db/app"),
        (
            "postgresql:///app?host=/run/pg",
            "postgresql:///app?host=/run/pg",
            "postgresql:///app?host=/run/pg",
        ),
        ("postgresql://a,[::1]:5432/x", "postgresql://a,[::1]:5432/x", "postgresql://a,[::1]:5432/x"),
        (
            "postgresql://db/app?user=bob&password=s3cr3t&sslpassword=s3cr3t",
            "postgresql://db/app?user=bob&password=s3cr3t&sslpassword=s3cr3t",
            "postgresql://db/app?user=bob&password=***&sslpassword=***",
        ),
        (
            "postgresql://db/app?%70assword=s3cr3t",
            "postgresql://db/app?%70assword=s3cr3t",
            "postgresql://db/app?password=***",
        ),
    ],
)
def test_a_database_url_is_kept_for_asyncpg_and_shown_without_secrets(url, dsn, redacted):
    parsed = DatabaseUrl.parse(url)
    assert parsed.dsn == dsn
    assert str(parsed) == parsed.redacted == redacted
    assert repr(parsed) == f"DatabaseUrl('{redacted}')"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("smtp://mail", SmtpAddress("mail", 25, implicit_tls=False)),
        ("smtp://mail:587/", SmtpAddress("mail", 587, implicit_tls=False)),
        ("smtps://mail", SmtpAddress("mail", 465, implicit_tls=True)),
        ("SMTPS://[::1]:2465", SmtpAddress("::1", 2465, implicit_tls=True)),
        ("smtp://bob:p%40s%2Fs@mail", SmtpAddress("mail", 25, False, "bob", "p@s/s")),
        ("smtp://bob%40example.com:a:b@mail", SmtpAddress("mail", 25, False, "bob@example.com", "a:b")),
    ],
)
def test_an_smtp_url_is_taken_apart(url, address):
    assert SmtpAddress.parse(url) == address
    assert SmtpAddress.parse(address.redacted.replace("***@", "u:p@")).host == address.host


# Each of these is a password that was not percent-encoded, or an address that is wrong otherwise.
BROKEN = [
    "bob:s3cr3t@host/x",
    "http://bob:s3cr3t@host/x",
    "{}://bob:s3cr3t/9@host/x",
    "{}://bob:12/s3cr3t@host/x",
    "{}://bob:12#s3cr3t@host/x",
    "{}://bob:12?s3cr3t@host/x",
    "{}://bob:s3cr3t@9@host/x",
    "{}://bob:s3cr3t [9@host/x",
    "{}://bob:[s3cr3t@host/x",
    "{}://bob@host:s3cr3t/x",
    "{}://bob:s3cr3t@host:99999/x",
    "{}://bob:s3cr3t@host/x#y",
    "{}://bob:s3cr3t\\u0007@host/x",
    "{}://host/x?s3cr3t",
]


@pytest.mark.parametrize("url", BROKEN)
@pytest.mark.parametrize(("key", "scheme"), [("database_url", "postgresql"), ("smtp_url", "smtp")])
def test_a_broken_address_is_refused_without_showing_any_of_it(key, scheme, url):
    (fault,) = faults(f'{key} = "{url.format(scheme)}"')
    assert fault.startswith(f"{key}: ")
    assert SECRET not in fault


@pytest.mark.parametrize(
    ("url", "address", "shown"),
    [
        ("lmtp://store", SmtpAddress("store", 24, implicit_tls=False, scheme="lmtp"), "lmtp://store:24"),
        ("LMTP://[::1]:2424", SmtpAddress("::1", 2424, implicit_tls=False, scheme="lmtp"), "lmtp://[::1]:2424"),
        (
            "lmtp:///run/lmtp%20socket",
            SmtpAddress("", 0, implicit_tls=False, scheme="lmtp", path="/run/lmtp socket"),
            "lmtp:///run/lmtp%20socket",
        ),
        ("file:///var/try", SmtpAddress("", 0, implicit_tls=False, scheme="file", path="/var/try"), "file:///var/try"),
    ],
)
def test_lmtp_and_a_maildir_are_addresses_too(url, address, shown):
    found = SmtpAddress.parse(url)
    assert found == address
    assert found.name == found.redacted == shown


@pytest.mark.parametrize("url", ["file://here", "file:///", "file://", "lmtp://", "lmtp://a:b@host", "lmtp://host/x"])
def test_a_url_that_is_none_is_said_with_the_mend(url):
    with pytest.raises(ValueError, match=r"; (write|end) "):
        SmtpAddress.parse(url)

"""User configuration: `outbox.toml` and OUTBOX_* variables, validated as a whole. This package opens no connection.

Every problem is one sentence with the key, what is wrong and how to correct it; all of them come at once. Addresses
with passwords show themselves without their secrets, so that no log, repr or error can spill one.

    keys                 names of keys, as in TOML and as variables
    values               types of single values: numbers, durations, rates, URLs, choices
    reports              tables [reports.NAME] and [digest]
    routes               settings of mail servers, and the tables [routes.NAME] and dkim
    web                  table [web]
    model                all settings as one object, with the top-level keys and [retry]
    messages             validation errors as sentences
    load                 reads the file, the variables and the files with secrets
    origin               files that settings came from, to read a rotated login again
    urls                 database and SMTP URLs, shown without their secrets
    secret_files         logins from files, read again after a server refuses them
    redaction            removes a login from a server's replies
    postgres_hosts       hosts of a database URL, their order, and the time for each
    postgres_parameters  parameters of a database URL: libpq's, in other spellings, of other tools
    postgres_local       TLS files and user name that a connection takes from this machine
"""

from outbox.settings.keys import DIGEST, command_of, table_of
from outbox.settings.load import load
from outbox.settings.model import RetrySettings, Settings
from outbox.settings.reports import DigestSettings, EditionSettings, FirstTick, ReportSettings
from outbox.settings.routes import DkimSettings, RouteSettings, ServerSettings, StartTls
from outbox.settings.values import MESSAGE_BYTES_MAX, WhenInDoubt, duration_s
from outbox.settings.web import SECRET_MIN, WebSettings

__all__ = [
    "DIGEST",
    "MESSAGE_BYTES_MAX",
    "SECRET_MIN",
    "DigestSettings",
    "DkimSettings",
    "EditionSettings",
    "FirstTick",
    "ReportSettings",
    "RetrySettings",
    "RouteSettings",
    "ServerSettings",
    "Settings",
    "StartTls",
    "WebSettings",
    "WhenInDoubt",
    "command_of",
    "duration_s",
    "load",
    "table_of",
]

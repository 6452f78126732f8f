"""Sentences about settings that are invalid: each names the key, says what is wrong, and how to correct it."""

from collections.abc import Mapping, Sequence
from typing import Final

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from outbox.settings.keys import quoted, variable
from outbox.settings.model import RetrySettings, Settings
from outbox.settings.reports import DigestSettings, ReportSettings
from outbox.settings.routes import DkimSettings, RouteSettings
from outbox.settings.values import shown
from outbox.settings.web import WebSettings
from outbox.suggestions import did_you_mean

KEYS: Final = frozenset(Settings.model_fields) - {"directory"}
"""Top-level keys that a user may set; the path of the settings file alone gives `directory`."""

# Fix for a required key that is missing, by its name.
_WANTED: Final = {
    "link": 'write one like "https://reports.example.com/r/{token}"',
    "smtp_url": 'write one like "smtp://host:25"',
    "domain": 'write whose signature it is, like "example.com"',
    "selector": "write under which name in the DNS the public key is",
    "key_file": "name the file with the private key in PEM",
}

# Rest of the sentence after the key, by pydantic's type of error.
_PROBLEMS: Final = {
    "string_type": "is not text; put it in quotes",
    "is_instance_of": "is not text; put it in quotes",
    "float_type": "is not a number; write one without quotes",
    "finite_number": "is not a finite number; write one such as 30",
    "bool_type": "is neither true nor false; write one of them without quotes",
    "int_type": "is not a whole number; write one without quotes and without a point",
    "greater_than_equal": "{value} is too small; write {ge:.15g} or more",
    "less_than_equal": "{value} is too large; write {le:.15g} or less",
    "list_type": 'is not a list; put it into brackets, as in ["one", "two"]',
    "enum": "{value} is not a choice; write {expected}",
    "missing": "is missing; {wanted}",
    "string_pattern_mismatch": "is no name for a {kind}; use a-z, 0-9, - and _, and begin with a letter",
    "model_type": "is not a table; begin it with [{table}] and write its keys below",
    "dict_type": "is not a table; begin it with [{table}.NAME] and write its keys below",
    "value_error": "{error}",
}


def sentence_of(detail: ErrorDetails, from_variables: Mapping[str, object]) -> str:
    """Return one of pydantic's errors in the user's words. `from_variables` has the keys that variables gave."""
    loc = [quoted(str(part)) for part in detail["loc"] if part != "[key]"]
    key = ".".join([variable(loc[0]) if loc[0] in from_variables else loc[0], *loc[1:]])
    if detail["type"] == "extra_forbidden":
        return unknown_key(loc, key)
    problem = _PROBLEMS.get(detail["type"], "cannot be used; write another value")
    context = {
        **detail.get("ctx", {}),
        "value": shown(detail["input"]),
        "table": ".".join(loc),
        "kind": loc[0].removesuffix("s"),
        "wanted": _WANTED.get(loc[-1], "write it"),
    }
    return f"{key}: {problem.format_map(context)}."


def unknown_key(loc: Sequence[str], key: str) -> str:
    """Return the sentence about a key that does not exist; `loc` are its parts, `key` is its name in the sentence."""
    if len(loc) > 1 and loc[-1] in KEYS:
        return f"{key}: belongs at the top level; move it above the first [table]."
    guess = did_you_mean(loc[-1], set(_table_of(loc).model_fields) - {"directory"})
    return f"{key}: is not a key that outbox knows; take it out or mend its name{guess}."


def _table_of(loc: Sequence[str]) -> type[BaseModel]:
    """Return the table that a key stands in."""
    if len(loc) == 1:
        return Settings
    tables: dict[str, type[BaseModel]] = {
        "retry": RetrySettings,
        "digest": DigestSettings,
        "web": WebSettings,
        "dkim": DkimSettings,
        "reports": ReportSettings,
        "routes": DkimSettings if "dkim" in loc[2:-1] else RouteSettings,
    }
    return tables.get(loc[0], Settings)

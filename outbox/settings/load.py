"""Read settings: the file `outbox.toml`, OUTBOX_<KEY> variables, and files with secrets that variables name."""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from outbox.errors import ConfigurationError
from outbox.settings.keys import variable
from outbox.settings.messages import KEYS, sentence_of, unknown_key
from outbox.settings.model import Settings
from outbox.settings.origin import Origin
from outbox.trust import distrust_of

_LONG_KEY: Final = re.compile(r"""(?<![\w"'-])(?:[\w"'-]++[ \t]*+\.[ \t]*+){50}""")  # more parts than any valid key has
_TEXT_KEYS: Final = frozenset(
    {
        *("database_url", "smtp_url", "sender", "redirect_to", "in_doubt", "resolver", "rate", "return_path"),
        *("starttls", "helo_name"),
        *("log_format", "log_level", "http", "dead_man_url"),
    }
)


def load(config: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read `config`, else the file that OUTBOX_CONFIG names, else ./outbox.toml if there is one.

    OUTBOX_<KEY> replaces the whole of a top-level key. Text is taken as it is; numbers and tables are written
    as in TOML (`OUTBOX_RETRY={base_s = 5}`). An empty variable counts as not set, an unknown one is not ours. Without
    it, OUTBOX_<KEY>_FILE names a file that holds the value, as secrets are handed out.

    A file that is only found in the working directory must be this user's: see `trust`.

    Raises:
        ConfigurationError: one sentence for each problem; all of them come at once.

    """
    problems: list[str] = []
    named_by, path = _find(config, environ)
    values = _read(path, named_by, problems) if named_by or _is_found(path) else {}
    given = _read_variables(environ, problems)
    if "directory" in values:  # a field of the model, but the path alone gives it: see below
        problems.append(unknown_key(["directory"], "directory"))
    try:
        settings = Settings.model_validate({**values, **given, "directory": path.absolute().parent})
    except ValidationError as error:
        problems += [sentence_of(detail, given) for detail in error.errors(include_url=False)]
        raise ConfigurationError(problems) from None  # pydantic's error knows the secrets
    if problems:
        raise ConfigurationError(problems)
    origin = _origin_of(config, path if named_by or values else None, environ)
    settings._origin = origin  # noqa: SLF001 - only `load` knows it
    url = settings.database_url
    if url is None or not origin.files:
        return settings
    return settings.model_copy(update={"database_url": replace(url, login=origin.database_login(url))})


def _origin_of(config: Path | None, read: Path | None, environ: Mapping[str, str]) -> Origin:
    """Return what is needed to read the same settings again; paths are absolute, for any working directory."""
    ours = {name: value for name, value in environ.items() if name.startswith("OUTBOX_")}
    secrets = [f"{variable(key)}_FILE" for key in sorted(KEYS)]
    for name in ("OUTBOX_CONFIG", *secrets):
        if path := ours.get(name, "").strip():
            ours[name] = str(Path(path).absolute())
    files = [] if read is None else [read.absolute()]
    files += [Path(ours[name]) for name in secrets if ours.get(name, "").strip()]
    return Origin(tuple(files), ours, partial(load, config and config.absolute(), ours))


def _find(config: Path | None, environ: Mapping[str, str]) -> tuple[str, Path]:
    """Return the option or variable that names the settings file, "" if none does, and its path."""
    if config is not None:
        return "--config", config
    if named := environ.get("OUTBOX_CONFIG", "").strip():
        return "OUTBOX_CONFIG", Path(named)
    return "", Path("outbox.toml")


def _is_found(path: Path) -> bool:
    """Return True if the file is in the working directory; settings can run code, so it must be this user's.

    A file that does not exist now is not read either: in /tmp another user may create one the next moment.

    Raises:
        ConfigurationError: others can write or replace it.

    """
    try:
        distrust = distrust_of(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigurationError(
            f"{path}: cannot be read ({error.strerror}); make it a file that this user can read."
        ) from None
    if distrust is not None:
        raise ConfigurationError(
            f"{path}: found in the working directory but not used, since settings can run code and "
            f"{distrust}, or name the file with --config or OUTBOX_CONFIG if you trust it."
        )
    return True


def _read(path: Path, named_by: str, problems: list[str]) -> dict[str, Any]:
    """Return the keys of the file; none if it does not exist and neither option nor variable names it."""
    try:
        return _parse_toml(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        if named_by:
            problems.append(f"{named_by}: {path} does not exist; name a file that does.")
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}); make it a file that this user can read.")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problems.append(f"{path}, line {line}: is not UTF-8; save the file as UTF-8.")
    except tomllib.TOMLDecodeError as error:
        what, _, place = str(error).removesuffix(")").partition(" (at ")
        where = place if place.startswith("line") else "last line"
        problems.append(f"{path}, {where}: is not TOML ({what}); correct it there or in the line before.")
    except ValueError as error:
        problems.append(f"{path}: {error}.")
    return {}


def _parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        ValueError: it is not TOML, or nested so deeply that tomllib would fail or take minutes: it calls itself for
            each bracket, and walks from the top for each part of a key.

    """
    deep = "is nested too deeply; write fewer brackets, and keys of fewer parts"
    if _LONG_KEY.search(text):
        raise ValueError(deep)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(deep) from None


def _read_variables(environ: Mapping[str, str], problems: list[str]) -> dict[str, Any]:
    """Return the keys that variables give; one whose text is not TOML counts as not given, and is a problem."""
    given: dict[str, Any] = {}
    for key in sorted(KEYS):
        text = environ.get(variable(key), "").strip() or _read_secret(f"{variable(key)}_FILE", environ, problems)
        if not text:
            continue
        if key in _TEXT_KEYS:
            given[key] = text
            continue
        try:
            (given[key],) = _parse_toml(f"{key} = {text}").values()
        except ValueError:  # not TOML, or more than one value
            problems.append(f"{variable(key)}: is not TOML; write what would follow `{key} =` in one line.")
    return given


def _read_secret(name: str, environ: Mapping[str, str], problems: list[str]) -> str:
    """Return the content of the file that a variable names: systemd, Docker and Kubernetes hand out secrets so."""
    path = environ.get(name, "").strip()
    if not path:
        return ""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig").strip()
    except OSError as error:
        problems.append(f"{name}: {path} cannot be read ({error.strerror}); name a file that this user can read.")
    except ValueError:
        problems.append(f"{name}: {path} is not UTF-8; save the file as UTF-8.")
    else:
        if text:
            return text
        problems.append(f"{name}: {path} is empty; write the value into it.")
    return ""

"""Template files that nothing reads, because a directory or a file has a misspelt name.

A template that is missing is no error, since there is a packaged one. So a misspelt name would be noticed by the reader
of the email only. Files that other templates include are used under any name.
"""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

from outbox.suggestions import did_you_mean, nearest

DIRECTORY: Final = "templates"
OF_REPORTS: Final = ("subject.txt.j2", "email.txt.j2", "email.html.j2", "report.html.j2")
OF_EMAILS: Final = (*OF_REPORTS[:3], "calendar.ics.j2")  # `Email(template=…)`: such directories stand beside reports'
_ENDINGS: Final = (".j2", ".jinja", ".jinja2", ".html", ".htm", ".txt", ".ics")
_DEPTH_MAX: Final = 4
_FILES_MAX: Final = 5000
_BYTES_MAX: Final = 1_000_000
# Copies that editors and people leave: .email.html.j2.swp, email.html.j2~, email.html.j2.bak.
_COPY: Final = re.compile(r"[.#].*|.*(?:~|#|\.(?:bak|old|orig|rej|save|sw[a-p]|tmp|disabled|off))", re.IGNORECASE)


def ignored(base: Path, reports: Collection[str]) -> list[str]:
    """Return one sentence for each directory or file that looks like a template and is not used.

    `base` is the directory of the settings, `reports` the names of all reports, with the digest. Never raises.
    """
    if not reports:
        return []
    found: list[str] = []
    try:
        found += _beside(base, reports)
        found += _Tree(base / DIRECTORY, reports).ignored()
    except OSError as error:
        found.append(f"{error.filename}: cannot be read ({error.strerror}), so its templates are not used.")
    return found


def misspelt_in(directory: Path, template: str) -> dict[str, str]:
    """Return the names of files in the directory of an `Email` template that are misspelt, with the right ones.

    Raises:
        OSError: the directory cannot be read.

    """
    found = _candidates(frozenset(os.listdir(directory / template)))  # noqa: PTH208 - per email
    if not found:
        return found
    names = [f"{template}/{name}" for name in OF_EMAILS]
    changed = tuple(path.stat().st_mtime_ns for name in names if (path := directory / name).is_file())
    used, is_complete = _referenced_by(directory, tuple(names), changed)
    return {name: meant for name, meant in found.items() if is_complete and f"{template}/{name}" not in used}


@lru_cache(256)
def _candidates(names: frozenset[str]) -> dict[str, str]:
    return {name: meant for name in sorted(names) if (meant := _meant(name, names, OF_EMAILS))}


@lru_cache(256)
def _referenced_by(root: Path, names: tuple[str, ...], _changed_ns: tuple[int, ...]) -> tuple[set[str], bool]:
    return _referenced(root, names)


def _meant(name: str, names: Collection[str], right: Sequence[str]) -> str | None:
    """Return the right name that this one is like; None if it is right, a copy, or if the right one is there, too."""
    if name in right or _COPY.fullmatch(name):
        return None
    meant = nearest(name, right)
    return None if meant in names else meant


def _beside(base: Path, reports: Collection[str]) -> Iterator[str]:
    """Yield what lies beside the settings, where it should be in `templates`."""
    try:
        entries = sorted(os.scandir(base), key=lambda entry: entry.name)
    except OSError:
        return
    has_directory = any(entry.name == DIRECTORY for entry in entries)
    for entry in entries:
        path = base / entry.name
        if entry.name in OF_REPORTS:
            yield f"{path}: is not used (did you mean {DIRECTORY}/{entry.name}?); move it."
        elif entry.name == DIRECTORY or _COPY.fullmatch(entry.name) or not entry.is_dir():
            continue
        elif entry.name in reports and not _holds(path, OF_REPORTS).isdisjoint(OF_REPORTS):
            yield f"{path}{os.sep}: is not used (did you mean {DIRECTORY}/{entry.name}?); move it."
        elif nearest(entry.name, [DIRECTORY]) and not (has_directory and entry.name.startswith(DIRECTORY)):
            below = _holds(path, {*OF_REPORTS, *reports})
            if not below.isdisjoint(OF_REPORTS) or any(_holds(path / name, OF_REPORTS) for name in below):
                yield f"{path}{os.sep}: is not used (did you mean {DIRECTORY}?); rename it."


def _holds(path: Path, names: Collection[str]) -> set[str]:
    try:
        return set(names).intersection(os.listdir(path))  # noqa: PTH208 - names alone
    except OSError:
        return set()


class _Tree:
    """The directory of templates: its files by their names in Jinja, such as `progress/email.html.j2`."""

    def __init__(self, root: Path, reports: Collection[str]) -> None:
        self._root, self._reports = root, reports
        self._names = _files(root)
        self._here: dict[str, set[str]] = {}
        for name in self._names:
            directory, _, file = name.rpartition("/")
            self._here.setdefault(directory, set()).add(file)

    def ignored(self) -> list[str]:
        """Return the sentences about this directory."""
        misplaced, unknown = {**dict(self._directories()), **dict(self._misspelt())}, dict(self._unknown())
        if not misplaced and not unknown:
            return []
        used, is_complete = _referenced(self._root, [name for name in self._names if self._is_used(name)])
        return [
            sentence
            for name, sentence in {**misplaced, **(unknown if is_complete else {})}.items()
            if used.isdisjoint([name] if name in self._names else self._below(name))
        ]

    def _below(self, directory: str) -> list[str]:
        return [name for name in self._names if name.startswith(f"{directory}/")]

    def _is_used(self, name: str) -> bool:
        """Return True for a file that is rendered by its name, not by that of another one that includes it."""
        directory, _, file = name.rpartition("/")
        if directory in self._reports or not directory:
            return file in OF_REPORTS
        return "/" not in directory and file in OF_EMAILS and not self._meant_report(directory)

    def _meant_report(self, directory: str) -> str | None:
        """Return the report that a directory of another name is meant for; None if it may be that of an `Email`.

        It may be where the report has the same files in the directory of its own.
        """
        meant = nearest(directory, self._reports)
        files = self._here[directory].intersection(OF_REPORTS)
        return None if meant is None or files <= self._here.get(meant, set()) else meant

    def _directories(self) -> Iterator[tuple[str, str]]:
        for directory, files in self._here.items():
            if not directory or directory in self._reports or files.isdisjoint(OF_REPORTS):
                continue
            path, last = self._root / directory, directory.rpartition("/")[2]
            if "/" not in directory:
                if self._meant_report(directory) or "report.html.j2" in files:
                    guess = did_you_mean(directory, self._reports)
                    known = "" if guess else f"; the reports are {', '.join(sorted(self._reports))}"
                    yield (
                        directory,
                        f"{path}{os.sep}: is not used, since no report has this name{guess}{known}; rename it.",
                    )
            elif last in self._reports:
                yield directory, f"{path}{os.sep}: is not used (did you mean {DIRECTORY}/{last}?); move it."

    def _misspelt(self) -> Iterator[tuple[str, str]]:
        """Yield the files beside those that are used whose names are like those."""
        for name in self._names:
            directory, _, file = name.rpartition("/")
            if directory and directory not in self._reports:
                continue
            path = self._root / name
            if meant := _meant(file, self._here[directory], OF_REPORTS):
                yield name, f"{path}: is not used (did you mean {meant}?); rename it."
            elif file in OF_REPORTS and not path.exists():
                yield name, f"{path}: is not used, since it is a link to a file that does not exist; correct it."

    def _unknown(self) -> Iterator[tuple[str, str]]:
        """Yield the files in a report's directory that are like no template, or in a directory of their own."""
        known = f"{', '.join(OF_REPORTS[:-1])} and {OF_REPORTS[-1]}"
        for name in self._names:
            directory, _, file = name.rpartition("/")
            if directory.partition("/")[0] not in self._reports or not file.endswith(_ENDINGS) or _COPY.fullmatch(file):
                continue
            if directory in self._reports and nearest(file, OF_REPORTS):
                continue  # used, misspelt, or a copy of one that is used
            rule = f"the templates of a report are {known}"
            yield name, f"{self._root / name}: is not used, since no template includes it; {rule}."


def _files(root: Path) -> list[str]:
    """Return the names of all files below a directory that is there.

    Raises:
        OSError: a directory cannot be read.

    """
    found: list[str] = []
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for directory, below, files in os.walk(root, onerror=refuse, followlinks=True):
        where, real = Path(directory).relative_to(root), os.path.realpath(directory)
        if real in seen:  # by a symbolic link
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith(".") and len(where.parts) < _DEPTH_MAX)
        found += [(where / name).as_posix() for name in sorted(files)]
        if len(found) > _FILES_MAX:
            break
    return found


def _referenced(root: Path, roots: Iterable[str]) -> tuple[set[str], bool]:
    """Return the names of the templates that these include, import or extend, and in turn those that these do.

    The second value is False if there may be others, since a name is computed or a template cannot be parsed.
    """
    from jinja2 import Environment, TemplateError
    from jinja2.meta import find_referenced_templates

    parse = Environment(autoescape=True).parse
    found: set[str] = set()
    is_complete = True
    left = list(roots)
    while left:
        path = root / left.pop()
        try:
            source = path.read_bytes()[:_BYTES_MAX].decode("utf-8-sig", "replace")
            names = set(find_referenced_templates(parse(source)))
        except OSError:
            continue
        except TemplateError:
            names = {None}
        is_complete = is_complete and None not in names
        new = {name for name in names if name is not None} - found
        found |= new
        left += new
    return found, is_complete

"""Names of time zones: which mean the same zone, and which is the current one.

The tz database renames zones and keeps the former names as links (its file `backward`). Systems ship the links or leave
them out, as Debian does since its tzdata-legacy, so Python may know a name that Postgres does not, and the other way
round. The links come from the package tzdata.
"""

from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Final

# Names that are current although the tz database has them as links. UTC is spelled so everywhere.
_CURRENT: Final = frozenset({"UTC", "GMT"})


def canonical(name: str) -> str:
    """Return one name for all names of a zone, by which two can be compared."""
    links = _links()
    while name in links:
        name = links[name]
    return name


def current(name: str) -> str:
    """Return the name that every system has: `US/Eastern` is America/New_York.

    A link that has a place on the map, such as Europe/Amsterdam, is a current name.
    """
    is_current = name in _CURRENT or name in _places() or name not in _links()
    return name if is_current else canonical(name)


def alternatives(name: str) -> Iterator[str]:
    """Yield all names of the same zone: `name` itself, then the current one, then others."""
    yield name
    zone = canonical(name)
    others = sorted(link for link in _links() if canonical(link) == zone)
    yield from dict.fromkeys(other for other in (current(name), zone, *others) if other != name)


@cache
def _links() -> dict[str, str]:
    """Return the target of each link. Without the file, as in a system's own tzdata, no two names are the same."""
    lines = [line.split() for line in _lines("tzdata.zi") if line.startswith("L ")]
    return {link: target for _, target, link, *_ in lines}


@cache
def _places() -> frozenset[str]:
    return frozenset(line.split("\t")[2] for line in _lines("zone.tab") if line[:1] not in {"", "#"})


def _lines(file: str) -> list[str]:
    try:
        return files("tzdata").joinpath("zoneinfo", file).read_text(encoding="utf-8").splitlines()
    except (ModuleNotFoundError, FileNotFoundError):
        return []

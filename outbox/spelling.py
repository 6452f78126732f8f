"""Suggestions for misspelt names: settings, reports, templates and the names inside of templates."""

import difflib
from collections.abc import Iterable
from typing import Final

_ALIKE: Final = 0.75  # as `difflib.get_close_matches` measures it: one typing error in four letters or more


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like this one, without regard to capitals; None if none is like it."""
    by_folded = {one.casefold(): one for one in sorted(known)}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=_ALIKE)
    return by_folded[near[0]] if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean NAME?)` for the most similar known name; "" if none is like it."""
    near = nearest(name, known)
    return "" if near is None else f" (did you mean {near}?)"

"""Errors of templates, explained in one sentence: file, line, the unknown name and the names that exist."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache, partial
from pathlib import Path
from traceback import walk_tb
from typing import Any, Final

from jinja2 import (
    BaseLoader,
    Environment,
    StrictUndefined,
    TemplateError,
    TemplateNotFound,
    TemplatesNotFound,
    TemplateSyntaxError,
    UndefinedError,
    nodes,
)
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.utils import missing

from outbox.errors import TemplateUseError
from outbox.suggestions import did_you_mean, nearest

_NAMES_MAX: Final = 30
_NAME_MAX: Final = 40
_MESSAGE_MAX: Final = 600
# The names that outbox adds to Jinja's own filters; `render` registers them.
OUR_FILTERS: Final = ("cell", "humanise", "lines", "number", "percent")


_PLAIN: Final = Environment(autoescape=True)  # renders nothing: parses, and looks up attributes as Jinja does


class MissingNameError(UndefinedError):
    """A template used a name, attribute or element that does not exist."""

    def __init__(self, name: object, obj: object, message: str | None = None) -> None:
        super().__init__(message)
        self.name, self.obj = name, obj


class Missing(StrictUndefined):
    """Undefined value whose error knows which name was looked up in which object."""

    __slots__ = ()

    def __init__(
        self,
        hint: str | None = None,
        obj: Any = missing,
        name: str | None = None,
        exc: Callable[..., Exception] = UndefinedError,
    ) -> None:
        if exc is UndefinedError and hint is None:
            exc = partial(MissingNameError, name, obj)
        super().__init__(hint, obj, name, exc)  # type: ignore[arg-type]


class MissingTemplateError(TemplateNotFound):
    """A template that a loader does not have; `loader` can list those that it has."""

    def __init__(self, name: str, loader: BaseLoader) -> None:
        super().__init__(name)
        self.loader = loader


def explain(error: Exception) -> str:
    """Return what went wrong in a template, in one sentence that begins with its path and line if they are known."""
    places = [
        (str(frame.f_globals["__file__"]), line, frame.f_locals)
        for frame, line in walk_tb(error.__traceback__)
        if "__jinja_exception__" in frame.f_globals  # as Jinja leaves the frames of templates
    ]
    path, line, names = places[-1] if places else ("", 0, {})
    problem = _one_line(str(error)).rstrip(".") or type(error).__name__
    if isinstance(error, TemplateSyntaxError):
        path, line = error.filename or error.name or path, error.lineno
        problem = _explain_syntax(error)
    elif isinstance(error, MissingNameError):
        problem = _explain_name(error, path, line, names)
    elif isinstance(error, TemplateNotFound):
        problem = _explain_not_found(error)
    elif not isinstance(error, TemplateUseError) and not type(error).__module__.startswith("jinja2"):
        problem = f"{type(error).__name__}: {problem}"
    if len(problem) > _MESSAGE_MAX:
        problem = problem[: _MESSAGE_MAX - 1] + "…"
    return f"{path}, line {line}: {problem}." if path else f"{problem}."


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _explain_syntax(error: TemplateSyntaxError) -> str:
    """Return the message of Jinja; for an unknown filter or test with the most similar one."""
    problem = _one_line(str(error.message)).rstrip(".")
    for kind, known in (("filter", (*_PLAIN.filters, *OUR_FILTERS)), ("test", tuple(_PLAIN.tests))):
        if problem.startswith(f"No {kind} named "):
            name = problem.removeprefix(f"No {kind} named ").strip("'\"")
            if kind == "filter" and name in OUR_FILTERS:
                return f"the filter {name!r} exists in the templates of reports only, not in those of an Email"
            guess = did_you_mean(name, known)
            if guess:
                return f"{problem}{guess}"
            ours = f"; those of outbox are {', '.join(OUR_FILTERS)}" if kind == "filter" else ""
            return f"{problem}{ours}"
    return problem


def _explain_not_found(error: TemplateNotFound) -> str:
    if isinstance(error, TemplatesNotFound):
        return f"there is none of the templates {', '.join(map(str, error.templates))}"
    known: list[str] = []
    if isinstance(error, MissingTemplateError):
        known = error.loader.list_templates()
    name = str(error.name or error.message)
    # Names begin at the directory of all templates, also in a file that is in a directory below it.
    ordered = sorted(known, key=lambda one: (one.startswith("outbox:"), len(one)), reverse=True)
    by_file = {one.rpartition("/")[2].rpartition(":")[2]: one for one in ordered}
    meant = nearest(name, known) or by_file.get(nearest(name.rpartition("/")[2], by_file) or "")
    guess = f" (did you mean {meant}?)" if meant else ""
    return f"there is no template {name}{guess}"


def _explain_name(error: MissingNameError, path: str, line: int, names: Mapping[str, Any]) -> str:
    """Return which name does not exist, and those that do."""
    name = str(error.name)
    if error.obj is missing:
        there = [one for one in names if one not in DEFAULT_NAMESPACE and not one.startswith("_")]
        listed = f"; the names that exist here are {_list(there)}" if there else ""
        return f"{name!r} is undefined{did_you_mean(name, there)}{listed}"
    owner = _expression_of(error, path, line, names)
    if error.obj is None:
        return f"{owner or 'it'} is None (NULL in SQL), so it has no {name}"
    if isinstance(error.obj, list | tuple) and not hasattr(error.obj, "_fields"):
        what = f"has no element {name}" if isinstance(error.name, int) else f"is a list, so it has no {name}"
        count = len(error.obj)
        return f"{owner or 'the list'} {what}; it has {count} element{'' if count == 1 else 's'}"
    there = _attributes_of(error.obj)
    subject = owner or ("the mapping" if isinstance(error.obj, Mapping) else f"a {type(error.obj).__name__}")
    listed = f"; it has {_list(there)}" if there else ""
    return f"{subject} has no {name}{did_you_mean(name, there)}{listed}"


def _list(names: Iterable[str]) -> str:
    shown = [name if len(name) <= _NAME_MAX else f"{name[:_NAME_MAX]}…" for name in names]
    return ", ".join(shown[:_NAMES_MAX]) + (", …" if len(shown) > _NAMES_MAX else "")


def _attributes_of(value: object) -> list[str]:
    """Return the keys of a mapping, or the public attributes of an object of a class that is not Python's own."""
    if hasattr(value, "keys"):
        return [str(key) for key in value.keys()]  # noqa: SIM118 - a row of asyncpg iterates over its values
    if type(value).__module__ == "builtins":
        return []
    if is_dataclass(value):
        return [one.name for one in fields(value)]
    return [name for name in dir(value) if not name.startswith("_")]


def _expression_of(error: MissingNameError, path: str, line: int, names: Mapping[str, Any]) -> str | None:
    """Return how the template wrote the object that lacks a name: `recipient` for `{{ recipient.nickname }}`."""
    try:
        tree = _parsed(path, Path(path).stat().st_mtime_ns)
    except (OSError, ValueError, TemplateError):
        return None
    for node in sorted(_lookups(tree, error.name), key=lambda node: node.lineno != line):
        try:
            text, value = _evaluate(node.node, names)
        except Exception:  # noqa: BLE001, S112 - a property of the user's object may raise anything
            continue
        if text and value is error.obj:
            return text
    return None


@lru_cache(16)  # a template that fails for one recipient fails for many
def _parsed(path: str, _changed_ns: int) -> nodes.Template:
    return _PLAIN.parse(Path(path).read_text(encoding="utf-8-sig"))


def _lookups(tree: nodes.Template, name: object) -> Iterator[nodes.Getattr | nodes.Getitem]:
    for node in tree.find_all((nodes.Getattr, nodes.Getitem)):
        match node:
            case nodes.Getattr(attr=wanted) | nodes.Getitem(arg=nodes.Const(value=wanted)) if wanted == name:
                yield node


def _evaluate(node: nodes.Node, names: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the text and the value of a name or of a chain of attributes and constant keys; ("", …) for others."""
    match node:
        case nodes.Name():
            return node.name, names.get(node.name, missing)
        case nodes.Getattr():
            text, value = _evaluate(node.node, names)
            return (text and f"{text}.{node.attr}"), _PLAIN.getattr(value, node.attr)
        case nodes.Getitem(arg=nodes.Const(value=key)):
            text, value = _evaluate(node.node, names)
            return (text and f"{text}[{key!r}]"), _PLAIN.getitem(value, key)
        case _:
            return "", missing

"""Rendering: one recipient's rows become a subject, a mail and a page. Reads templates, and nothing else.

`table` decides what rows look like, `language` in which language, `jinja` what is escaped; templates only lay it out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import cache, lru_cache
from pathlib import Path
from types import BuiltinMethodType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Final

from outbox.errors import SourceError, TemplateUseError
from outbox.reports.columns import humanise
from outbox.reports.language import ENGLISH, Language
from outbox.reports.language_rules import DASH
from outbox.reports.number_format import asked_number, number_of, percent_of
from outbox.reports.plain_table import TEXT_WIDTH_MAX
from outbox.reports.table import Table, excerpt_of, table_of
from outbox.reports.values import cell

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from jinja2.runtime import Context

PACKAGED = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Rendered:
    """One recipient's report: the subject in one line, the two bodies of the mail, and the page."""

    subject: str
    text: str
    html: str
    page: str


class Templates:
    """Templates of one report: `{subject.txt,email.txt,email.html,report.html}.j2`.

    Each is the first found of `<directory>/<report>/<name>`, `<directory>/<name>` and the packaged one. What begins
    with `{% extends "outbox:email.html.j2" %}` builds upon that, with `{% set own_content = true %}` and a block
    `content`. The digest has packaged ones of its own (`outbox:digest/email.html.j2`), which come before
    `<directory>/<name>`. The two of HTML escape every value, also in what they include, import or extend; the other two
    escape none. A name that does not exist is an error.

    They are given:

    - `report` (the name, `progress`), `title` (`Progress`), `link`, `sender` (the sender's name): str
    - `period`: `.key` (`2026-W48`), `.label` (see `Language.label`), `.starts_at`, `.ends_at` (civil times); as text
      it is its label
    - `recipient`: `key`, `email`, `name` (may be empty) and the further columns of the recipients query
    - `language`: the recipient's (see `Language`: `.tag`, `.direction`), and `say`, which gives a packaged phrase in it
    - `unsubscribe`: the address of a page where one click ends the emails, or None
    - `rows`: the mappings that the data query gave; `columns`: their names, in order
    - `table`: all rows made ready (a `Table`), and `excerpt`: as much of it as a mail should hold
    - the filters `cell` (any value as text), `number(places)`, `percent(places)` (0.42 as `42%`), `humanise`
      (`done_count` as `Done count`) and `lines` (a text in lines of a plain mail)

    `{{ value }}` writes arrays, mappings, ranges, intervals, yes and no, and NULL as the filter `cell` does, and other
    values as Python's `str`.

    Raises:
        SourceError: one of them cannot be read or compiled; the message names file, line and reason.
    """

    def __init__(self, directory: Path | None, report: str) -> None:
        self._subject, self._text, self._html, self._page = (
            _compiled(directory, report, f"{name}.j2")
            for name in ("subject.txt", "email.txt", "email.html", "report.html")
        )

    def render(self, context: Mapping[str, object], language: Language = ENGLISH) -> Rendered:
        """Return one recipient's report in their language, in which the context's `period` is labelled already.

        Raises whatever a template raises; `explain` describes it.
        """
        given = self._given(context, language)
        return Rendered(
            subject=" ".join(self._subject.render(given).split()),
            text=self._text.render(given).strip("\n") + "\n",
            html=self._html.render(given).strip() + "\n",
            page=self._page.render(given).strip() + "\n",
        )

    def page(self, context: Mapping[str, object], language: Language = ENGLISH) -> str:
        """Return the page alone, as `render` gives it."""
        return self._page.render(self._given(context, language)).strip() + "\n"

    @staticmethod
    def _given(context: Mapping[str, object], language: Language) -> dict[str, object]:
        period: Any = context["period"]
        columns: Any = context["columns"]
        rows: Any = context["rows"]
        table = _Later(lambda: table_of(columns, rows, starts_at=period.starts_at, language=language))
        excerpt = _Later(lambda: excerpt_of(table.there(), columns, rows, starts_at=period.starts_at))
        shown = {"language": language, "say": language.say, "table": table, "excerpt": excerpt}
        return {"unsubscribe": None, **context, **shown}


class _Later:
    """Table that is made when a template first reads it: half of a trivial report's time, and many need none."""

    def __init__(self, make: Callable[[], Table]) -> None:
        self._make = make
        self._made: Table | None = None

    def there(self) -> Table:
        """Return the table itself."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def __getattr__(self, name: str) -> object:
        return getattr(self.there(), name)

    def __str__(self) -> str:
        return str(self.there())

    def __dir__(self) -> list[str]:
        return dir(self.there())


def explain(error: Exception) -> str:
    """Return what went wrong in a template, in one sentence, with its path and line if they are known."""
    from outbox.reports.template_errors import explain as explained

    return explained(error)


def _language(context: "Context") -> Language:
    """Return the reader's language; English in a macro that was imported without its context."""
    found: Language = context.get("language", ENGLISH)
    return found


def _cell_of(context: "Context", value: object) -> str:
    """Return a value as text, in the language and the civil time of the report."""
    period = context.get("period")
    starts_at = getattr(period, "starts_at", None)
    if starts_at is None:  # in a macro that was imported without its context
        return cell(value, language=_language(context))
    return cell(value, starts_at.tzinfo, starts_at.year, _language(context))


# Values whose `str` people can read; the others are shown as the filter `cell` shows them.
_READABLE: Final = frozenset({str, int, float, Decimal, date, datetime, time})


def _shown(context: "Context", value: object) -> object:
    """Return what `{{ value }}` writes: no array, row, range, interval or NULL as Python's source code."""
    kind = type(value)
    if kind in _READABLE or isinstance(value, str):  # a str may be markup, which stays it
        return value
    if value is None or isinstance(value, bool | timedelta | list | tuple | set | frozenset | bytes | Mapping):
        return _cell_of(context, value)
    if hasattr(kind, "isempty") or hasattr(kind, "as_string") or hasattr(kind, "points") or hasattr(kind, "_asdict"):
        return _cell_of(context, value)
    if isinstance(value, FunctionType | MethodType | BuiltinMethodType):  # `row.items` is never the column "items"
        name = value.__name__
        raise TemplateUseError(f"{name} is a function here; write {name}() to call it, or ['{name}'] for a column")
    return _cell_of(context, value) if kind.__name__ == "Record" and hasattr(kind, "items") else value


@lru_cache(256)
def _wrapped(text: str) -> str:
    """Return the text in lines of at most `TEXT_WIDTH_MAX`, as far as its words allow; few differ, as phrases recur."""
    from textwrap import wrap

    return "\n".join(wrap(text, TEXT_WIDTH_MAX, break_long_words=False, break_on_hyphens=False))


def _lines(context: "Context", value: object) -> str:
    return _wrapped(str(value) if isinstance(value, str) else _cell_of(context, value))


def _number(context: "Context", value: object, places: int | None = None) -> str:
    number = asked_number(_defined(value), "number", places)
    return DASH if number is None else number_of(number, places, _language(context))


def _percent(context: "Context", value: object, places: int = 0) -> str:
    number = asked_number(_defined(value), "percent", places)
    return DASH if number is None else percent_of(number, places or 0, _language(context))


def _humanise(value: object) -> str:
    return humanise(_defined(value))


def _defined(value: object) -> object:
    """Return the value; one that is undefined raises its own error."""
    from jinja2 import Undefined

    if isinstance(value, Undefined):
        str(value)
    return value


@cache
def _environment(directory: Path | None, *, escapes: bool) -> "Environment":
    """Return the one environment per directory and kind, so that packaged templates are compiled once."""
    # 74 ms that only those pay who have something to render.
    from jinja2 import PrefixLoader, pass_context

    from outbox.reports.jinja import FileLoader, Shown, environment

    # No report's name has a colon, so the packaged names cannot be shadowed, nor extend themselves.
    packaged = PrefixLoader({"outbox": FileLoader(PACKAGED, checks_trust=False)}, delimiter=":")
    users = [FileLoader(directory, checks_trust=True)] if directory else []
    made = environment([packaged, *users], escapes=escapes)
    made.add_extension(Shown)
    made.filters["shown"] = pass_context(_shown)
    made.filters["cell"] = pass_context(_cell_of)
    made.filters["number"] = pass_context(_number)
    made.filters["percent"] = pass_context(_percent)
    made.filters["lines"] = pass_context(_lines)
    made.filters["humanise"] = _humanise
    return made


def _compiled(directory: Path | None, report: str, name: str) -> "Template":
    from jinja2 import TemplateError

    from outbox.reports.jinja import is_html

    environment = _environment(directory, escapes=is_html(name))
    try:
        template = environment.select_template([f"{report}/{name}", f"outbox:{report}/{name}", name, f"outbox:{name}"])
    except (TemplateError, ValueError, ArithmeticError, SyntaxError, RecursionError) as error:
        problem = explain(error).rstrip(".")
        raise SourceError(
            f"The template {name} of the report {report} cannot be used: {problem}; "
            "correct it, or remove it and the packaged one is used."
        ) from error
    # A chain of mappings as Jinja leaves it, which each rendering walks through: flat, it saves 10 us a time.
    template.globals = dict(template.globals)
    return template

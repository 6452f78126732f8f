"""What is said: one recipient's rows become a subject, a mail and a page. Reads templates, and nothing else.

What the rows look like is decided in `table`, in which language in `language`; the templates only lay it out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, lru_cache
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

from outbox.errors import SourceError
from outbox.language import ENGLISH, Language
from outbox.table import TEXT_WIDTH_MAX, Table, cell, excerpt_of, humanise, number_of, percent_of, table_of
from outbox.trust import distrust_of

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from jinja2.runtime import Context

PACKAGED = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Rendered:
    """What one recipient is told: the subject in one line, the two bodies of the mail, and the page."""

    subject: str
    text: str
    html: str
    page: str


class Templates:
    """The four templates of one report: `{subject.txt,email.txt,email.html,report.html}.j2`.

    Each is the first found of `<directory>/<report>/<name>`, `<directory>/<name>` and the packaged one. What begins
    with `{% extends "outbox:email.html.j2" %}` builds upon that, with `{% set own_content = true %}` and a block
    `content`. The digest has packaged ones of its own (`outbox:digest/email.html.j2`), which come before
    `<directory>/<name>`. Only `.html.j2` is autoescaped; a name that is not there is an error.

    They are given:

    - `report` (the name, `progress`), `title` (`Progress`), `link`, `sender` (the sender's name): str
    - `period`: `.key` (`2026-W48`), `.label` (see `Language.label`), `.starts_at`, `.ends_at` (civil times)
    - `recipient`: `key`, `email`, `name` (may be empty) and the further columns of the recipients query
    - `language`: the recipient's (see `Language`: `.tag`, `.direction`), and `say`, which gives a packaged phrase in it
    - `unsubscribe`: the address of a page where one click ends the emails, or None
    - `rows`: the mappings that the data query gave; `columns`: their names, in order
    - `table`: all rows made ready (a `Table`), and `excerpt`: as much of it as a mail should hold
    - the filters `cell` (any value as text), `number(places)`, `percent(places)` (0.42 as `42%`), `humanise`
      (`done_count` as `Done count`) and `lines` (a text in lines of a plain mail)

    Raises:
        SourceError: one of them cannot be read or compiled; the sentence names file, line and fault.
    """

    def __init__(self, directory: Path | None, report: str) -> None:
        self._subject, self._text, self._html, self._page = (
            _compiled(directory, report, f"{name}.j2")
            for name in ("subject.txt", "email.txt", "email.html", "report.html")
        )

    def render(self, context: Mapping[str, object], language: Language = ENGLISH) -> Rendered:
        """One recipient's report in their language, in which the context's `period` is labelled already.

        What a template raises comes through; `explain` puts it into words.
        """
        given = self._given(context, language)
        return Rendered(
            subject=" ".join(self._subject.render(given).split()),
            text=self._text.render(given).strip("\n") + "\n",
            html=self._html.render(given).strip() + "\n",
            page=self._page.render(given).strip() + "\n",
        )

    def page(self, context: Mapping[str, object], language: Language = ENGLISH) -> str:
        """The page alone, as `render` gives it."""
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
    """A table that is made when a template first looks into it: half of a trivial report's time, and many need none."""

    def __init__(self, make: Callable[[], Table]) -> None:
        self._make = make
        self._made: Table | None = None

    def there(self) -> Table:
        """The table itself."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def __getattr__(self, name: str) -> object:
        return getattr(self.there(), name)


def explain(error: Exception) -> str:
    """What went wrong in a template, in one sentence, with the template's path and line if they are known."""
    from jinja2 import TemplateNotFound, TemplateSyntaxError

    lines = [(frame.filename, frame.lineno) for frame in extract_tb(error.__traceback__)]
    fault = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, TemplateSyntaxError):
        lines.append((f"{error.filename or error.name}.j2".removesuffix(".j2"), error.lineno))
        fault = " ".join(str(error.message).split()).rstrip(".")
    elif isinstance(error, TemplateNotFound):
        fault = f"there is no template {error.message}"
    elif not type(error).__module__.startswith("jinja2"):
        fault = f"{type(error).__name__}: {fault}"
    places = [f"{path}, line {line}: " for path, line in lines if path.endswith(".j2")]
    return f"{places[-1] if places else ''}{fault}."


def _is_markup(name: str | None) -> bool:
    return name is not None and name.endswith(".html.j2")


def _language(context: "Context") -> Language:
    """Who includes a macro of another file without its context reads English."""
    found: Language = context.get("language", ENGLISH)
    return found


@lru_cache(256)
def _lines(text: str) -> str:
    """The text in lines of at most `TEXT_WIDTH_MAX`, as far as its words allow; there are few, since phrases recur."""
    from textwrap import wrap

    return "\n".join(wrap(text, TEXT_WIDTH_MAX, break_long_words=False, break_on_hyphens=False))


@cache
def _environment(directory: Path | None) -> "Environment":
    """One per directory, so that the packaged templates are compiled once for all reports."""
    # 74 ms that only those pay who have something to render.
    from jinja2 import (
        ChoiceLoader,
        Environment,
        FileSystemLoader,
        PrefixLoader,
        StrictUndefined,
        TemplateError,
        pass_context,
    )

    class TrustedLoader(FileSystemLoader):
        """Loader of the user's templates. Templates can run code, so others must not be able to write them."""

        def get_source(self, environment: Environment, template: str) -> tuple[str, str, Callable[[], bool]]:
            source, path, is_up_to_date = super().get_source(environment, template)
            if (distrust := distrust_of(Path(path))) is not None:
                raise TemplateError(f"{path}: not used, since a template can run code and {distrust}")
            return source, path, is_up_to_date

    def cell_here(context: "Context", value: object) -> str:
        starts_at = context["period"].starts_at
        return cell(value, starts_at.tzinfo, starts_at.year, _language(context))

    def number_here(context: "Context", value: float | Decimal | None, places: int | None = None) -> str:
        return cell(None) if value is None else number_of(value, places, _language(context))

    def percent_here(context: "Context", value: float | Decimal | None, places: int = 0) -> str:
        return cell(None) if value is None else percent_of(value, places, _language(context))

    packaged = FileSystemLoader(PACKAGED)
    # No report's name has a colon, so the packaged names cannot be shadowed, nor extend themselves.
    loaders = [
        PrefixLoader({"outbox": packaged}, delimiter=":"),
        *([TrustedLoader(directory)] if directory else []),
    ]
    environment = Environment(
        loader=ChoiceLoader(loaders),
        autoescape=_is_markup,  # noqa: S701 — text and subject are no markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = pass_context(cell_here)
    environment.filters["number"] = pass_context(number_here)
    environment.filters["percent"] = pass_context(percent_here)
    environment.filters["humanise"] = humanise
    environment.filters["lines"] = _lines
    return environment


def _compiled(directory: Path | None, report: str, name: str) -> "Template":
    environment = _environment(directory)
    from jinja2 import TemplateError

    try:
        template = environment.select_template([f"{report}/{name}", f"outbox:{report}/{name}", name, f"outbox:{name}"])
    except (TemplateError, OSError, UnicodeDecodeError) as error:
        fault = explain(error).rstrip(".")
        raise SourceError(
            f"The template {name} of the report {report} cannot be used: {fault}; "
            "mend it, or remove it and the packaged one is used."
        ) from error
    # A chain of mappings as Jinja leaves it, which each rendering walks through: flat, it saves 10 us a time.
    template.globals = dict(template.globals)
    return template

"""Pages for browsers: the report behind the link of an email, and the operators' board. Sends nothing.

    application  the ASGI app: its routes, its pool, its answers to errors
    server       a process of its own around it: `outbox web`
    connections  bounds on that process's connections, in all and per client
    report_pages  /r/{token}: the report as it was generated; /u/{token}: unsubscribe
    words        what the pages behind a link say, in the reader's language
    history      the earlier editions of a report for its recipient, and a line through their figures
    board        /: the operators' pages, for those who sign in
    responses    templates and answers, each with a policy that lets nothing else run
    queries      connections to Postgres: few, short, and possibly away for a while
    sub_path     the address in browsers, where a proxy serves the pages below a path
    security     clients, their failed attempts and parallel lookups, sizes of requests; headers of every answer

`outbox.web:app` is an ASGI application for a server of your own, with the settings that the commands read;
`create(settings)` makes one with settings that you have. Its board needs a sign-in in the settings.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from outbox.web.application import create

    app: Starlette

__all__ = ["app", "create"]


def __getattr__(name: str) -> object:
    """Make `app` when a server asks for it, import `create` when it is used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from outbox.web.application import create
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "outbox":
            raise
        words = f"outbox.web needs the extra `web`: pip install 'outbox-mail[web]' ({error})"
        raise ModuleNotFoundError(words, name=error.name) from None

    if name == "create":
        return create
    from outbox.settings import load

    return globals().setdefault("app", create(load()))

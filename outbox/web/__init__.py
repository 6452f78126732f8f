"""What people see in a browser: the report behind the link of an email, and the operators' board. Sends nothing.

    application  the ASGI app: its routes, its pool, what it says when something is wrong
    serve        a process of its own around it: `outbox web`
    pages        /r/{token}: the report as it was generated; /u/{token}: no more emails
    history      the earlier editions of a report for its recipient, and a line through their figures
    board        /: the operators' pages, for those who sign in
    looks        templates and answers, each with a policy that lets nothing else run
    store        what is asked of Postgres: short, bounded, and absent for a while if need be
    guard        who asks, how often in vain, how much; headers that every answer bears

`outbox.web:app` is an ASGI application for a server of your own, with the settings that the commands read;
`create(settings)` gives one with settings that you have.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from outbox.web.application import create

    app: Starlette

__all__ = ["app", "create"]


def __getattr__(name: str) -> object:
    """`app` is made when a server asks for it, `create` read when it is wanted."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from outbox.web.application import create

    if name == "create":
        return create
    from outbox.settings import load

    return globals().setdefault("app", create(load()))

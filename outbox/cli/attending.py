"""What attends a relay while it runs: who measures it, who is told how it goes, who sees editions complete.

None of these can stop it from sending: what is wrong with them is logged.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from outbox import tracing
from outbox.log import Events

if TYPE_CHECKING:
    from outbox.endpoints import Endpoints
    from outbox.health import Health
    from outbox.metrics import Meter
    from outbox.observer import Observer
    from outbox.relay import Relay
    from outbox.settings import Settings

log = Events("outbox.relay")


@asynccontextmanager
async def attended(settings: "Settings", *, until_empty: bool) -> "AsyncIterator[Relay]":
    """A relay that is to be run, and all that attends it.

    Raises:
        ConfigurationError: nobody can listen at `http`.

    """
    from outbox.completion import Completion
    from outbox.health import Health
    from outbox.notify import Notifier
    from outbox.relay import Relay

    async with AsyncExitStack() as stack:
        observers: list[Observer] = _tracing(settings, stack)
        meter, endpoints = _measuring(settings, stack, observers)
        relay = Relay(settings, until_empty=until_empty, observers=observers)
        health, completion = Health(relay, Notifier()), Completion(relay)
        if meter is not None and endpoints is not None:
            _serve(endpoints, relay, meter, health)
        tasks = [_beside(completion.watch(), "completion")]
        if endpoints is not None or health.notifier.is_heard:
            tasks.append(_beside(health.watch(), "health"))
        try:
            yield relay
        finally:
            health.notifier.stopping()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            health.notifier.close()
        if until_empty:
            await completion.last_look()


def _tracing(settings: "Settings", stack: AsyncExitStack) -> "list[Observer]":
    """Who writes traces, if they are wanted; what is not exported in the end is exported then."""
    traces = tracing.begin()
    if traces is None:
        return []
    from outbox.spans import Spans

    assert settings.smtp_url is not None
    stack.callback(tracing.end)
    return [Spans(traces, settings.smtp_url.name)]


def _measuring(
    settings: "Settings", stack: AsyncExitStack, observers: "list[Observer]"
) -> "tuple[Meter | None, Endpoints | None]":
    """Who measures, and where the answers are given, if `http` says so."""
    if not settings.http:
        return None, None
    from outbox.endpoints import Endpoints
    from outbox.metrics import Meter

    meter, endpoints = Meter(), stack.enter_context(Endpoints(settings.http))
    observers.append(meter)
    return meter, endpoints


def _serve(endpoints: "Endpoints", relay: "Relay", meter: "Meter", health: "Health") -> None:
    from prometheus_client import make_wsgi_app

    from outbox.fleet import FleetReader
    from outbox.metrics import registry_of

    reader = FleetReader(relay.database_url)
    endpoints.serve(make_wsgi_app(registry_of(relay, meter, health, reader)), health, reader)


def _beside(work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
    """The work as a task. Should it break by a fault of ours, that is said whole, and the relay goes on."""

    async def outlived() -> None:
        try:
            await work
        except Exception:
            log.exception("fault", "a fault of outbox itself: {name} has ended; the relay goes on", name=name)

    return asyncio.get_running_loop().create_task(outlived(), name=name)

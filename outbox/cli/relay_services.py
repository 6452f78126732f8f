"""Services beside the relays of a process: metrics, health, traces, completion of editions, comparison of route rules.

None of them can stop the relays from sending: their errors are logged.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from outbox import tracing
from outbox.log import Events

if TYPE_CHECKING:
    from outbox.monitoring.endpoints import Endpoints
    from outbox.monitoring.health import Health
    from outbox.monitoring.metrics import Meter
    from outbox.relay.observer import Observer
    from outbox.relay.supervisor import Relays
    from outbox.settings import Settings

log = Events("outbox.relay")


@asynccontextmanager
async def relays_with_services(settings: "Settings", *, until_empty: bool) -> "AsyncIterator[Relays]":
    """Yield the relays that are to be run, one for each route, with all services beside them.

    Raises:
        ConfigurationError: no socket can listen on `http`.

    """
    from outbox.monitoring.completion import Completion
    from outbox.monitoring.health import Health
    from outbox.monitoring.systemd import Notifier
    from outbox.operations.route_rules import watch_rules
    from outbox.relay.supervisor import Relays

    async with AsyncExitStack() as stack:
        spans = _tracing(stack)
        meters, endpoints = _measuring(settings, stack)

        def observers(own: "Settings", route: str) -> "list[Observer]":
            return [*spans(own, route), *([meters[route]] if route in meters else [])]

        relays = Relays(settings, until_empty=until_empty, observers=observers)
        health, completion = Health(relays, Notifier()), Completion(relays)
        if endpoints is not None:
            _serve(endpoints, relays, meters, health)
        tasks = [
            _beside(completion.watch(), "completion"),
            _beside(watch_rules(settings), "the look at the rules for routes"),
        ]
        if endpoints is not None or health.notifier.is_heard:
            tasks.append(_beside(health.watch(), "health"))
        try:
            yield relays
        finally:
            health.notifier.stopping()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            health.notifier.close()
        if until_empty:
            await completion.last_look()


def _tracing(stack: AsyncExitStack) -> "Callable[[Settings, str], list[Observer]]":
    """Return the function that makes the tracing observers of a route; the last spans are exported at the end."""
    traces = tracing.begin()
    if traces is None:
        return lambda *_: []
    from outbox.monitoring.spans import Spans

    stack.callback(tracing.end)

    def spans(own: "Settings", route: str) -> "list[Observer]":
        assert own.smtp_url is not None
        return [Spans(traces, route or own.smtp_url.name)]

    return spans


def _measuring(settings: "Settings", stack: AsyncExitStack) -> "tuple[dict[str, Meter], Endpoints | None]":
    """Return the meter of each route, and the endpoints, if `http` is set."""
    if not settings.http:
        return {}, None
    from outbox.monitoring.endpoints import Endpoints
    from outbox.monitoring.metrics import Meter

    return {route: Meter() for route in ("", *settings.routes)}, stack.enter_context(Endpoints(settings.http))


def _serve(endpoints: "Endpoints", relays: "Relays", meters: "dict[str, Meter]", health: "Health") -> None:
    from prometheus_client.exposition import choose_encoder

    from outbox.monitoring.fleet import FleetReader
    from outbox.monitoring.metrics import registry_of

    reader = FleetReader(relays.database_url)
    registry = registry_of(relays, meters, health, reader)

    def measure(accept: str) -> tuple[str, bytes]:
        encode, content_type = choose_encoder(accept)
        return content_type, encode(registry)

    endpoints.serve(measure, health, reader)


def _beside(work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
    """Return a task of this work. If it crashes, the log has the traceback, and the relay goes on."""

    async def logged() -> None:
        try:
            await work
        except Exception:
            log.exception("fault", "a fault of outbox itself: {name} has ended; the relay goes on", name=name)

    return asyncio.get_running_loop().create_task(logged(), name=name)

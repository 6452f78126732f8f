"""OpenTelemetry traces, where the OTEL_ variables ask for them and `outbox-mail[otel]` is installed; else nothing.

    outbox generate            one edition is made; TRACEPARENT of its environment is its parent
      outbox enqueue           one transaction; its context is kept with each email that it writes
        outbox send            one try of one email in a relay, from its claim to its verdict

Nothing is imported and nothing costs anything until `begin` has found that traces are wanted.
"""

import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from outbox import __version__
from outbox.log import Events, redacted

log = Events("outbox.tracing")

EXPORTERS: Final = ("otlp", "console")
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Tracing:
    """This process's traces. `None` in its place is that nobody wants any."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("outbox", __version__)

    @contextmanager
    def span(self, name: str, *, environ: Mapping[str, str] | None = None, **attributes: Any) -> Iterator[str | None]:
        """A span around what is done within; gives its W3C trace context. `environ` may have its parent's."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = environ and environ.get("TRACEPARENT")
        context = _context_of(parent) if parent else None
        with self._tracer.start_as_current_span(name, context=context, attributes=_attributes(attributes)):
            carrier: dict[str, str] = {}
            TraceContextTextMapPropagator().inject(carrier)
            yield carrier.get("traceparent")

    def sent(self, parent: str | None, *, began_s_ago: float, fault: str | None, **attributes: Any) -> None:
        """A try that is over, of an email that was made in the context `parent`; `fault` says why it was not sent."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        ended_at = time.time_ns()
        span = self._tracer.start_span(
            "outbox send",
            context=_context_of(parent),
            kind=SpanKind.CLIENT,
            start_time=ended_at - int(began_s_ago * 1e9),
            attributes=_attributes(attributes),
        )
        if fault is not None:
            span.set_status(Status(StatusCode.ERROR, redacted(fault)))
        span.end(ended_at)

    def close(self) -> None:
        """Export what is not exported yet; may take as long as OTEL_EXPORTER_OTLP_TIMEOUT says."""
        self._provider.shutdown()


def _context_of(traceparent: str | None) -> Any:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent or ""}, context=Context())


def _attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"outbox.{name}": redacted(value) if isinstance(value, str) else value
        for name, value in attributes.items()
        if value is not None
    }


def current() -> str | None:
    """The W3C trace context in which the caller is, if its own program traces; nothing is imported for it."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


def made_by() -> str:
    """This process, as an email that it makes remembers it: `host, pid 4711`."""
    return f"{socket.gethostname()}, pid {os.getpid()}"


def wanted(environ: Mapping[str, str] = os.environ) -> str | None:
    """The exporter that the variables ask for: `otlp` or `console`; None if they ask for none."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    named = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if named:
        return named if named in EXPORTERS else None
    return "otlp" if any(environ.get(name, "").strip() for name in _ENDPOINTS) else None


_begun: list[Tracing] = []


def begin(environ: Mapping[str, str] = os.environ) -> Tracing | None:
    """This process's traces from now on, if they are wanted; said once if what they need is not installed."""
    exporter = wanted(environ)
    if exporter is None:
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

        exporting: SpanExporter
        if exporter == "console":
            exporting = ConsoleSpanExporter(out=sys.stderr)
        else:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporting = OTLPSpanExporter()
    except ImportError as error:
        log.warning(
            "tracing_unavailable",
            "OTEL_ variables ask for traces, which need `pip install 'outbox-mail[otel]'` ({reason}); there are none.",
            reason=error,
        )
        return None
    resource = Resource.create({"service.version": __version__})
    if resource.attributes.get("service.name", "unknown_service").startswith("unknown_service"):  # type: ignore[union-attr]
        resource = resource.merge(Resource({"service.name": "outbox"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    try:
        provider.add_span_processor(BatchSpanProcessor(exporting))
    except ValueError as error:
        log.warning(
            "tracing_unavailable", "OTEL_BSP_ variables do not fit: {reason}; there are no traces.", reason=error
        )
        return None
    tracing = Tracing(provider)
    _begun[:] = [tracing]
    return tracing


@contextmanager
def span(name: str, *, environ: Mapping[str, str] | None = None, **attributes: Any) -> Iterator[str | None]:
    """A span of this process's traces; gives its W3C trace context, None where there are no traces."""
    if not _begun:
        yield None
        return
    with _begun[0].span(name, environ=environ, **attributes) as traceparent:
        yield traceparent


def end() -> None:
    """Export what is not exported yet."""
    for tracing in _begun:
        tracing.close()
    _begun.clear()


@contextmanager
def traced() -> Iterator[None]:
    """Traces, if they are wanted, of what is done within."""
    begin()
    try:
        yield
    finally:
        end()


__all__: Sequence[str] = ("Tracing", "begin", "end", "span", "traced", "wanted")

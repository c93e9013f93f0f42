"""Traces with OpenTelemetry. Imported only if they are wanted: its packages are an extra.

The front exports all spans, those of workers too: a worker has no way out. What it says is checked here: a span of a
worker counts only in the trace of a request that the worker was given, and where it is from is said by the front.
Neither paths nor queries nor headers are in the host's own spans: there may be secrets in them.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from sandbox import wire

from . import __version__

__all__ = ["Trace", "Tracing"]

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_MOST_SPANS: Final = 128
"""That one request's worker may add."""
_MAX_STATE: Final = 512  # characters: what W3C Trace Context, 3.3.1.5, wants passed on at least
_SLACK: Final = 1_000_000_000
_LAST_EXPORT: Final = 5.0  # seconds for what is left when the host stops
_KINDS: Final = tuple(SpanKind)
_SCOPE: Final = InstrumentationScope("hayhost", __version__)
_PROPAGATOR: Final = TraceContextTextMapPropagator()


def _epoch() -> int:
    """When the monotonic clock was 0, in nanoseconds since 1970."""
    return time.time_ns() - time.monotonic_ns()


class Trace:
    """A request's span, and what its worker may add to the trace."""

    __slots__ = ("_added", "_of", "_resource", "_started", "context", "span")

    def __init__(self, of: "Tracing", span: Span, resource: Resource, started: int) -> None:
        self.span = span
        self.context = span.get_span_context()
        self._of = of
        self._resource = resource
        self._started = started
        self._added = 0

    @property
    def id(self) -> str:
        """The trace's, as its worker knows it."""
        return f"{self.context.trace_id:032x}"

    def headers(self, given: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """``given`` for the worker, with this span for a parent."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, set_span_in_context(self.span))
        return [*(pair for pair in given if pair[0] not in ("traceparent", "tracestate")), *carrier.items()]

    def end(self, status: int) -> None:
        """The request is over; ``status`` is 0 if it had no answer."""
        if status:
            self.span.set_attribute("http.response.status_code", status)
        if status >= 500 or not status:
            self.span.set_attribute("error.type", str(status) if status else "disconnected")
            self.span.set_status(Status(StatusCode.ERROR))
        self.span.end()

    def add(self, span: wire.Span) -> None:
        """Take in a span that the worker says to be of this trace."""
        if self._added >= _MOST_SPANS or not self.context.trace_flags.sampled:
            return
        self._added += 1
        now = time.time_ns()
        started = min(max(span.started, self._started - _SLACK), now)
        ids = int(span.trace_id, 16), int(span.span_id, 16), int(span.parent_id, 16)
        if ids[0] != self.context.trace_id or ids[1] in (0, self.context.span_id) or not ids[2]:
            return
        self._of.export(
            ReadableSpan(
                span.name,
                SpanContext(ids[0], ids[1], is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED)),
                SpanContext(ids[0], ids[2], is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED)),
                self._resource,
                dict(span.attributes),
                [Event(event.name, dict(event.attributes), min(max(event.at, started), now)) for event in span.events],
                kind=_KINDS[span.kind],
                instrumentation_scope=_SCOPE,
                status=Status(StatusCode.ERROR, span.error or None) if span.failed else Status(),
                start_time=started,
                end_time=min(max(span.ended, started), now),
            )
        )


class Tracing:
    """Makes the host's spans, and exports all. Where to is said by the standard variables, ``OTEL_*``."""

    def __init__(self) -> None:
        resource = Resource.create({"service.name": "hayhost", "service.version": __version__})
        self._processor = BatchSpanProcessor(OTLPSpanExporter())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("hayhost", __version__)

    def request(
        self,
        headers: Sequence[tuple[str, str]],
        method: str,
        route: str,
        plugin: str,
        org: str,
        id: str,
        seconds: float,
    ) -> Trace:
        """The trace of a request that began ``seconds`` ago, with the client's span for a parent if it names one."""
        started = time.time_ns() - int(seconds * 1e9)
        method = method if method in _METHODS else "_OTHER"
        attributes = {
            "http.request.method": method,
            "http.route": route,
            "url.scheme": "http",
            "hayhost.plugin": plugin,
            "hayhost.org": org,
            "hayhost.request": id,
        }
        span = self._tracer.start_span(
            f"{method} {route}", _parent(headers), SpanKind.SERVER, attributes, start_time=started
        )
        return Trace(self, span, _resource(plugin, org), started)

    def started(self, plugin: str, org: str, began: int, stamps: Sequence[wire.Stamp], trace: Trace | None) -> None:
        """A worker is ready; ``began`` and ``stamps`` are of the monotonic clock, the latter as the worker says.

        ``trace`` is that of the request that it was started for.
        """
        epoch, now = _epoch(), time.monotonic_ns()
        where = {"hayhost.plugin": plugin, "hayhost.org": org}
        above = set_span_in_context(trace.span) if trace is not None else Context()
        whole = self._tracer.start_span("start worker", above, attributes=where, start_time=epoch + began)
        inside = set_span_in_context(whole)
        before = began
        for phase, at in stamps:
            ended = min(max(at, before), now)
            if ended > before:
                span = self._tracer.start_span(phase[:100], inside, attributes=where, start_time=epoch + before)
                span.end(epoch + ended)
            before = ended
        whole.end(epoch + now)

    def hook(self, name: str, plugin: str, org: str, started: int, ended: int, failed: bool) -> None:
        """A lifecycle hook is over; the times are of the monotonic clock, as its worker says."""
        epoch, now = _epoch(), time.monotonic_ns()
        ended = min(ended, now)
        where = {"hayhost.plugin": plugin, "hayhost.org": org}
        span = self._tracer.start_span(name, Context(), attributes=where, start_time=epoch + min(started, ended))
        if failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(epoch + ended)

    def export(self, span: ReadableSpan) -> None:
        """Have a span exported that somebody else made."""
        self._processor.on_end(span)

    async def close(self) -> None:
        """Export what is left, if that can be done soon."""
        loop = asyncio.get_running_loop()
        await asyncio.wait({loop.run_in_executor(None, self._provider.shutdown)}, timeout=_LAST_EXPORT)


@lru_cache(10_000)
def _resource(plugin: str, org: str) -> Resource:
    return Resource(
        {"service.name": plugin, "service.namespace": "hayhost", "hayhost.plugin": plugin, "hayhost.org": org}
    )


def _parent(headers: Sequence[tuple[str, str]]) -> Context:
    """The client's span, if exactly one is named well (W3C Trace Context, 3.2 and 3.3)."""
    parents = [value for name, value in headers if name == "traceparent"]
    state = ",".join(value for name, value in headers if name == "tracestate")
    carrier: Mapping[str, str] = {}
    if len(parents) == 1 and len(parents[0]) <= 200:
        carrier = {"traceparent": parents[0], **({"tracestate": state} if len(state) <= _MAX_STATE else {})}
    return _PROPAGATOR.extract(carrier, Context())

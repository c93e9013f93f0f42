"""Spans of a worker, as records for the front, which alone can export them.

The handler's span needs no package. If the plugin has imported OpenTelemetry's API, and its SDK is there, spans of the
plugin's own are children of it.
"""

import importlib.util
import random
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from . import wire

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

__all__ = ["Handling", "Tracing", "prepare"]

_TEXT: Final = 1_000
_NAME: Final = 200
_Send = Callable[[wire.Message], object]


class Handling:
    """A request's span, from the call of its handler to the end of its answer."""

    __slots__ = ("name", "parent_id", "span_id", "started", "trace_id")

    def __init__(self, name: str, trace_id: str, parent_id: str) -> None:
        self.name = name
        self.trace_id = trace_id
        self.parent_id = parent_id
        self.span_id = f"{random.getrandbits(64) or 1:016x}"
        self.started = time.time_ns()


class Tracing:
    """Makes the spans of one worker. ``routes`` are the methods and paths of its routes."""

    def __init__(self, send: _Send, routes: list[str]) -> None:
        self._send = send
        self._routes = routes
        if _provided:
            _provided[0].send = send

    def begin(self, request: wire.Request) -> Handling | None:
        """The span of a request, if it is to be recorded; whatever runs in this context is below it.

        The front has written ``traceparent``, and the handler sees it with this span in its place.
        """
        parent = next((value for name, value in request.headers if name == "traceparent"), "")
        _, trace_id, parent_id, flags = parent.split("-") if parent.count("-") == 3 else ("", "", "", "0")
        if not int(flags, 16) & 1:
            return None
        name = self._routes[request.route] if request.route >= 0 else request.path
        handling = Handling(name[:_NAME], trace_id, parent_id)
        ours = ("traceparent", f"00-{trace_id}-{handling.span_id}-{flags}")
        request.headers = [pair if pair[0] != "traceparent" else ours for pair in request.headers]
        if _provided:
            _provided[0].attach(handling)
        return handling

    def end(self, handling: Handling, failed: bool) -> None:
        """The answer is complete."""
        ids = handling.trace_id, handling.span_id, handling.parent_id
        self._send(wire.Spans([wire.Span(*ids, handling.name, 0, handling.started, time.time_ns(), failed)]))


class _Provided:
    """What spans of the plugin's own go through."""

    def __init__(self) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
        from opentelemetry.trace import set_tracer_provider

        outer = self

        class Processor(SpanProcessor):
            def on_end(self, span: "ReadableSpan") -> None:
                outer.ended(span)

        self.send: _Send = lambda message: None
        # What is not below a request belongs to no trace that the front would take it for.
        provider = TracerProvider(
            sampler=ParentBased(ALWAYS_OFF), resource=Resource.get_empty(), shutdown_on_exit=False
        )
        provider.add_span_processor(Processor())
        set_tracer_provider(provider)

    def attach(self, handling: Handling) -> None:
        """Have spans in this context be below ``handling``."""
        from opentelemetry import context, trace

        ids = int(handling.trace_id, 16), int(handling.span_id, 16)
        above = trace.SpanContext(*ids, is_remote=True, trace_flags=trace.TraceFlags(1))
        context.attach(trace.set_span_in_context(trace.NonRecordingSpan(above)))

    def ended(self, span: "ReadableSpan") -> None:
        from opentelemetry.trace import StatusCode

        if span.context is None or span.parent is None:
            return
        failed = span.status.status_code is StatusCode.ERROR
        self.send(
            wire.Spans(
                [
                    wire.Span(
                        f"{span.context.trace_id:032x}",
                        f"{span.context.span_id:016x}",
                        f"{span.parent.span_id:016x}",
                        _text(span.name, _NAME),
                        span.kind.value,
                        span.start_time or 0,
                        span.end_time or 0,
                        failed,
                        _text(span.status.description or "", _TEXT) if failed else "",
                        _attributes(span.attributes),
                        [
                            wire.SpanEvent(_text(event.name, _NAME), event.timestamp, _attributes(event.attributes))
                            for event in span.events[: wire.MAX_SPAN_EVENTS]
                        ],
                    )
                ]
            )
        )


_provided: list[_Provided] = []


def prepare() -> None:
    """In a zygote that has loaded its plugin: have the plugin's spans recorded, if it can make any."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or importlib.util.find_spec("opentelemetry.sdk") is None:
        return
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):  # else it has one of its own
        _provided.append(_Provided())


def _attributes(given: Mapping[str, Any] | None) -> list[tuple[str, str | bool | int | float]]:
    kept: list[tuple[str, str | bool | int | float]] = []
    for name, value in list((given or {}).items())[: wire.MAX_SPAN_ATTRIBUTES]:
        if isinstance(value, int) and not isinstance(value, bool) and not -(1 << 63) <= value < 1 << 63:
            value = str(value)
        kept.append((_text(name, _NAME), value if isinstance(value, bool | int | float) else _text(value, _TEXT)))
    return kept


def _text(value: object, most: int) -> str:
    return str(value)[:most].encode("utf-8", "backslashreplace").decode()[:most]

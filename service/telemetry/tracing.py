"""Traces: a span of each request, each event and each run of a consumer, by OpenTelemetry.

The standard variables turn them on, where the extra `otel` is installed; FastAPI makes the spans of requests itself.
What must stay true: without the variables nothing is done for a request or a delivery, and the SDK is not imported;
neither waits for a collector or fails with it; a span has no payload and nothing that an error says; and the provider
is made in the process whose spans it takes, since a fork takes no threads along.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import structlog

from service.text import storable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_log = structlog.get_logger(__name__)

_PROTOCOL = "http/protobuf"

_LAST = 2.0
"""Seconds that a stopping process gives the collector to take what is left."""

_SELDOM = 60.0
"""Seconds between two log lines about a collector that is away."""

_TALKATIVE = ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk._shared_internal")
"""Loggers that tell of each try to reach it, and of each span that there is no room for."""

_tracer: Tracer | None = None
_provider: TracerProvider | None = None


def start_tracing(process: str, version: str) -> None:
    """Make spans from now on, if the environment asks for them; a log line says so, or why not.

    Args:
        process: What `service.name` is where the environment does not name it.
        version: What `service.version` is.
    """
    global _tracer
    try:
        if _is_asked_for():
            _tracer = _tracer_of(process, version)
            _log.info("tracing.started")
    except ImportError:
        _log.warning("tracing.not_started", reason="OTEL_ variables are set, but the extra `otel` is not installed")
    except Exception as error:  # noqa: BLE001  whatever is wrong with a variable, the process does its work
        _log.error("tracing.not_started", reason=str(error))


def _is_asked_for() -> bool:
    if not _variable("ENDPOINT") or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    protocol = _variable("PROTOCOL") or _PROTOCOL
    if exporter not in ("otlp", "none") or protocol != _PROTOCOL:
        raise ValueError(f"there is only OTEL_TRACES_EXPORTER=otlp, and OTEL_EXPORTER_OTLP_PROTOCOL={_PROTOCOL}")
    return exporter == "otlp"


def _variable(name: str) -> str:
    return os.environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or os.environ.get(f"OTEL_EXPORTER_OTLP_{name}") or ""


def _tracer_of(process: str, version: str) -> Tracer:
    global _provider
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):  # nobody else has made one
        given = OTELResourceDetector().detect().attributes
        resource = Resource.create({"service.name": process, "service.version": version, **given})
        # Its own hook for the end of the process would wait for a collector that is away, for half a minute.
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        for name in _TALKATIVE:
            logging.getLogger(name).addFilter(_Seldom())
        trace.set_tracer_provider(provider)
        _provider = provider
    return trace.get_tracer("service")


def stop_tracing() -> None:
    """Export what is left, if the collector takes it at once."""
    if _provider is not None:
        exporting = threading.Thread(target=_provider.shutdown, name="tracing-stop", daemon=True)
        exporting.start()
        exporting.join(_LAST)


def created(event_type: str, event_id: str, headers: Mapping[str, str]) -> dict[str, str]:
    """Note that an event is published; its `headers`, with the place in the trace from which its deliveries go on."""
    if _tracer is None:
        return dict(headers)
    from opentelemetry.trace import SpanKind, set_span_in_context

    about = _about("create", event_type, event_id, headers)
    span = _tracer.start_span(f"create {event_type}", kind=SpanKind.PRODUCER, attributes=about)
    span.end()
    others = {name: value for name, value in headers.items() if name not in ("traceparent", "tracestate")}
    _w3c().inject(others, set_span_in_context(span))
    return others


def running(
    event_type: str, delivery_id: str, headers: Mapping[str, str], *, apart: bool, about: Mapping[str, str | int]
) -> AbstractContextManager[object]:
    """Around a run of a consumer: its span, linked to the creation of its event.

    Args:
        event_type: What happened.
        delivery_id: The consumer's delivery of it.
        headers: Of the event.
        apart: Whether the run begins a trace of its own, instead of going on in that of its event.
        about: More attributes.
    """
    if _tracer is None:
        return nullcontext()
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, SpanKind, get_current_span

    origin = _w3c().extract(headers, Context())
    creation = get_current_span(origin).get_span_context()
    return _tracer.start_as_current_span(
        f"process {event_type}",
        Context() if apart else origin,
        SpanKind.CONSUMER,
        {**_about("process", event_type, delivery_id, headers), **about},
        [Link(creation)] if creation.is_valid else (),
        record_exception=False,
        set_status_on_exception=False,
    )


def running_together(
    event_type: str, headers: Sequence[Mapping[str, str]], about: Mapping[str, str | int]
) -> AbstractContextManager[object]:
    """Around a run for many events: a trace of its own, linked to the creation of each; see `running`."""
    if _tracer is None:
        return nullcontext()
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, SpanKind, get_current_span

    creations = [get_current_span(_w3c().extract(each, Context())).get_span_context() for each in headers]
    attributes = _about("process", event_type, "", {}) | {"messaging.batch.message_count": len(headers)}
    return _tracer.start_as_current_span(
        f"process {event_type}",
        Context(),
        SpanKind.CONSUMER,
        {name: value for name, value in attributes.items() if value != ""} | dict(about),
        [Link(each) for each in creations if each.is_valid],
        record_exception=False,
        set_status_on_exception=False,
    )


def ran(outcome: str, error: BaseException | None) -> None:
    """Note what became of the run around which this is."""
    if _tracer is None:
        return
    from opentelemetry.trace import StatusCode, get_current_span

    span = get_current_span()
    if span.is_recording():  # an outcome that had to wait for PostgreSQL comes later
        span.set_attribute("messaging.outbox.outcome", outcome)
        if error is not None:
            span.set_attribute("error.type", storable(type(error).__qualname__, 100))
            span.set_status(StatusCode.ERROR)


def add_trace_ids(_logger: object, _method: str, fields: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """For structlog: the current span's `trace_id` and `span_id`, as a trace's viewer shows them."""
    if _tracer is not None:
        from opentelemetry.trace import format_span_id, format_trace_id, get_current_span

        span = get_current_span().get_span_context()
        if span.is_valid:
            fields["trace_id"], fields["span_id"] = format_trace_id(span.trace_id), format_span_id(span.span_id)
    return fields


def _about(operation: str, event_type: str, message_id: str, headers: Mapping[str, str]) -> dict[str, str | int]:
    """By OpenTelemetry's conventions for messaging. The conversation is everything that one request causes."""
    return {
        "messaging.system": "outbox",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": event_type,
        "messaging.message.id": message_id,
        "messaging.message.conversation_id": headers.get("correlation_id", ""),
    }


def _w3c() -> TraceContextTextMapPropagator:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()


class _Seldom(logging.Filter):
    """Lets a logger have a line a minute, without a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        record.exc_info = None
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _SELDOM
        return True

"""The span of a batch leads to the creation of each of its events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id

from service.telemetry import tracing

if TYPE_CHECKING:
    import pytest

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENTS = ("00f067aa0ba902b7", "00f067aa0ba902b8")


def test_a_batch_is_linked_to_each_of_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    headers = [{"traceparent": f"00-{TRACE}-{parent}-01"} for parent in PARENTS] + [{"correlation_id": "untraced"}]
    with tracing.running_together("parcel.sent", headers, {"messaging.outbox.queue": "parcels"}):
        tracing.ran("completed", None)
    (span,) = exporter.get_finished_spans()
    assert span.parent is None
    assert [format_span_id(link.context.span_id) for link in span.links] == list(PARENTS)
    assert span.attributes is not None
    assert span.attributes["messaging.batch.message_count"] == 3
    assert span.attributes["messaging.outbox.outcome"] == "completed"
    assert "messaging.message.id" not in span.attributes

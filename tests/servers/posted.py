"""A server that keeps what is posted to it, as a collector of traces or of errors does, and reads it."""

from __future__ import annotations

import gzip
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.proto.common.v1.common_pb2 import KeyValue
    from opentelemetry.proto.trace.v1.trace_pb2 import Span as Message

__all__ = ["Posted", "Span", "posted"]

_KINDS = {1: "internal", 2: "server", 3: "client", 4: "producer", 5: "consumer"}


@dataclass(frozen=True)
class Span:
    """A span as a collector gets it; ids are hexadecimal, and "" if there is none."""

    process: str
    """Its `service.name`."""
    name: str
    kind: str
    trace: str
    id: str
    parent: str
    links: tuple[tuple[str, str], ...]
    """Trace and span."""
    attributes: dict[str, Any]
    failed: bool
    began: int
    """Nanoseconds since the epoch."""
    ended: int
    text: str
    """All of it."""


class Posted:
    """What was posted, by path."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.bodies: list[tuple[str, bytes]] = []

    def spans(self) -> list[Span]:
        """Those that came so far."""
        return [span for path, body in self.bodies if path == "/v1/traces" for span in _spans(body)]

    def envelopes(self) -> list[dict[str, Any]]:
        """The events that Sentry's library sent so far."""
        events = [body.splitlines() for path, body in self.bodies if path.endswith("/envelope/")]
        return [json.loads(lines[2]) for lines in events if json.loads(lines[1])["type"] == "event"]


def _spans(body: bytes) -> Iterator[Span]:
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        process = _attributes(resource.resource.attributes)["service.name"]
        for scope in resource.scope_spans:
            yield from (_span(process, each) for each in scope.spans)


def _span(process: str, message: Message) -> Span:
    return Span(
        process=process,
        name=message.name,
        kind=_KINDS[message.kind],
        trace=message.trace_id.hex(),
        id=message.span_id.hex(),
        parent=message.parent_span_id.hex(),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in message.links),
        attributes=_attributes(message.attributes),
        failed=message.status.code == 2,
        began=message.start_time_unix_nano,
        ended=message.end_time_unix_nano,
        text=str(message),
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    def value(pair: KeyValue) -> Any:
        kind = pair.value.WhichOneof("value")
        return getattr(pair.value, kind) if kind else None

    return {pair.key: value(pair) for pair in pairs}


@contextmanager
def posted() -> Iterator[Posted]:
    """Such a server on a free port; it answers 200 to everything."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kept.bodies.append(
                (self.path, gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
            )
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class names it so
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kept = Posted(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield kept
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

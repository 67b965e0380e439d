"""Structured logs, and the ids that tie a request, its outbox rows and the workers' log lines together.

A request's correlation id travels in the outbox row's `headers` and is bound again around the delivery, so that one
search finds everything that a request caused. `traceparent` (W3C) is passed on as it came, unless traces are on: then
it is that of the event's own span.
"""

from __future__ import annotations

import logging
import re
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from io import StringIO
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import structlog

from service.telemetry.log_queue import QueuedHandler
from service.telemetry.tracing import add_trace_ids
from service.text import TRACEPARENT, storable, visible

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import TextIO

Headers = dict[str, str]
"""`correlation_id`, and where known `traceparent`, `tracestate` and `causation_id`."""

_QUIET = ("dramatiq.middleware", "service.database.engine._Pool")
"""Libraries' loggers, SQLAlchemy's under our class, that tell at INFO how they start and stop their insides."""

_HEADERS: ContextVar[Headers | None] = ContextVar("outbox_headers", default=None)
_SAFE_ID = re.compile(r"[A-Za-z0-9._:/=+-]{1,128}")
_TRACESTATE = re.compile(r"[ -~]{1,512}")


def current_headers() -> Headers:
    """The headers an event published here carries; a new correlation id where none is bound."""
    headers = _HEADERS.get()
    return dict(headers) if headers is not None else {"correlation_id": str(uuid4())}


def request_headers(incoming: Mapping[str, str]) -> Headers:
    """Headers for a request, from its `X-Correlation-ID` and W3C trace headers; malformed ones are dropped."""
    correlation = incoming.get("x-correlation-id", "")
    headers = {"correlation_id": correlation if _SAFE_ID.fullmatch(correlation) else str(uuid4())}
    if TRACEPARENT.fullmatch(incoming.get("traceparent", "")):
        headers["traceparent"] = incoming["traceparent"]
        if _TRACESTATE.fullmatch(incoming.get("tracestate", "")):
            headers["tracestate"] = incoming["tracestate"]
    return headers


@contextmanager
def trace_context(headers: Headers, **fields: Any) -> Iterator[None]:
    """Bind `headers` for events published inside, and `fields` with the correlation id for log lines."""
    headers = {name: storable(value) for name, value in headers.items()}
    token = _HEADERS.set(headers)
    try:
        with structlog.contextvars.bound_contextvars(correlation_id=headers.get("correlation_id"), **fields):
            yield
    finally:
        _HEADERS.reset(token)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose events are constant dotted names with fields."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(name)
    return logger


def brief(error: BaseException) -> str:
    """An error's type and what it says, for a field of a line."""
    return f"{type(error).__name__}: {error}"[:200]


def configure_logging(log_format: str, log_level: str) -> None:
    """Send structlog, the standard library's loggers and warnings to stderr in one format; nobody waits for that."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        add_trace_ids,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderers: list[structlog.typing.Processor] = (
        [_make_visible, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=_traceback)]
        if log_format == "console"
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = QueuedHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(log_level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING if log_level == "INFO" else logging.NOTSET)
    logging.captureWarnings(True)


def flush_logs() -> None:
    """Wait until what was logged is written, for a second at most: before a process ends that runs no exit hooks."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def _make_visible(_logger: Any, _method: str, fields: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """For the console: what a request or a server said must not steer the terminal that shows the log."""
    return {visible(key): value if key == "exc_info" else _visible_value(key, value) for key, value in fields.items()}


def _visible_value(key: str, value: Any) -> Any:
    text = value if isinstance(value, str) else repr(value)
    if text.isprintable():
        return value
    return visible(text, keep="\n\t" if key in ("exception", "stack") else "")


def _traceback(out: TextIO, exc_info: structlog.typing.ExcInfo) -> None:
    """Without the values of local variables, which the default formatter prints."""
    text = StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    out.write(visible(text.getvalue(), keep="\n\t"))

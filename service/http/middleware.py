"""What surrounds every request: ids, one log line, security headers, a deadline and a size limit.

Plain ASGI throughout, in this order from the outside: `RequestContext`, `Deadline`, `BodyLimit`. What must stay true:
each of them runs the application in the same task, so that a deadline cancels the handler and its transaction, and
context variables reach the events it publishes.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect

from service.http.problems import problem
from service.telemetry.logs import get_logger, request_headers, trace_context

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_log = get_logger("service.http")

_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def route_template(scope: Scope) -> str:
    """The template of the route that a request has come to, such as `/orders/{order_id}`, or `other`."""
    # FastAPI's own record has the prefixes of all routers around the route, which the route itself lacks.
    route = scope.get("fastapi", {}).get("effective_route_context") or scope.get("route")
    return getattr(route, "path_format", None) or "other"


class RequestContext:
    """Bind the correlation id, answer what nothing else answered with 500, and log one line per request.

    Args:
        app: What is inside.
        running: Gets the request of each task for as long as it runs.
    """

    def __init__(self, app: ASGIApp, running: dict[asyncio.Task[Any] | None, Scope]) -> None:
        self.app = app
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = request_headers(Headers(scope=scope))
        started, status = time.perf_counter(), 0
        task = asyncio.current_task()
        self._running[task] = scope

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(scope, MutableHeaders(scope=message), headers["correlation_id"])
            await send(message)

        with trace_context(headers):
            try:
                await self.app(scope, receive, send_with_headers)
            except ClientDisconnect:
                _log.info("http.client_disconnected")
            except Exception:  # the last frame that can still answer
                _log.exception("http.unhandled")
                if status:
                    raise  # too late to answer: the connection has to break
                await problem(500)(scope, receive, send_with_headers)
            finally:
                del self._running[task]
                _log_request(scope, status, started)


def _add_headers(scope: Scope, headers: MutableHeaders, correlation_id: str) -> None:
    headers["X-Correlation-ID"] = correlation_id
    for name, value in _SECURITY_HEADERS.items():
        headers.setdefault(name, value)
    if not headers.get("content-type", "").startswith("text/html"):  # the API's own documentation loads scripts
        headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
    if scope["scheme"] == "https":
        headers.setdefault("Strict-Transport-Security", "max-age=31536000")


def _log_request(scope: Scope, status: int, started: float) -> None:
    # Probes come every few seconds and would bury the rest.
    log = _log.debug if scope["path"].startswith("/health/") else _log.info
    elapsed = round((time.perf_counter() - started) * 1000, 1)
    log("http.request", method=scope["method"], path=scope["path"], status=status, duration_ms=elapsed)


class Deadline:
    """Cancel a request that has not begun to answer in time, which rolls its transaction back, and answer 504.

    Whether the cancelled COMMIT of a request took effect is unknown: an Idempotency-Key makes repeating it safe.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        deadline = asyncio.timeout(self.seconds)

        async def send_and_stop_clock(message: Message) -> None:
            if message["type"] == "http.response.start":
                deadline.reschedule(None)  # a slow reader or a background task is not a slow request
            await send(message)

        try:
            async with deadline:
                await self.app(scope, receive, send_and_stop_clock)
        except TimeoutError:
            if not deadline.expired():
                raise
            detail = f"There was no answer within {self.seconds:g} s. It may or may not have taken effect."
            await problem(504, detail=detail)(scope, receive, send)


class BodyLimit:
    """Refuse a request body over `max_bytes` with 413: by its Content-Length, or while it arrives."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self.max_bytes):
            await problem(413, detail=self._detail())(scope, receive, send)
            return
        received = 0

        async def receive_bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, self._detail())
            return message

        await self.app(scope, receive_bounded, send)

    def _detail(self) -> str:
        return f"The body may have {self.max_bytes} bytes at most."

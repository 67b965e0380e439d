"""What the API tells Prometheus: its requests, its connections to PostgreSQL, and its event loop.

Plain ASGI around everything else, on a port of its own. What must stay true: no label's values come from a client. A
path counts under its route's template, one that no route has under `other`, and so does a method that nobody knows.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from service.database.engine import pool_timeouts
from service.http.middleware import route_template
from service.ledger.statistics import BOUNDS, Histogram
from service.telemetry.metrics import Durations, Sample
from service.telemetry.metrics_endpoint import metrics_served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.datastructures import State
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from service.settings import MetricsSettings

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


class Metrics:
    """The outermost middleware; it serves the metrics for as long as the application lives."""

    def __init__(self, app: ASGIApp, settings: MetricsSettings) -> None:
        self.app = app
        self._settings = settings
        self._durations: dict[tuple[str, str, str], Histogram] = defaultdict(Histogram)
        self._active: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http":
            await self._measure(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def collect() -> list[Sample]:
            return [*self._requests(), *_of_process(scope["app"].state)]

        async with metrics_served(self._settings.host, self._settings.port, collect):
            await self.app(scope, receive, send)

    async def _measure(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        began, status, active = time.perf_counter(), "none", True
        self._active[method] += 1

        def end() -> None:
            nonlocal active
            if active:
                active = False
                self._active[method] -= 1
                self._durations[method, route_template(scope), status].add(time.perf_counter() - began)

        async def send_and_watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                end()

        try:
            await self.app(scope, receive, send_and_watch)
        except Exception:
            if not active:  # in a background task, whose failure no status tells
                self._failures[route_template(scope)] += 1
            raise
        finally:
            end()

    def _requests(self) -> Iterator[Sample]:
        for labels, each in self._durations.items():
            durations = Durations(BOUNDS, tuple(each.buckets), each.seconds)
            yield Sample("http_server_request_duration_seconds", labels, durations)
        for method, active in self._active.items():
            yield Sample("http_server_active_requests", (method,), active)
        for route, failures in self._failures.items():
            yield Sample("http_server_background_failures_total", (route,), failures)


def _of_process(state: State) -> Iterator[Sample]:
    engine = getattr(state, "engine", None)
    if engine is None:  # still starting
        return
    yield Sample("event_loop_lag_seconds", ("api",), state.loop_lag.longest())
    yield Sample("db_pool_timeouts_total", ("api",), pool_timeouts(engine))
    used, idle = engine.pool.checkedout(), engine.pool.checkedin()
    for status, count in (("used", used), ("idle", idle), ("free", engine.pool.size() - used - idle)):
        yield Sample("db_pool_connections", (status,), count)

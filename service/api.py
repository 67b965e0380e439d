"""The HTTP API's composition root.

uvicorn service.api:create_app --factory --http service.http.protocol:BoundedProtocol
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from service import domains
from service.database.engine import create_engine
from service.database.revisions import Revisions
from service.database.sessions import OneTransaction, session_factory
from service.errors import ConfigurationError
from service.http import health
from service.http.callers import check_callers
from service.http.edge import KnownHosts, RateLimit
from service.http.error_handlers import install_handlers
from service.http.middleware import BodyLimit, Deadline, RequestContext, route_template
from service.http.openapi import install_openapi
from service.identity.principal import install_identity
from service.production import exit_if_unsafe
from service.settings import Settings, listed, refuse_to_start, settings_at_start
from service.telemetry.logs import configure_logging, flush_logs
from service.telemetry.loop_lag import LoopLag
from service.telemetry.tracing import start_tracing, stop_tracing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi.telemetry import TelemetryConfig
    from starlette.types import Scope

    from service.settings import ApiSettings


# One span a request, whose log records would repeat what exceptions say, and whose metrics we have.
_REQUEST_SPANS: TelemetryConfig = {
    "auto_configure": False,
    "logs": False,
    "metrics": False,
    "operation_spans": False,
    "exclude": lambda scope: scope["path"].startswith("/health/"),
}


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application.

    Args:
        settings: What to run with; by default the environment's, and then the process's logging is set up too, and
            what is wrong ends the process with one line.

    Raises:
        ConfigurationError: nothing says who may call a route, or nobody could.
    """
    if settings is not None:
        return _created(settings)
    settings = _settings_of_process()
    try:
        return _created(settings)
    except ConfigurationError as error:
        refuse_to_start("api", error)


def _created(settings: Settings) -> FastAPI:
    domains.discover()
    shown = settings.api.docs == "on" or (settings.api.docs == "auto" and settings.environment != "production")
    app = FastAPI(
        title=settings.api.title,
        version="1",
        lifespan=_lifespan,
        redirect_slashes=False,
        telemetry=_REQUEST_SPANS,
        openapi_url="/openapi.json" if shown else None,  # without it there is no page either
    )
    app.state.settings = settings
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_bytes=settings.api.max_body_bytes)
    app.add_middleware(Deadline, seconds=settings.api.request_timeout)
    _add_edge(app, settings.api)
    app.state.running = {}
    app.add_middleware(RequestContext, running=app.state.running)
    if settings.metrics.port:
        from service.http.request_metrics import Metrics

        app.add_middleware(Metrics, settings=settings.metrics)
    install_handlers(app)
    app.include_router(health.router)
    for router in domains.routers():
        app.include_router(router, generate_unique_id_function=lambda route: route.name)
    install_openapi(app)
    check_callers(app)
    install_identity(app, settings.identity)
    return app


def _add_edge(app: FastAPI, settings: ApiSettings) -> None:
    if settings.rate_limit:
        app.add_middleware(RateLimit, per_minute=settings.rate_limit)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=listed(settings.cors_origins),
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "X-Correlation-ID", "Traceparent"],
            expose_headers=["Location", "Retry-After", "Idempotency-Replayed", "X-Correlation-ID"],
        )
    hosts = {each.lower() for each in listed(settings.hosts)}
    if hosts and "*" not in hosts:
        app.add_middleware(KnownHosts, hosts=hosts)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    check_callers(app)  # those too that were added since
    app.state.revisions = await asyncio.to_thread(Revisions)
    # The engine belongs to the running event loop, so it is made here and not when the module is imported.
    engine = create_engine(
        settings.database, application_name="api", statement_timeout=settings.database.statement_timeout
    )
    app.state.engine, app.state.sessions = engine, session_factory(engine, OneTransaction)
    lag = app.state.loop_lag = LoopLag(settings.loop_held_after, lambda task: _request(app.state.running.get(task)))
    lag.start()
    start_tracing("api", settings.version)
    yield
    lag.stop()
    await engine.dispose()
    await asyncio.to_thread(stop_tracing)
    await asyncio.to_thread(flush_logs)  # uvicorn ends by the signal that it got, which runs no exit hooks


def _request(scope: Scope | None) -> dict[str, str]:
    return {} if scope is None else {"method": scope["method"], "route": route_template(scope)}


def _settings_of_process() -> Settings:
    settings = settings_at_start("api", domains.check_settings)
    configure_logging(settings.log_format, settings.log_level)
    exit_if_unsafe(settings, "api")
    for name in ("uvicorn", "uvicorn.error"):  # through the root's handler, in our format
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.getLogger("uvicorn.access").disabled = True  # `http.request` says it, with the correlation id
    return settings

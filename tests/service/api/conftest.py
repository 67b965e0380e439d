"""The API with the probe routes, on a database of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from service.api import create_app
from service.dev.postgres import psql
from tests.service.api.probe import SCHEMA, router
from tests.service.api.serving import serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx
    from fastapi import FastAPI

    from service.settings import Settings

MakeApp = Callable[..., "FastAPI"]
Sql = Callable[[str], str]


@pytest.fixture(autouse=True)
def plain_tracebacks() -> None:
    """Log as the service does; structlog's default takes seconds to print an exception."""
    structlog.configure([structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)])


@pytest.fixture
def sql(database_url: str) -> Sql:
    """Run a statement on the test's database, on a connection of its own."""
    return lambda statement: psql(database_url, statement)


@pytest.fixture
def make_app(settings: Settings, sql: Sql) -> MakeApp:
    """Makes the application, with settings replaced: `make_app(api={"request_timeout": 0.3})`."""
    sql(SCHEMA)

    def make(**groups: dict[str, Any]) -> FastAPI:
        changed = {name: getattr(settings, name).model_copy(update=update) for name, update in groups.items()}
        app = create_app(settings.model_copy(update=changed))
        app.include_router(router)
        return app

    return make


@pytest.fixture
async def client(make_app: MakeApp) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application with its usual settings."""
    async with serve(make_app()) as client:
        yield client

"""The console on a database of the test's own, behind a proxy that the test stands in for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from service.console.console_app import create_console
from service.console.operators import SECRET_HEADER
from service.settings import ConsoleSettings
from tests.service.api.serving import serve
from tests.service.console.ledger_rows import LedgerRows

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx
    from fastapi import FastAPI

    from service.settings import Settings

MakeConsole = Callable[..., "FastAPI"]
As = Callable[..., dict[str, str]]

PROXY_SECRET = "s" * 40


@pytest.fixture(autouse=True)
def plain_tracebacks() -> None:
    """Log as the service does; structlog's default takes seconds to print an exception."""
    structlog.configure([structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)])


@pytest.fixture
def rows(database_url: str) -> LedgerRows:
    """Rows in this test's database."""
    return LedgerRows(database_url)


@pytest.fixture
def make_console(settings: Settings) -> MakeConsole:
    """Makes the application, by default behind a proxy on this machine: `make_console(session=1)`."""

    def make(**console: Any) -> FastAPI:
        given = {"proxy": "127.0.0.1", "secret": PROXY_SECRET} if "users" not in console else {}
        return create_console(settings.model_copy(update={"console": ConsoleSettings.model_validate(given | console)}))

    return make


@pytest.fixture
def by_proxy() -> As:
    """The headers that the proxy sends: `by_proxy("ann", "viewer")`."""

    def headers(name: str, *groups: str) -> dict[str, str]:
        return {SECRET_HEADER: PROXY_SECRET, "X-Forwarded-User": name, "X-Forwarded-Groups": ", ".join(groups)}

    return headers


@pytest.fixture
async def console(make_console: MakeConsole, by_proxy: As) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the console, who is Ann and may do everything; it says where its forms come from, as browsers do."""
    async with serve(make_console()) as client:
        client.headers.update(by_proxy("ann", "viewer", "payload", "operator"))
        client.headers["Origin"] = str(client.base_url).rstrip("/")
        yield client

"""Fixtures for the tests of domains: the API, a worker without a broker, and a mail server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import structlog

from service.api import create_app
from service.dev.sink import Sink
from service.outbox.testing import InlineWorker, inline_worker
from tests.service.api.serving import serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    import httpx
    from sqlalchemy.ext.asyncio import AsyncEngine

    from service.settings import Settings


@pytest.fixture(autouse=True)
def plain_tracebacks() -> None:
    """Log as the service does; structlog's default takes seconds to print an exception."""
    structlog.configure([structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)])


@pytest.fixture
async def client(settings: Settings, authorized: Callable[..., dict[str, str]]) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the API, who is Ada; `headers=authorized("bob")` makes a request somebody else's."""
    async with serve(create_app(settings)) as client:
        client.headers.update(authorized("ada"))
        yield client


@pytest.fixture
async def worker(
    settings: Settings, engine: AsyncEngine, worker_environment: pytest.MonkeyPatch
) -> AsyncIterator[InlineWorker]:
    """Runs consumers: `await worker.deliver_all()`."""
    async with inline_worker(settings, engine) as worker:
        yield worker


@pytest.fixture
def worker_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> pytest.MonkeyPatch:
    """The environment that consumers read their settings from, to change."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
async def sink(tmp_path: Path, worker_environment: pytest.MonkeyPatch) -> AsyncIterator[Path]:
    """A mail server, and the file for `read_mails`; addresses with `refused` in them are refused for good."""
    rejects = tmp_path / "rejects"
    rejects.write_text("refused")
    async with Sink(tmp_path / "mails", rejects) as sink:
        worker_environment.setenv("SMTP__URL", f"smtp://127.0.0.1:{await sink.start()}")
        yield tmp_path / "mails"

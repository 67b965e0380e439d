"""The fixtures of the ledger's tests, with RabbitMQ in Valkey's place."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING

import pytest

from relay.process.loop import Relay
from tests.proof.ledger.conftest import Ledger, connection, ledger
from tests.proof.ledger.working import start_worker
from tests.proof.rabbitmq.node import amqp, node, rabbitmq
from tests.servers.relaying import relaying as relaying_with
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from service.settings import Settings
    from tests.proof.rabbitmq.server import Rabbitmq
    from tests.servers.processes import Started

__all__ = ["Ledger", "Running", "amqp", "connection", "ledger", "node", "rabbitmq"]

Running = Callable[[], AbstractAsyncContextManager[Relay]]


@pytest.fixture
def broker_url(rabbitmq: Rabbitmq) -> str:
    return rabbitmq.url


@pytest.fixture
def broker_namespace() -> str:
    return "unused"


@pytest.fixture
def relaying(settings: Settings) -> Running:
    """A relay on the test's loop, for as long as the context is open."""
    return partial(relaying_with, settings)


@pytest.fixture
async def worker(environment: dict[str, str], tmp_path: Path) -> AsyncIterator[Started]:
    """A worker that consumes every queue of the ledger's test domain."""
    worker = start_worker(environment, tmp_path / "worker.log")
    try:
        await until(lambda: worker.says("ready for action"))
        yield worker
    finally:
        await worker.stop()

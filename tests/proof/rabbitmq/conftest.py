"""The fixtures of the ledger's tests, with RabbitMQ in Valkey's place."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from relay.process.loop import Relay
from tests.proof.ledger.conftest import Ledger, connection, ledger
from tests.proof.rabbitmq.node import amqp, node, rabbitmq
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from service.settings import Settings
    from tests.proof.rabbitmq.server import Rabbitmq

__all__ = ["Ledger", "Running", "Worker", "amqp", "connection", "ledger", "node", "rabbitmq"]

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

    @asynccontextmanager
    async def running() -> AsyncIterator[Relay]:
        relay = Relay(settings)
        task = asyncio.create_task(relay.run())
        try:
            yield relay
        finally:
            relay.stop()
            async with asyncio.timeout(60):
                await task

    return running


class Worker:
    """A Dramatiq master with its children, and its log."""

    def __init__(self, environment: dict[str, str], log: Path, *arguments: str) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dramatiq", "tests.proof.ledger.app:setup_broker", *arguments],
                env=environment,
                stdout=output,
                stderr=output,
            )

    def says(self, text: str) -> bool:
        """Whether the log has it."""
        return text in self.log.read_text()

    def stop(self) -> None:
        """SIGTERM, and wait."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()


@pytest.fixture
async def worker(environment: dict[str, str], tmp_path: Path) -> AsyncIterator[Worker]:
    """A worker that consumes every queue of the ledger's test domain."""
    worker = Worker(environment, tmp_path / "worker.log", "-p", "1", "-t", "4")
    try:
        await until(lambda: worker.says("ready for action"))
        yield worker
    finally:
        await asyncio.to_thread(worker.stop)

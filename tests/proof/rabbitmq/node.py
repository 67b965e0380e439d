"""The RabbitMQ of this test process: started when a test first needs it, emptied after each one that used it."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import aiormq
import pytest

from tests.proof.rabbitmq.server import Rabbitmq, programs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.servers.real_servers import Where

__all__ = ["QUEUES", "amqp", "node", "rabbitmq"]

QUEUES = ("ledger", "other", "cpu")
"""Every queue that a test may leave behind, as may its `.DQ` and `.XQ`."""


@cache
def _node(data_dir: Path) -> Rabbitmq:
    return Rabbitmq(data_dir)


@pytest.fixture(scope="session")
def node(servers: Where) -> Iterator[Rabbitmq]:
    """A RabbitMQ that runs as long as this test process."""
    if programs() is None:
        pytest.skip("RabbitMQ is not installed: `apt-get install rabbitmq-server` (3.10 or newer) to run this test")
    found = _node(Path(servers.folder) / f"rabbitmq-{os.getpid()}")
    found.start()
    yield found
    found.stop()


@pytest.fixture
async def rabbitmq(node: Rabbitmq) -> AsyncIterator[Rabbitmq]:
    """A RabbitMQ without queues, which the test may restart, fill or kill."""
    node.start()
    yield node
    node.start()
    async with aiormq.connect(node.url) as connection:
        channel = await connection.channel()
        for queue in QUEUES:
            for name in (queue, f"{queue}.DQ", f"{queue}.XQ"):
                await channel.queue_delete(name)


@pytest.fixture
async def amqp(rabbitmq: Rabbitmq) -> AsyncIterator[aiormq.Channel]:
    """The test's own channel, to look at queues and to spoil them."""
    async with aiormq.connect(rabbitmq.url) as connection:
        channel = await connection.channel()
        assert isinstance(channel, aiormq.Channel)
        yield channel

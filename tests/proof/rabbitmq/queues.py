"""Queues as RabbitMQ itself has them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiormq

    from tests.proof.rabbitmq.server import Rabbitmq

__all__ = ["count", "hanging"]


async def count(amqp: aiormq.Channel, queue: str = "ledger") -> int:
    """Messages that wait in a queue that is there."""
    return (await amqp.queue_declare(queue, passive=True)).message_count or 0


@asynccontextmanager
async def hanging(rabbitmq: Rabbitmq) -> AsyncIterator[None]:
    """The process of the queue `ledger` does not answer."""
    await asyncio.to_thread(rabbitmq.control, "eval", _to_queue_process("suspend"))
    try:
        yield
    finally:
        await asyncio.to_thread(rabbitmq.control, "eval", _to_queue_process("resume"))


def _to_queue_process(verb: str) -> str:
    name = 'rabbit_misc:r(<<"/">>, queue, <<"ledger">>)'
    return f"{{ok, Q}} = rabbit_amqqueue:lookup({name}), sys:{verb}(amqqueue:get_pid(Q))."

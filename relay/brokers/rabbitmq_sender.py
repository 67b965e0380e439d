"""Hands batches to RabbitMQ: sender confirms, mandatory, a whole batch in flight at once.

Queues are declared with the arguments of Dramatiq's own broker, whose workers may come first: any difference is
refused. Its queues for delayed and for dead messages are left to the workers.

What must stay true: a batch counts as handed over only when every message of it is confirmed and none was returned.
Every queue has a connection of its own, because RabbitMQ slows a whole connection down for the sake of one queue and
ends a whole channel over it. No wait is longer than `publish_timeout`.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, TypeVar

from aiormq import AMQPChannelError, AMQPError, ChannelNotFoundEntity, DeliveryError

from relay.brokers.rabbitmq_batch import count, send_batch
from relay.brokers.rabbitmq_channel import OneChannel
from relay.brokers.sender import BrokerUnavailableError, QueueRefusedError, reason_of
from service.ledger.message import DueDelivery, encode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aiormq import Channel
    from pamqp.common import FieldTable

    from service.settings import BrokerSettings

T = TypeVar("T")

_PROBE = ""
"""The name of the line that asks whether RabbitMQ is well; no queue has an empty name."""

_NOBODYS_QUEUE = "outbox.probe"

_LONGEST_NAME = 200

_LOOK_EVERY = 0.05
"""Seconds between two looks whether RabbitMQ has blocked the connection."""

_BROKER_AT_FAULT = (AMQPError, OSError, EOFError, RuntimeError, asyncio.CancelledError)


class _SilentError(Exception):
    """There was no answer in time."""


class RabbitmqSender:
    """The sender for `amqp://` and `amqps://`."""

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._quorum = settings.quorum_queues
        self._timeout = settings.publish_timeout
        self._lines: dict[str, OneChannel] = {}
        self._probing = asyncio.Lock()
        self._given_up: set[asyncio.Task[Any]] = set()

    async def hand_over(self, queue: str, batch: Sequence[DueDelivery], transaction: str) -> int:  # noqa: ARG002
        """See `Sender.hand_over`.

        A repeated hand-over is queued twice; the second copy finds nothing to claim.
        """
        timestamp = int(time.time() * 1000)
        messages = [(due.delivery_id, encode(queue, due, timestamp).encode()) for due in batch]
        return await self._ask(queue, lambda channel: send_batch(channel, queue, messages))

    async def depth(self, queue: str) -> int:
        return await self._ask(queue, lambda channel: count(channel, queue))

    async def inspect(self, queue: str) -> int | None:

        async def question(channel: Channel) -> int:
            await count(channel, queue)
            await self._declare(channel, queue)  # which exists: this tells whether its arguments are the right ones
            return await count(channel, queue)

        try:
            return await self._ask(queue, question, declare=False)
        except QueueRefusedError as error:
            if isinstance(error.__cause__, ChannelNotFoundEntity):
                return None
            raise

    async def ping(self) -> None:
        await self._ping(self._timeout)

    async def close(self) -> None:
        lines = list(self._lines.values())
        self._lines.clear()
        await asyncio.gather(*(line.close() for line in lines))

    async def _ask(self, queue: str, question: Callable[[Channel], Awaitable[T]], *, declare: bool = True) -> T:
        """Ask on the queue's line; if there is no answer, find out whether that is the queue's fault."""
        if not 0 < len(queue.encode()) <= _LONGEST_NAME:
            raise QueueRefusedError("RabbitMQ has no queue of such a name")
        try:
            return await self._on_line(queue, question, self._timeout * 0.75, declare=declare)
        except _SilentError:
            await self._ping(self._timeout * 0.25)
            raise QueueRefusedError("the queue did not answer in time") from None

    async def _ping(self, seconds: float) -> None:
        """Publish messages that no queue wants: RabbitMQ confirms them, unless it takes nothing at all."""

        async def probe(channel: Channel) -> None:
            # It blocks a connection only after the first message.
            await channel.basic_publish(b"", routing_key=_NOBODYS_QUEUE)
            await channel.basic_publish(b"", routing_key=_NOBODYS_QUEUE)

        try:
            async with self._probing:  # each queue may ask at any time, and a line is opened by one of them
                await self._on_line(_PROBE, probe, seconds, declare=False)
        except _SilentError:
            raise BrokerUnavailableError("RabbitMQ did not answer in time") from None
        except QueueRefusedError as error:
            raise BrokerUnavailableError(str(error)) from error

    async def _on_line(
        self, name: str, question: Callable[[Channel], Awaitable[T]], seconds: float, *, declare: bool
    ) -> T:
        """Ask on a line, which is given up after any failure: the next question opens another."""
        line = self._lines.get(name)
        if line is None or line.ended:
            line = self._lines[name] = OneChannel(self._settings)
        # A task of its own, because aiormq cancels who waits on a connection that ends.
        task = asyncio.ensure_future(self._talk(line, name, question, declare=declare))
        try:
            await _watch(line, task, seconds)
            error = asyncio.CancelledError("the connection ended") if task.cancelled() else task.exception()
            if error is not None:
                raise _judged(line.reason() or error)
            return task.result()
        except BaseException:
            self._give_up(name, line, task)
            raise

    async def _talk(
        self, line: OneChannel, name: str, question: Callable[[Channel], Awaitable[T]], *, declare: bool
    ) -> T:
        channel = line.channel
        if channel is None:
            channel = await line.open()
            if declare:
                await self._declare(channel, name)
        return await question(channel)

    async def _declare(self, channel: Channel, queue: str) -> None:
        arguments: FieldTable = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{queue}.XQ"}
        if self._quorum:
            arguments["x-queue-type"] = "quorum"
        await channel.queue_declare(queue, durable=True, arguments=arguments)

    def _give_up(self, name: str, line: OneChannel, task: asyncio.Task[Any]) -> None:
        if self._lines.get(name) is line:
            del self._lines[name]
        line.abort()
        if not task.done():
            task.cancel()
            self._given_up.add(task)
            task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._given_up.discard(task)
        if not task.cancelled():
            task.exception()


async def _watch(line: OneChannel, task: asyncio.Task[Any], seconds: float) -> None:
    """Wait until the task is done."""
    deadline = time.monotonic() + seconds
    while not task.done():
        left = deadline - time.monotonic()
        if left <= 0:
            raise _SilentError
        await asyncio.wait((task,), timeout=min(left, _LOOK_EVERY))
        if not task.done() and await line.blocked():
            raise BrokerUnavailableError("RabbitMQ takes no messages: it is out of memory or of disk space")


def _judged(error: BaseException) -> BaseException:
    """The same failure, by who is at fault."""
    if isinstance(error, (AMQPChannelError, DeliveryError, ValueError)):
        judged: BaseException = QueueRefusedError(reason_of(error))
    elif isinstance(error, _BROKER_AT_FAULT):
        judged = BrokerUnavailableError(reason_of(error))
    else:
        return error
    judged.__cause__ = error
    return judged

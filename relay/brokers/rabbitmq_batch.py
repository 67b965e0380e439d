"""Publishes a batch on a channel in one write, and waits for all of its confirmations.

It does for the whole batch what aiormq's `basic_publish` does for one message, with the same attributes of the channel:
one message at a time costs the relay and RabbitMQ three times the work, most of it in system calls and tasks.

What must stay true: the channel's count of delivery tags goes up by one for each message in the order in which they are
written, and a message has an id of its own, by which aiormq knows it again when it is returned.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiormq import spec
from aiormq.abc import ChannelFrame
from pamqp.body import ContentBody
from pamqp.frame import marshal
from pamqp.header import ContentHeader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiormq import Channel

_PERSISTENT = 2


async def send_batch(channel: Channel, queue: str, messages: Sequence[tuple[str, bytes]]) -> int:
    """Publish ids and bodies to a queue, and return how many messages then wait in it.

    Raises:
        aiormq.DeliveryError: One was returned or not confirmed.
        aiormq.AMQPError, RuntimeError: The channel or the connection has ended.
    """
    frames: list[bytes] = []
    confirmations: list[asyncio.Future[object]] = []
    async with channel.lock:
        for message_id, body in messages:
            frames += _frames(channel, queue, message_id, body)
            confirmation = channel.create_future()
            channel.delivery_tag += 1
            channel.confirmations[channel.delivery_tag] = confirmation
            channel.message_id_delivery_tag[message_id] = channel.delivery_tag
            confirmations.append(confirmation)
        await channel.write_queue.put(ChannelFrame(b"".join(frames), should_close=False))
    try:
        outcomes = await asyncio.gather(*confirmations, count(channel, queue), return_exceptions=True)
    finally:
        channel.message_id_delivery_tag.clear()
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    waiting = outcomes[-1]
    return waiting if isinstance(waiting, int) else 0


def _frames(channel: Channel, queue: str, message_id: str, body: bytes) -> list[bytes]:
    properties = spec.Basic.Properties(delivery_mode=_PERSISTENT, message_id=message_id)
    parts = range(0, len(body), channel.max_content_size)
    return [
        marshal(spec.Basic.Publish(exchange="", routing_key=queue, mandatory=True), channel.number),
        marshal(ContentHeader(properties=properties, body_size=len(body)), channel.number),
        *(marshal(ContentBody(body[start : start + channel.max_content_size]), channel.number) for start in parts),
    ]


async def count(channel: Channel, queue: str) -> int:
    """How many messages wait in a queue."""
    return (await channel.queue_declare(queue, passive=True)).message_count or 0

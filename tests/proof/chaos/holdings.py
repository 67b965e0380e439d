"""What the broker holds: messages that wait, messages that are taken and not acknowledged, copies of the same row."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import aiormq
import redis.asyncio

__all__ = ["QUEUES", "Holdings"]

QUEUES = ("stock", "mail", "poison")


class Holdings:
    """Looks into the broker, past every proxy.

    Attributes:
        most_waiting: Most messages seen in one queue, while `watch` ran.
        most_copies: Most copies of one row seen at once, queued or in flight; of Valkey only.
    """

    def __init__(self, url: str) -> None:
        self.most_waiting = 0
        self.most_copies = 0
        self._url = url
        self._rabbitmq = url.startswith("amqp")
        self._heartbeats: dict[str, tuple[float, float]] = {}

    def _valkey(self) -> redis.asyncio.Redis:
        client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(self._url, decode_responses=True)
        return client

    async def watch(self) -> None:
        """Look twice a second, for ever."""
        while True:
            await asyncio.sleep(0.5)
            with suppress(redis.RedisError, OSError, aiormq.AMQPError, TimeoutError):
                self.most_waiting = max([self.most_waiting, *(await self.waiting()).values()])
                if not self._rabbitmq:
                    await self._count_copies()

    async def _count_copies(self) -> None:
        async with self._valkey() as broker:
            for queue in QUEUES:
                ids = await broker.hkeys(f"dramatiq:{queue}.msgs")
                counts = Counter(str(each).partition(":")[0] for each in ids)
                self.most_copies = max([self.most_copies, *counts.values()])

    async def waiting(self) -> dict[str, int]:
        """How many messages wait in each queue."""
        if not self._rabbitmq:
            async with self._valkey() as broker:
                return {queue: await broker.llen(f"dramatiq:{queue}") for queue in QUEUES}
        async with asyncio.timeout(30):
            connection = await aiormq.connect(self._url)
            try:
                counts = {}
                for queue in QUEUES:
                    channel = await connection.channel()  # it ends with the question after a queue that is not there
                    with suppress(aiormq.ChannelNotFoundEntity):
                        counts[queue] = (await channel.queue_declare(queue, passive=True)).message_count or 0
                return counts
            finally:
                await connection.close()

    async def in_flight(self) -> int:
        """How many messages workers that still live have taken from Valkey and not yet acknowledged."""
        if self._rabbitmq:
            return 0
        async with self._valkey() as broker:
            scores: Any = await broker.zrange("dramatiq:__heartbeats__", 0, -1, withscores=True)
            living = self._living(dict(scores))
            taken = 0
            for queue in QUEUES:
                for worker in living:
                    for each in await broker.smembers(f"dramatiq:__acks__.{worker!s}.{queue}"):
                        # One whose body is gone can do nothing any more.
                        taken += await broker.hexists(f"dramatiq:{queue}.msgs", each)
            return taken

    def _living(self, heartbeats: dict[str, float]) -> list[str]:
        """Workers whose heartbeat has moved within 3 s. The times in them are the workers' own, and may be wrong."""
        now = time.monotonic()
        self._heartbeats = {
            worker: (beat, now) if self._heartbeats.get(worker, (None, 0))[0] != beat else self._heartbeats[worker]
            for worker, beat in heartbeats.items()
        }
        return [worker for worker, (_, since) in self._heartbeats.items() if now - since <= 3]

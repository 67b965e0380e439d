"""Dramatiq's Redis broker with a doorbell: a worker starts at once on a message instead of polling for it.

Stock Dramatiq asks an idle queue again after up to a second, forgets messages that were fetched but not handed on when
a connection breaks, and loses a message's neighbours to one that it cannot decode. What must stay true:

- A waiting consumer has subscribed before it last saw the queue empty, and whoever pushes onto an empty queue
  publishes; so no message waits for the poll, which stays as a safety net.
- Whatever this process has fetched and not handed to a thread goes back into the queue when a consumer starts.

Only public seams of Dramatiq are used: `consume`, `enqueue`, the `do_*` commands and the key names of its wire format.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import redis
from dramatiq.broker import Consumer, MessageProxy
from dramatiq.brokers.redis import RedisBroker
from dramatiq.errors import ConnectionClosed, DecodeError
from dramatiq.message import Message
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.bodies import can_run, disarm
from service.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["DoorbellRedisBroker", "doorbell_channel"]

_log = get_logger(__name__)

# A stall of the server shorter than this is waited out: a reply that comes after the client gave up is a message
# fetched by nobody.
_SOCKET_TIMEOUT = 60


def doorbell_channel(namespace: str, queue: str) -> str:
    """The channel that is published to when a message is pushed onto an empty queue."""
    return f"{namespace}:{queue}.doorbell"


class DoorbellRedisBroker(RedisBroker):
    """A `RedisBroker` whose consumers wait for a doorbell; bodies, keys and scripts are Dramatiq's own."""

    def __init__(self, url: str, *, namespace: str, middleware: list[Any]) -> None:
        client = redis.Redis.from_url(
            url,
            socket_timeout=_SOCKET_TIMEOUT,
            socket_connect_timeout=5,
            # A command repeated by the client would fetch twice, and nobody would see the first reply.
            retry=Retry(NoBackoff(), 0),
        )
        super().__init__(client=client, namespace=namespace, middleware=middleware)  # type: ignore[no-untyped-call]
        self._held: dict[str, set[str]] = {}
        self._held_lock = threading.Lock()

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 5000) -> Consumer:
        """A consumer that blocks until the doorbell rings, or for `timeout` milliseconds."""
        with self._held_lock:
            held = self._held.setdefault(queue_name, set())
        return _DoorbellConsumer(self, queue_name, prefetch, timeout / 1000, held)

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        """Enqueue, and ring."""
        enqueued = super().enqueue(message, delay=delay)
        self.client.publish(doorbell_channel(self.namespace, enqueued.queue_name), "")
        return enqueued


class _DoorbellConsumer(Consumer):
    """Fetches a queue's messages. `held` are the ids handed to threads; it outlives this consumer."""

    def __init__(self, broker: DoorbellRedisBroker, queue: str, prefetch: int, timeout: float, held: set[str]) -> None:
        self._broker = broker
        self._queue = queue
        self._prefetch = prefetch
        self._timeout = timeout
        self._least_room = max(prefetch // 4, 1)
        """Fetch no fewer than this while others are at hand: a call for each would cost as much as its run."""
        self._held = held
        self._fetched: list[bytes] = []
        self._room = threading.Event()
        self._acks = f"{broker.namespace}:__acks__.{broker.broker_id}.{queue}"
        self._pubsub = broker.client.pubsub(ignore_subscribe_messages=True)
        try:
            self._pubsub.subscribe(doorbell_channel(broker.namespace, queue))
            self._requeue_stranded()
        except (redis.ConnectionError, redis.TimeoutError) as error:
            self._pubsub.close()
            raise ConnectionClosed(error) from None

    def _requeue_stranded(self) -> None:
        members: set[bytes] = self._broker.client.smembers(self._acks)  # type: ignore[assignment]
        stranded = [each.decode() for each in members if each.decode() not in self._held]
        if stranded:
            _log.warning("doorbell.requeued_stranded", queue=self._queue, messages=len(stranded))
            self._broker.do_requeue(self._queue, *stranded)

    def __next__(self) -> MessageProxy | None:
        """The next message, or `None` after the timeout so that the caller can look whether to stop."""
        try:
            deadline = time.monotonic() + self._timeout
            while True:
                while self._fetched:
                    message = self._decode(self._fetched.pop(0))
                    if message is not None:
                        return message
                if not self._fetch() and not self._wait(deadline - time.monotonic()):
                    return None
        except (redis.ConnectionError, redis.TimeoutError) as error:
            raise ConnectionClosed(error) from None

    def _fetch(self) -> bool:
        self._room.clear()
        room = self._prefetch - len(self._held)
        if room >= self._least_room:
            self._fetched = [data for data in self._broker.do_fetch(self._queue, room) if data is not None]
        return bool(self._fetched)

    def _wait(self, seconds: float) -> bool:
        """Whether there is a reason to fetch before the time is up. Rings heard while busy are used up here."""
        if seconds <= 0:
            return False
        if self._prefetch - len(self._held) < self._least_room:
            rung = self._room.wait(seconds)
            while self._pubsub.get_message(timeout=0) is not None:
                pass
            return rung
        rung = self._pubsub.get_message(timeout=seconds) is not None
        while rung and self._pubsub.get_message(timeout=0) is not None:
            pass
        return rung

    def _decode(self, data: bytes) -> MessageProxy | None:
        try:
            message: Message[Any] = Message.decode(data)
            if not can_run(message, self._queue):
                raise DecodeError("the body is not one that a thread can run", data, ValueError(message.queue_name))
            held = message.options["redis_message_id"]
            if not isinstance(held, str):
                raise DecodeError("the body has no place in the list", data, ValueError(held))
        except (DecodeError, KeyError) as error:
            self._set_aside(data, error)
            return None
        disarm(message, self._broker)
        self._held.add(held)
        return MessageProxy(message)

    def _set_aside(self, data: bytes, error: Exception) -> None:
        """Move a body that nobody can run to the queue's dead letters, and only that one."""
        _log.error("doorbell.undecodable", queue=self._queue, error=type(error).__name__, size=len(data))
        bodies = f"{self._broker.namespace}:{self._queue}.msgs"
        members: set[bytes] = self._broker.client.smembers(self._acks)  # type: ignore[assignment]
        for each in members:
            if each.decode() not in self._held and self._broker.client.hget(bodies, each.decode()) == data:
                self._broker.do_nack(self._queue, each.decode())
                return

    def ack(self, message: MessageProxy) -> None:
        """The message is done."""
        self._settle(self._broker.do_ack, message)

    def nack(self, message: MessageProxy) -> None:
        """The message goes to Dramatiq's own dead letters."""
        self._settle(self._broker.do_nack, message)

    def _settle(self, command: Any, message: MessageProxy) -> None:
        held = message.options["redis_message_id"]
        try:
            command(self._queue, held)
        except (redis.ConnectionError, redis.TimeoutError) as error:
            raise ConnectionClosed(error) from None
        except redis.RedisError as error:
            # A full or read-only server: the message stays where the next consumer finds it stranded, and gives up the
            # place that it holds here, or this worker would fetch nothing any more after a few of these.
            _log.warning("doorbell.not_acknowledged", queue=self._queue, error=type(error).__name__)
        self._held.discard(held)
        if self._prefetch - len(self._held) >= self._least_room:
            self._room.set()

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        """Give messages back that no thread has started."""
        held = [message.options["redis_message_id"] for message in messages]
        if held:
            try:
                self._broker.do_requeue(self._queue, *held)
            except (redis.ConnectionError, redis.TimeoutError) as error:
                raise ConnectionClosed(error) from None
            self._held.difference_update(held)

    def close(self) -> None:
        """End the subscription."""
        self._pubsub.close()

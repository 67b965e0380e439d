"""Dramatiq's Redis broker with a doorbell: a worker starts at once on a message instead of polling for it.

Stock Dramatiq asks an idle queue again after up to a second, forgets messages that were fetched but not handed on when
a connection breaks, and loses a message's neighbours to one that it cannot decode. What must stay true:

- A waiting consumer has subscribed before it last saw the queue empty, and whoever pushes onto an empty queue
  publishes; so no message waits for the poll, which stays as a safety net.
- Whatever this process has fetched and no thread has goes back into the queue when a consumer starts or ends. Dramatiq
  forgets what it delays when a connection breaks, so a delayed message is never a thread's.
- A thread waits for the server once at most, and in a busy worker never: the consumer acknowledges for all of them,
  within a second, before it fetches more.

Only public seams of Dramatiq are used: `consume`, `enqueue`, the `do_*` commands and the key names of its wire format.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import redis
from dramatiq.broker import Consumer, MessageProxy
from dramatiq.brokers.redis import RedisBroker
from dramatiq.errors import ConnectionClosed, DecodeError
from dramatiq.message import Message
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.ledger.message import REDIS_ID, doorbell
from service.telemetry.logs import get_logger
from service.worker.bodies import can_run, disarm

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_log = get_logger(__name__)

# A stall of the server shorter than this is waited out: a reply that comes after the client gave up is a message
# fetched by nobody.
_SOCKET_TIMEOUT = 60

# Of a million commands, how many look for messages of dead processes. An idle consumer sends one command a second.
_MAINTENANCE_CHANCE = 50_000


@contextmanager
def _as_connection_error() -> Iterator[None]:
    """A server that is away, full or read-only: for Dramatiq it is the same, the consumer starts again soon."""
    try:
        yield
    except redis.RedisError as error:
        raise ConnectionClosed(error) from None


@dataclass(frozen=True, slots=True)
class _Fetched:
    """What this process has of a queue, by id in the queue's list. It outlives the queue's consumers."""

    running: set[bytes] = field(default_factory=set)
    """Handed to threads."""
    settled: dict[bytes, bool] = field(default_factory=dict)
    """Done, and the server does not know yet; whether it went well."""


class DoorbellRedisBroker(RedisBroker):
    """A `RedisBroker` whose consumers wait for a doorbell; bodies, keys and scripts are Dramatiq's own."""

    def __init__(self, url: str, *, namespace: str, middleware: list[Any], **options: Any) -> None:
        client = redis.Redis.from_url(
            url,
            **options,
            socket_timeout=_SOCKET_TIMEOUT,
            socket_connect_timeout=5,
            # A command repeated by the client would fetch twice, and nobody would see the first reply.
            retry=Retry(NoBackoff(), 0),
        )
        super().__init__(  # type: ignore[no-untyped-call]
            client=client, namespace=namespace, middleware=middleware, maintenance_chance=_MAINTENANCE_CHANCE
        )
        self._fetched: dict[str, _Fetched] = {}
        self._fetched_lock = threading.Lock()

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 5000) -> Consumer:
        """A consumer that blocks until the doorbell rings, or for `timeout` milliseconds."""
        with self._fetched_lock:
            fetched = self._fetched.setdefault(queue_name, _Fetched())
        return _DoorbellConsumer(self, queue_name, prefetch, timeout / 1000, fetched)

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        enqueued = super().enqueue(message, delay=delay)
        self.ring(enqueued.queue_name)
        return enqueued

    def ring(self, queue: str) -> None:
        """Wake the queue's waiting consumers. Unheard, what was pushed waits for their next look."""
        with suppress(redis.RedisError):
            self.client.publish(doorbell(self.namespace, queue), "")


def _place(message: Message[Any] | MessageProxy) -> bytes:
    """The message's id in the queue's list, as the server has it: it need not be text."""
    unique: str = message.options[REDIS_ID]
    return unique.encode()


class _DoorbellConsumer(Consumer):
    def __init__(
        self, broker: DoorbellRedisBroker, queue: str, prefetch: int, timeout: float, fetched: _Fetched
    ) -> None:
        self._broker = broker
        self._queue = queue
        self._prefetch = prefetch
        self._timeout = timeout
        self._least_room = max(prefetch // 4, 1)
        """Fetch no fewer than this while others are at hand: a call for each would cost as much as its run."""
        self._running = fetched.running
        self._settled = fetched.settled
        self._delayed: set[bytes] = set()
        self._bodies: list[bytes] = []
        self._was_full = False
        self._absent = False
        """Whether the consumer's thread does not come round soon to tell what is settled."""
        self._vacancy = threading.Event()
        self._listening = threading.Lock()
        """Held by the thread that uses the subscription, which belongs to one at a time."""
        self._closed = False
        self._acks = f"{broker.namespace}:__acks__.{broker.broker_id}.{queue}"
        self._hash = f"{broker.namespace}:{queue}.msgs"
        self._pubsub = broker.client.pubsub(ignore_subscribe_messages=True)
        try:
            with _as_connection_error():
                self._pubsub.subscribe(doorbell(broker.namespace, queue))
                self._tell()
                self._requeue_stranded()
        except ConnectionClosed:
            self._pubsub.close()
            raise

    def _requeue_stranded(self) -> None:
        stranded = [each for each in self._unacknowledged() if each not in self._running and each not in self._settled]
        if stranded:
            _log.warning("doorbell.requeued_stranded", queue=self._queue, messages=len(stranded))
            self._requeue(stranded)

    def _unacknowledged(self) -> set[bytes]:
        members: set[bytes] = self._broker.client.smembers(self._acks)  # type: ignore[assignment]
        return members

    def _requeue(self, ids: list[bytes]) -> None:
        self._broker.do_requeue(self._queue, *ids)
        # Whoever pushes onto a queue that is not empty need not ring.
        self._broker.ring(self._queue)

    def __next__(self) -> MessageProxy | None:
        """The next message, or `None` after the timeout so that the caller can look whether to stop."""
        deadline = time.monotonic() + self._timeout
        with _as_connection_error():
            while not self._closed and (left := deadline - time.monotonic()) > 0:
                while self._bodies:
                    message = self._decode(self._bodies.pop(0))
                    if message is not None:
                        return message
                if not self._fetch():
                    self._wait(left)
            if self._closed and self._bodies:
                self._requeue_stranded()
        return None

    def _room(self) -> int:
        """How many may be fetched; none for as long as there are only a few."""
        room = self._prefetch - len(self._running) - len(self._delayed)
        return room if room >= self._least_room else 0

    def _fetch(self) -> bool:
        """Whether there was anything, be it an id whose body is gone."""
        self._tell()
        self._vacancy.clear()
        room = self._room()
        self._was_full = not room
        bodies = self._broker.do_fetch(self._queue, room) if room else []
        self._bodies = [data for data in bodies if data is not None]
        return bool(bodies)

    def _wait(self, seconds: float) -> None:
        """Return when there is a reason to fetch, or the time is up. Rings heard while busy are used up here."""
        if self._was_full and not self._vacancy.wait(seconds):
            return
        with self._listening:
            if self._closed:
                return
            rung = self._was_full or self._listen(seconds)
            while rung and self._pubsub.get_message(timeout=0) is not None:
                pass

    def _listen(self, seconds: float) -> bool:
        self._absent = True
        try:
            self._tell()  # what threads left to this one before they could see that it is absent
            return self._pubsub.get_message(timeout=seconds) is not None
        finally:
            self._absent = self._closed

    def _decode(self, data: bytes) -> MessageProxy | None:
        try:
            message: Message[Any] = Message.decode(data)
            if not can_run(message, self._queue):
                raise DecodeError("the body is not one that a thread can run", data, ValueError(message.queue_name))
            unique = _place(message)
        except (DecodeError, KeyError, AttributeError, UnicodeEncodeError) as error:
            self._set_aside(data, error)
            return None
        disarm(message, self._broker)
        (self._running if message.options.get("eta") is None else self._delayed).add(unique)
        return MessageProxy(message)

    def _set_aside(self, data: bytes, error: Exception) -> None:
        """Move a body that nobody can run to the queue's dead letters, and only that one."""
        _log.error("doorbell.undecodable", queue=self._queue, error=type(error).__name__, size=len(data))
        for each in self._unacknowledged():
            if each not in self._running and self._broker.client.hget(self._hash, each) == data:
                self._broker.do_nack(self._queue, each)
                return

    def ack(self, message: MessageProxy) -> None:
        self._settle(message, well=True)

    def nack(self, message: MessageProxy) -> None:
        """The message goes to Dramatiq's own dead letters."""
        self._settle(message, well=False)

    def _settle(self, message: MessageProxy, *, well: bool) -> None:
        unique = _place(message)
        self._settled[unique] = well
        self._forget([unique])
        if self._absent:
            try:
                self._tell()
            except redis.RedisError as error:
                # Raised, it would hold the thread up for as long as the server is away, also in a worker that stops.
                _log.warning("doorbell.not_acknowledged", queue=self._queue, error=type(error).__name__)

    def _tell(self) -> None:
        """Tell the server what is settled, in two commands however many there are."""
        settled = list(self._settled.items())
        done = [unique for unique, well in settled if well]
        if done:
            with self._broker.client.pipeline(transaction=False) as pipeline:
                pipeline.srem(self._acks, *done)
                pipeline.hdel(self._hash, *done)
                pipeline.execute()
        for unique, well in settled:
            if not well:
                self._broker.do_nack(self._queue, unique)
            self._settled.pop(unique, None)

    def _forget(self, ids: list[bytes]) -> None:
        self._running.difference_update(ids)
        self._delayed.difference_update(ids)
        if self._room():
            self._vacancy.set()

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        """Put messages back that no thread has started. What the server refuses goes back as stranded later."""
        ids = [_place(message) for message in messages]
        self._forget(ids)
        if ids:
            try:
                self._requeue(ids)
            except redis.RedisError as error:
                _log.warning("doorbell.not_requeued", queue=self._queue, messages=len(ids), error=type(error).__name__)

    def close(self) -> None:
        """Requeue what no thread was handed, and end the subscription.

        A worker that stops does not wait for ever for the consumer's own thread; where it still listens, the
        subscription ends with the process.
        """
        self._closed = True
        self._absent = True
        try:
            with suppress(redis.RedisError):
                self._tell()
                if self._bodies:
                    self._requeue_stranded()
        finally:
            if self._listening.acquire(blocking=False):
                try:
                    self._pubsub.close()
                finally:
                    self._listening.release()

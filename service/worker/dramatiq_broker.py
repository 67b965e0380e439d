"""The worker's broker, chosen by `BROKER__URL`: Dramatiq's own, with the gaps closed that would stop a worker.

An actor this worker does not know would be dead-lettered in the broker before any code of ours ran; here it reaches
the ledger, which keeps the row for a worker that does. A body that names another queue would end a thread for good.
What else a body may not do is in `bodies.py`. What must stay true: nothing of a body that no relay wrote is logged; and
the ledger's queues are consumed whatever became of those that Dramatiq keeps beside them for delays and dead letters.
"""

from __future__ import annotations

import logging
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import dramatiq
import dramatiq.worker
import pika
import pika.data
from dramatiq.broker import Broker, Consumer, MessageProxy
from dramatiq.brokers.rabbitmq import DEAD_MESSAGE_TTL, RabbitmqBroker
from dramatiq.common import dq_name, q_name, xq_name
from dramatiq.errors import ActorNotFound, ConnectionClosed, DecodeError
from dramatiq.middleware import CurrentMessage
from pika.exceptions import ChannelClosedByBroker

from service.ledger.message import OF_LEDGER, delivery_in
from service.network.sockets import silence_options, tls_context
from service.telemetry.logs import flush_logs, get_logger
from service.worker.batch_worker import BATCH
from service.worker.bodies import can_run, disarm
from service.worker.doorbell import DoorbellRedisBroker
from service.worker.loop_worker import ON_LOOP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from uuid import UUID

    from service.settings import BrokerSettings

_log = get_logger(__name__)

UNKNOWN_ACTOR = "outbox.unknown_consumer"


class _LedgersBroker(Broker):
    """Hands messages for unknown actors to the actor `UNKNOWN_ACTOR`, once that is declared.

    Attributes:
        concurrency: How many actors run on the loop at a time.
    """

    concurrency = 1

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 5000) -> Consumer:
        """As Dramatiq's, which fetches twice of what its threads can run; of this queue the loop may run as well."""
        on_loop = [each for each in self.actors.values() if each.queue_name == queue_name and each.options.get(ON_LOOP)]
        if on_loop and not dramatiq.worker.QUEUE_PREFETCH:
            batches = sum(each.options.get(BATCH) or 0 for each in on_loop)
            prefetch = min(prefetch + 2 * self.concurrency + 2 * batches, 65_535)
        return super().consume(queue_name, prefetch, timeout)

    def get_actor(self, actor_name: str) -> dramatiq.Actor[Any, Any]:
        try:
            return super().get_actor(actor_name)
        except ActorNotFound:
            fallback = self.actors.get(UNKNOWN_ACTOR)
            if fallback is None:
                raise
            return fallback

    def close(self) -> None:
        super().close()
        flush_logs()  # Dramatiq closes the pipe that they go through next


class _RedisBroker(_LedgersBroker, DoorbellRedisBroker):
    pass


class _RabbitmqBroker(_LedgersBroker, RabbitmqBroker):
    def __init__(self, settings: BrokerSettings, middleware: list[Any]) -> None:
        # In a list, for of a string Dramatiq makes several at each semicolon, even one in the password.
        super().__init__(url=[settings.url.get_secret_value()], confirm_delivery=True, middleware=middleware)
        (parameters,) = self.parameters
        if hasattr(socket, "TCP_KEEPIDLE"):  # elsewhere pika knows none of the options
            parameters.tcp_options = silence_options(settings.silence_timeout)
        if parameters.ssl_options is not None:
            parameters.ssl_options = pika.SSLOptions(tls_context(settings.tls_ca_file), parameters.host)
        self._type = {"x-queue-type": "quorum"} if settings.quorum_queues else {}

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 5000) -> Consumer:
        if queue_name == dq_name(queue_name):
            self.queues_pending.add(q_name(queue_name))  # it may not have been declared the last time
        try:
            consumer = super().consume(queue_name, prefetch, timeout)
        except OSError as error:  # pika's way to say that a certificate is not to be trusted
            raise ConnectionClosed(error) from None
        # The queue was declared on a connection of this thread's, which nobody would keep alive from here on.
        del self.connection
        return _CarefulConsumer(self, consumer, queue_name)

    def _build_queue_arguments(self, queue_name: str) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._build_queue_arguments(queue_name)  # type: ignore[no-untyped-call]
        return arguments | self._type

    def _declare_dq_queue(self, queue_name: str) -> Any:
        return self._declare_beside(dq_name(queue_name), self._build_queue_arguments(queue_name))

    def _declare_xq_queue(self, queue_name: str) -> Any:
        return self._declare_beside(xq_name(queue_name), {"x-message-ttl": DEAD_MESSAGE_TTL} | self._type)

    def _declare_beside(self, name: str, arguments: dict[str, Any]) -> Any:
        """Declare a queue, or leave it as it is: its node is down, or it was declared with other arguments."""
        try:
            return self.channel.queue_declare(queue=name, durable=True, arguments=arguments)
        except ChannelClosedByBroker as error:
            del self.channel
            _log.warning("broker.queue_not_declared", queue=name, error=error.reply_text)
            return None


class _CarefulConsumer(Consumer):
    """A consumer that passes on only what a thread can run, and acknowledges only what it passed on.

    A message that was fetched on a connection which has since ended is given out again by RabbitMQ. Its delivery tag
    means another message on the connection after that.
    """

    def __init__(self, broker: Broker, consumer: Consumer, queue: str) -> None:
        self._broker = broker
        self._consumer = consumer
        self._queue = queue
        self._held: dict[int, MessageProxy] = {}

    def __next__(self) -> MessageProxy | None:
        message = next(self._consumer)
        if message is None:
            return None
        if not can_run(message, self._queue):
            _log.error("broker.unusable_message", queue=self._queue)
            self._consumer.nack(message)
            return None
        disarm(message, self._broker)
        self._held[id(message)] = message
        return message

    def ack(self, message: MessageProxy) -> None:
        self._settle(self._consumer.ack, message)

    def nack(self, message: MessageProxy) -> None:
        self._settle(self._consumer.nack, message)

    def _settle(self, command: Callable[[MessageProxy], None], message: MessageProxy) -> None:
        if self._held.pop(id(message), None) is not None:
            # Dramatiq would hold the thread up for five seconds to try again, with nothing to gain.
            with suppress(ConnectionClosed):
                command(message)

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        self._consumer.requeue(messages)

    def close(self) -> None:
        self._consumer.close()


def _without_exception(record: logging.LogRecord) -> bool:
    """Drop the error that Dramatiq's own consumer logs with a body that it cannot decode: it quotes from the body."""
    if record.exc_info and isinstance(record.exc_info[1], DecodeError):
        record.exc_info = None
    return True


def _skip_odd_headers() -> None:
    """Let pika, which needs none, pass over headers that it cannot decode.

    It would give its connection up, and the message, back at the head of its queue, would end the next one.
    """
    decode = pika.data.decode_table

    def decode_table(encoded: bytes, offset: int) -> tuple[dict[str, Any], int]:
        try:
            decoded: tuple[dict[str, Any], int] = decode(encoded, offset)
        except Exception:  # noqa: BLE001  a date that is none, for one
            (length,) = struct.unpack_from(">I", encoded, offset)
            return {}, offset + 4 + length
        return decoded

    pika.data.decode_table = decode_table


_skip_odd_headers()


def make_broker(settings: BrokerSettings, middleware: list[Any], concurrency: int = 1) -> Broker:
    """The broker that `BROKER__URL` names. It connects when it is first used.

    Args:
        settings: Where it is.
        middleware: Dramatiq's.
        concurrency: How many actors run on the loop at a time.
    """
    broker: _LedgersBroker
    if settings.is_rabbitmq:
        logging.getLogger("dramatiq.brokers.rabbitmq._RabbitmqConsumer").addFilter(_without_exception)
        broker = _RabbitmqBroker(settings, middleware)
    else:
        broker = _RedisBroker(
            settings.redis_url, namespace=settings.namespace, middleware=middleware, **settings.redis_options
        )
    broker.concurrency = concurrency
    return broker


def declare_unknown(broker: Broker, run: Callable[[UUID], None], queue: str) -> None:
    """Let `run` handle ledger messages for actors this process does not know."""

    def unknown(*args: Any, **_kwargs: Any) -> None:
        delivery_id = delivery_in(args)
        if delivery_id is None:
            # An exception would make Dramatiq log all of the message.
            message: Any = CurrentMessage.get_current_message()
            _log.error("broker.unknown_actor", queue=message.queue_name)
            message.fail()
            return
        run(delivery_id)

    options = {OF_LEDGER: True, "max_retries": 0}
    dramatiq.Actor(unknown, broker=broker, actor_name=UNKNOWN_ACTOR, queue_name=queue, priority=0, options=options)

"""Relay and workers trust the same brokers, by one setting, and send nothing to another."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import dramatiq
import pika.exceptions
import pytest
import redis
from pydantic import SecretStr

from relay.brokers import make_sender
from relay.brokers.sender import BrokerUnavailableError
from service.settings import BrokerSettings
from service.worker.dramatiq_broker import make_broker
from tests.proof.connections.gate import gate
from tests.servers.proxy import socket_of
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.proof.connections.certificates import Certificates
    from tests.proof.connections.gate import Streams
    from tests.proof.rabbitmq.server import Rabbitmq

pytestmark = pytest.mark.slow

CASES = [
    # certificate, whether the CA is trusted, whether it connects
    ("right", True, True),
    ("right", False, False),
    ("self-signed", True, False),
    ("other-host", True, False),
]


async def _relay(settings: BrokerSettings) -> None:
    sender = make_sender(settings)
    try:
        await sender.ping()
    finally:
        await sender.close()


async def _worker(settings: BrokerSettings) -> None:
    broker = make_broker(settings, [])
    await asyncio.to_thread(lambda: broker.connection if settings.is_rabbitmq else broker.client.ping())  # type: ignore[attr-defined]
    await asyncio.to_thread(broker.close)  # whose farewell goes through the gate, which this thread serves


WAYS = pytest.mark.parametrize("way", [pytest.param(_relay, id="relay"), pytest.param(_worker, id="worker")])


async def _outcomes(
    url: str,
    upstream: Callable[[], Awaitable[Streams]],
    certificates: Certificates,
    way: Callable[[BrokerSettings], Awaitable[None]],
) -> list[tuple[str, bool, bool]]:
    """What became of each case, after a look that a server which is not trusted was told nothing."""
    found = []
    for certificate, trusted, _ in CASES:
        async with gate(upstream, certificates.server(certificate)) as between:
            told = BrokerSettings(
                url=SecretStr(url.format(between.port)),
                tls_ca_file=str(certificates.ca) if trusted else "",
                publish_timeout=8,
            )
            try:
                await way(told)
                connects = True
            except (BrokerUnavailableError, redis.ConnectionError, pika.exceptions.AMQPConnectionError, OSError):
                connects = False
            assert bool(between.encrypted) == connects
            found.append((certificate, trusted, connects))
    return found


@WAYS
@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
async def test_redis(
    broker_url: str, certificates: Certificates, scheme: str, way: Callable[[BrokerSettings], Awaitable[None]]
) -> None:
    path = socket_of(broker_url)
    url = f"{scheme}://127.0.0.1:{{}}/0"
    assert await _outcomes(url, lambda: asyncio.open_unix_connection(path), certificates, way) == CASES


@WAYS
async def test_rabbitmq(
    rabbitmq: Rabbitmq, certificates: Certificates, way: Callable[[BrokerSettings], Awaitable[None]]
) -> None:
    url = rabbitmq.url.replace("amqp://", "amqps://").replace(f":{rabbitmq.port}/", ":{}/")
    found = await _outcomes(url, lambda: asyncio.open_connection("127.0.0.1", rabbitmq.port), certificates, way)
    assert found == CASES


async def test_a_worker_says_in_a_line_that_it_does_not_trust_rabbitmq_and_tries_again(
    rabbitmq: Rabbitmq, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    url = rabbitmq.url.replace("amqp://", "amqps://").replace(f":{rabbitmq.port}/", ":{}/")
    certificate = certificates.server("other-host")
    async with gate(lambda: asyncio.open_connection("127.0.0.1", rabbitmq.port), certificate) as between:
        settings = BrokerSettings(url=SecretStr(url.format(between.port)), tls_ca_file=str(certificates.ca))
        broker = make_broker(settings, [])
        broker.declare_queue("queue")
        worker = dramatiq.Worker(broker, worker_threads=1, worker_timeout=100)
        worker.start()
        try:
            await until(lambda: _critical(caplog) >= 2 * len(worker.consumers), what="each consumer to try again")
        finally:
            await asyncio.to_thread(worker.stop)
    errors = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert all("certificate verify failed" in record.getMessage() for record in errors)
    assert not any(record.exc_info for record in errors)


def _critical(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.levelname == "CRITICAL" for record in caplog.records)

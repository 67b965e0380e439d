"""The worker without a ledger: Dramatiq as its documentation sets it up.

Its one actor does what the benchmark's consumer does, in a transaction of its own, and may do it twice.
"""

from __future__ import annotations

import time
from typing import Any

import dramatiq
from dramatiq.asyncio import get_event_loop_thread
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import AsyncIO, Middleware, default_middleware
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from service.database.engine import create_engine
from service.settings import BrokerSettings, Settings, load_settings
from tests.proof.bench.app import EFFECT

__all__ = ["plain_broker", "setup_broker"]


class _Engine(Middleware):
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine: AsyncEngine | None = None

    def before_worker_boot(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        database = self.settings.database.model_copy(update={"pool_size": worker.worker_threads})
        self.engine = create_engine(database, application_name="plain-worker")

    def after_worker_shutdown(self, broker: dramatiq.Broker, worker: dramatiq.Worker) -> None:
        thread = get_event_loop_thread()
        assert thread is not None
        assert self.engine is not None
        thread.run_coroutine(self.engine.dispose())


def plain_broker(settings: BrokerSettings, *middleware: Middleware) -> dramatiq.Broker:
    """Dramatiq's own broker for the URL, with confirmed publishing on RabbitMQ."""
    chain: list[Any] = [
        AsyncIO(),
        *middleware,
        *(each() for each in default_middleware if each.__name__ != "Prometheus"),
    ]
    if settings.is_rabbitmq:
        return RabbitmqBroker(url=settings.url.get_secret_value(), confirm_delivery=True, middleware=chain)
    return RedisBroker(url=settings.redis_url, middleware=chain)


def setup_broker() -> None:
    """A broker with the one actor."""
    settings = load_settings()
    engine = _Engine(settings)
    broker = plain_broker(settings.broker, engine)

    @dramatiq.actor(broker=broker, actor_name="bench.effect", queue_name="bench")
    async def effect(order_id: str) -> None:
        started = time.time()
        assert engine.engine is not None
        async with async_sessionmaker(engine.engine)() as session, session.begin():
            await session.execute(text(EFFECT), {"id": order_id, "started": started})

    dramatiq.set_broker(broker)

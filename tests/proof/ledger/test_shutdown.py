"""SIGTERM to a real worker process while a server that it needs is away, full or stalled: it ends in good time."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import uuid4

import psutil
import pytest
import redis

from tests.proof.ledger import domain
from tests.proof.ledger.looks import is_state
from tests.proof.ledger.working import working
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from service.dev.postgres import Postgres
    from service.dev.valkey import Valkey
    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger

pytestmark = pytest.mark.slow


async def test_a_full_broker_that_takes_nothing_back(
    ledger: Ledger, own_broker: Valkey, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    environment |= {"OUTBOX__SHUTDOWN_GRACE": "0.5", "OUTBOX__CONCURRENCY": "1"}
    async with working(environment, settings, tmp_path, "-p", "1", "-t", "1") as worker:
        ids = [(await ledger.publish(domain.Happened(subject_id=uuid4(), how="hang")))[0] for _ in range(3)]
        await until(lambda: is_state(ledger, ids[0], "running"))
        with redis.Redis.from_url(own_broker.url) as client:
            acks = next(client.scan_iter(match="*__acks__*.ledger"))
            await until(lambda: client.scard(acks) == 3, what="one that runs and two that wait")
            client.config_set("maxmemory", 1)
        assert await worker.stop() == 0
        assert worker.says("Worker has been shut down.")


async def test_a_broker_that_is_away_when_a_run_ends(
    ledger: Ledger, own_broker: Valkey, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    """Dramatiq's thread would try to acknowledge until the broker is back."""
    async with working(environment, settings, tmp_path, "-p", "1", "-t", "1") as worker:
        (message_id,) = await ledger.publish(domain.Happened(subject_id=uuid4(), how="slow"))
        await until(lambda: is_state(ledger, message_id, "running"))
        await asyncio.to_thread(own_broker.kill)
        await until(lambda: is_state(ledger, message_id, "completed"))
        assert await worker.stop() == 0
        assert worker.says("Worker has been shut down.")


@contextmanager
def stalled(postgres: Postgres) -> Iterator[None]:
    """PostgreSQL stands still, as on a disk that does not answer."""
    assert postgres.pid is not None
    server = psutil.Process(postgres.pid)
    family = [server, *server.children(recursive=True)]
    for each in family:
        each.suspend()
    try:
        yield
    finally:
        for each in family:
            each.resume()


@pytest.mark.parametrize("how", ["", "hang_inside"])
async def test_a_stalled_postgres(
    own_ledger: Ledger,
    own_postgres: Postgres,
    environment: dict[str, str],
    settings: Settings,
    tmp_path: Path,
    how: str,
) -> None:
    """Nobody answers when the connections are closed in good order."""
    async with working(environment, settings, tmp_path) as worker:
        (message_id,) = await own_ledger.publish(domain.Happened(subject_id=uuid4(), how=how))
        await until(lambda: is_state(own_ledger, message_id, "running" if how else "completed"))
        with stalled(own_postgres):
            assert await worker.stop() == 0
        assert worker.says("Worker has been shut down.")


async def test_a_second_signal(ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path) -> None:
    environment |= {"OUTBOX__SHUTDOWN_GRACE": "60", "OUTBOX__TIME_LIMIT": "60000"}
    async with working(environment, settings, tmp_path) as worker:
        (message_id,) = await ledger.publish(domain.Happened(subject_id=uuid4(), how="hang"))
        await until(lambda: is_state(ledger, message_id, "running"))
        worker.process.terminate()
        await until(lambda: worker.says("Shutting down"))
        began = time.monotonic()
        await worker.stop()
        assert time.monotonic() - began < 50

"""API and workers behind a real PgBouncer in transaction mode; the relay refuses it and says why."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from relay.process.loop import Relay
from service.database.engine import create_engine
from service.database.sessions import session_factory, transaction
from service.errors import ConfigurationError
from service.ledger import statistics
from service.outbox import publish
from tests.proof.ledger import domain
from tests.proof.ledger.looks import all_completed
from tests.proof.ledger.pooling import needs_pgbouncer, pgbouncer
from tests.proof.ledger.working import start_worker
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger
    from tests.servers.real_servers import Where

pytestmark = [pytest.mark.slow, needs_pgbouncer]


async def test_api_and_workers_work_behind_it(
    ledger: Ledger,
    settings: Settings,
    environment: dict[str, str],
    server_folder: Path,
    database_url: str,
    tmp_path: Path,
) -> None:
    async with relaying(settings.model_copy(deep=True)):
        with pgbouncer(server_folder, database_url) as url:
            settings.database.url = type(settings.database.url)(url)
            settings.database.pooler = True
            worker = start_worker(
                environment | {"DATABASE__URL": url, "DATABASE__POOLER": "true"}, tmp_path / "log", "-p", "1", "-t", "8"
            )
            engine = create_engine(settings.database, application_name="api")
            try:
                await until(lambda: worker.says("ready for action"))
                sessions = session_factory(engine)

                async def post(number: int) -> None:
                    async with transaction(sessions) as session:
                        how = "fail" if number % 10 == 0 else ""
                        publish(session, domain.Happened(subject_id=uuid4(), how=how, raw=number % 2 == 1))

                await asyncio.gather(*[post(number) for number in range(60)])
                await until(lambda: all_completed(ledger))
            finally:
                await worker.stop()
                await engine.dispose()
    assert await ledger.connection.fetchval("SELECT count(*) FROM effect") == 54
    assert await ledger.connection.fetchval("SELECT count(*) FROM dead_letter") == 6
    assert not worker.says("claim_waits")
    totals = await statistics.totals(ledger.connection)
    assert {key.outcome: counted.count for key, counted in totals.items()} == {"completed": 54, "failed": 12, "dead": 6}
    assert not worker.says("statistics_wait")


async def test_the_relay_refuses_it(settings: Settings, servers: Where, server_folder: Path, database_url: str) -> None:
    with pgbouncer(server_folder, database_url) as url:
        settings.database.url = type(settings.database.url)(url)
        with pytest.raises(ConfigurationError, match="direct connection"):
            await Relay(settings).run()

"""PostgreSQL fails over to a synchronous standby while API, relay and worker run, all by one URL with both hosts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import TYPE_CHECKING

import asyncpg
import httpx
import pytest

from service.database.engine import create_engine
from service.database.sessions import session_factory
from tests.proof.ledger import domain
from tests.proof.ledger.conftest import Ledger
from tests.proof.ledger.looks import all_completed, effects_once
from tests.servers.real_servers import migrate
from tests.servers.standby import Standby, synchronous_pair
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from service.dev.postgres import Postgres
    from service.settings import Settings
    from tests.servers.processes import Processes, Started
    from tests.servers.real_servers import Where

pytestmark = pytest.mark.slow

_DELIVERIES = 5
"""How many rows a request of the application below writes."""


@pytest.fixture
def pair(servers: Where, server_folder: Path) -> Iterator[tuple[Postgres, Standby]]:
    """Two PostgreSQLs; the second is a synchronous standby of the first."""
    with synchronous_pair(servers, server_folder) as pair:
        yield pair


@pytest.fixture
def url(pair: tuple[Postgres, Standby], environment: dict[str, str]) -> str:
    """One URL with both, the one that refuses writes first."""
    primary, standby = pair
    before, after = f"127.0.0.1:{primary.port}", f"127.0.0.1:{standby.port},127.0.0.1:{primary.port}"
    environment["DATABASE__URL"] = primary.url("service").replace(before, after)
    return environment["DATABASE__URL"]


class Clients:
    """Post all the time; `answered` is how many requests were answered with success."""

    def __init__(self, api: Started) -> None:
        self.answered = 0
        self.refused: set[int] = set()
        self._url = api.url
        self._stopped = False

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=30) as client:
            while not self._stopped:
                answer = await client.post("/releases")
                if answer.is_success:
                    self.answered += 1
                else:
                    self.refused.add(answer.status_code)

    def stop(self) -> None:
        self._stopped = True


async def test_all_follow_to_the_host_that_takes_writes(
    url: str, pair: tuple[Postgres, Standby], processes: Processes, settings: Settings, environment: dict[str, str]
) -> None:
    primary, standby = pair
    primary.sql(domain.SCHEMA, "service")
    await asyncio.to_thread(migrate, url)
    api, *_ = await asyncio.gather(
        processes.api("tests.proof.ledger.release.app:create_app", RELEASE="older"),
        processes.worker("tests.proof.ledger.release.app:setup_broker", RELEASE="older"),
        processes.relay(),
    )
    clients = Clients(api)
    posting = asyncio.create_task(clients.run())
    await until(lambda: clients.answered >= 20)
    await asyncio.to_thread(primary.kill)
    await asyncio.to_thread(standby.promote)
    enough = clients.answered + 20
    await until(lambda: clients.answered >= enough)
    clients.stop()
    await posting

    settings.database.url = type(settings.database.url)(standby.url("service"))
    connection = await asyncpg.connect(standby.url("service"))
    engine = create_engine(settings.database, application_name="tests")
    ledger = Ledger(connection, session_factory(engine))
    try:
        await until(lambda: all_completed(ledger))
        await effects_once(ledger)
        rows = await connection.fetchval("SELECT count(*) FROM outbox_message")
    finally:
        await connection.close()
        await engine.dispose()
    assert rows >= clients.answered * _DELIVERIES
    assert clients.refused <= {503}
    status = [sys.executable, "-m", "relay", "status", "--fail-if", "relays<1,dead>0"]
    done = await asyncio.to_thread(subprocess.run, status, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

"""What one event costs, in statements, rows and broker commands: the figures that are the same on every machine.

Whoever adds a statement to the path of every event shall notice it here, and decide.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import pytest
import redis.asyncio
from pydantic import SecretStr
from sqlalchemy import text

from service.database.engine import create_engine
from service.database.sessions import OneTransaction, session_factory, transaction
from service.outbox import publish
from tests.proof.ledger import domain
from tests.proof.ledger.backlog import MANY, ROWS
from tests.proof.ledger.conftest import Ledger
from tests.proof.ledger.looks import all_completed, all_dispatched
from tests.proof.ledger.working import start_worker
from tests.servers.real_servers import TEMPLATE, another_postgres
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from service.dev.postgres import Postgres
    from service.dev.valkey import Valkey
    from service.settings import Settings
    from tests.servers.real_servers import Where

BATCHES = ROWS // 500
CONNECTING = 20
"""Statements that a process may need to open its connections and to fall asleep again, whatever it then does."""

_STATEMENT = re.compile(r"^([\w-]+)\|LOG:  (?:execute \S+|statement):", re.MULTILINE)


@pytest.fixture
def talkative(servers: Where, server_folder: Path) -> Iterator[Postgres]:
    """A PostgreSQL that logs every statement behind the name of its session."""
    settings = {"synchronous_commit": "off", "log_statement": "all", "log_line_prefix": "%a|"}
    with another_postgres(servers, server_folder / "postgres", settings=settings) as postgres:
        yield postgres


@pytest.fixture
def told(settings: Settings, talkative: Postgres, own_valkey: Valkey) -> Settings:
    """The test's settings, with servers that nobody else uses, and time for everything: no hand-over and no lease is
    repeated because the machine is busy."""
    database = settings.database.model_copy(update={"url": SecretStr(talkative.url(TEMPLATE))})
    roomy = settings.outbox.model_copy(update={"high_water_mark": 10 * ROWS, "lease": 600, "redispatch_after": 600})
    broker = settings.broker.model_copy(update={"url": SecretStr(own_valkey.url), "publish_timeout": 60.0})
    return settings.model_copy(update={"database": database, "broker": broker, "outbox": roomy})


@pytest.fixture
async def watched(told: Settings) -> AsyncIterator[Ledger]:
    """The ledger in that PostgreSQL."""
    engine = create_engine(told.database, application_name="outbox-api")
    connection = await asyncpg.connect(told.database.dsn)
    await connection.execute(domain.SCHEMA)
    yield Ledger(connection, session_factory(engine))
    await connection.close()
    await engine.dispose()


def statements(postgres: Postgres) -> Counter[str]:
    """Statements so far, by the session's name."""
    return Counter(_STATEMENT.findall(postgres.log.read_text()))


def kinds(postgres: Postgres, name: str) -> Counter[str]:
    """The same of one session, by how they begin."""
    begins = re.findall(
        rf"^{name}\|LOG:  (?:execute \S+|statement):\s*(.{{1,20}})", postgres.log.read_text(), re.MULTILINE
    )
    return Counter(begins)


async def commands(settings: Settings) -> int:
    """Commands that the broker has executed for its clients and in scripts."""
    client = redis.asyncio.Redis.from_url(settings.broker.redis_url)
    stats = await client.info("commandstats")
    await client.aclose()
    return sum(each["calls"] for name, each in stats.items() if name.removeprefix("cmdstat_") not in ("info", "client"))


async def test_publishing_costs_one_statement_a_consumer(talkative: Postgres, watched: Ledger) -> None:
    sessions = session_factory(watched.sessions.kw["bind"], OneTransaction)

    async def commit(*, with_event: bool) -> int:
        before = statements(talkative)["outbox-api"]
        async with transaction(sessions) as session:
            await session.execute(text("INSERT INTO effect VALUES (gen_random_uuid(), 'business', '')"))
            if with_event:
                publish(session, domain.FannedOut(subject_id=uuid4()))
        return statements(talkative)["outbox-api"] - before

    await commit(with_event=True)
    # BEGIN with the mark of the transaction, what the request does, and COMMIT with the look whether it is whole.
    assert await commit(with_event=False) == 3
    assert await commit(with_event=True) == 3 + 2
    assert await watched.connection.fetchval("SELECT count(*) FROM outbox_message") == 4


async def test_the_relay_costs_three_statements_and_one_call_a_batch(
    talkative: Postgres, watched: Ledger, told: Settings
) -> None:
    await watched.connection.execute(MANY, "pending")
    called = await commands(told)
    async with relaying(told):
        await until(lambda: all_dispatched(watched))
    spent = kinds(talkative, "outbox-relay")
    # What is due and which queues there are it asks as time goes by, whatever it hands over.
    del spent["SELECT known.queue"], spent["WITH RECURSIVE heads"]
    a_batch = {kind: times for kind, times in spent.items() if times >= BATCHES}
    assert a_batch.keys() == {"BEGIN;", "WITH due AS MATERIAL", "COMMIT;"}
    assert max(a_batch.values()) < 2 * BATCHES
    # A body and a place in the list for each, and for a batch the call, the length, the push and the doorbell.
    assert ROWS <= await commands(told) - called <= ROWS + 4 * BATCHES + CONNECTING
    assert await updated(watched) == ROWS


async def updated(ledger: Ledger) -> int:
    """Rows of the outbox that the relay and the workers have written, once their sessions have ended."""

    async def counted() -> int | None:
        others = await ledger.connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name ~ '^outbox-(relay|worker)'"
        )
        rows: int = await ledger.connection.fetchval(
            "SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'outbox_message'"
        )
        return None if others else rows

    result: int = await until(counted)
    return result


@pytest.mark.slow
async def test_a_delivery_costs_a_claim_and_three_statements_beside_its_effect(
    talkative: Postgres, watched: Ledger, told: Settings, environment: dict[str, str], tmp_path: Path
) -> None:
    events = 200
    for _ in range(events):
        await watched.publish()
    async with relaying(told):
        await until(lambda: all_dispatched(watched))
    before, called = statements(talkative), await commands(told)
    like_told = {
        "DATABASE__URL": told.database.dsn,
        "BROKER__URL": told.broker.redis_url,
        "OUTBOX__LEASE": f"{told.outbox.lease:g}",
    }
    worker = start_worker(environment | like_told, tmp_path / "worker.log")
    try:
        await until(lambda: all_completed(watched))
    finally:
        await worker.stop()
    spent = statements(talkative) - before
    # Runs that begin together claim together.
    assert spent["outbox-worker-ledger"] <= events + CONNECTING
    # BEGIN with the mark and the limits of the transaction, the effect, the completion, COMMIT.
    assert spent["outbox-worker"] <= 4 * events + CONNECTING + SCHEDULES
    assert await updated(watched) == 3 * events
    # A place in the list and one among the unacknowledged for each; the rest is shared by a few.
    assert await commands(told) - called <= 6 * events


SCHEDULES = 13
"""Statements by which a worker sees once, when it starts, that its schedules are as the code has them."""

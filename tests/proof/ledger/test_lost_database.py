"""PostgreSQL goes away, falls silent or only reads: no attempt is used up, and everything goes on by itself."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from service.database import driver
from service.database.engine import create_engine
from service.database.sessions import session_factory
from service.ledger import statistics
from service.outbox.running.runner import Runner
from tests.proof.ledger import domain
from tests.proof.ledger.conftest import Ledger
from tests.proof.ledger.looks import all_completed, dispatched, is_state
from tests.proof.ledger.working import start_worker, working
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncEngine

    from service.dev.postgres import Postgres
    from service.settings import Settings

pytestmark = pytest.mark.slow


class Mortal:
    """A ledger in a PostgreSQL of this test's own, and how to look at it after it was away."""

    def __init__(self, settings: Settings, environment: dict[str, str], postgres: Postgres) -> None:
        self.postgres = postgres
        self.url = postgres.url("service")
        settings.database.url = type(settings.database.url)(self.url)
        environment["DATABASE__URL"] = self.url
        self.engine = create_engine(settings.database, application_name="tests")
        self.ledger: Ledger

    async def look(self) -> Ledger:
        """The ledger, on a new connection."""
        if hasattr(self, "ledger"):
            self.ledger.connection.terminate()
        connection = await asyncpg.connect(self.url)
        await connection.execute(domain.SCHEMA)
        self.ledger = Ledger(connection, session_factory(self.engine))
        return self.ledger

    async def restart(self, away: float = 0) -> Ledger:
        """Shut down, stay away for some seconds, and come back. A crash could lose claims, whose runs are repeated."""
        await asyncio.to_thread(self.postgres.stop, mode="fast")
        await asyncio.sleep(away)  # the fault itself
        await asyncio.to_thread(self.postgres.start)
        return await self.look()


@pytest.fixture
async def mortal(settings: Settings, environment: dict[str, str], own_postgres: Postgres) -> AsyncIterator[Mortal]:
    mortal = Mortal(settings, environment, own_postgres)
    await mortal.look()
    yield mortal
    mortal.ledger.connection.terminate()
    await mortal.engine.dispose()


@asynccontextmanager
async def a_runner(settings: Settings) -> AsyncIterator[tuple[Runner, AsyncEngine]]:
    """A worker's runner on the test's loop, with its engine."""
    engine = create_engine(settings.database, application_name="outbox-worker")
    runner = Runner(settings, engine)
    await runner.open()
    try:
        yield runner, engine
    finally:
        await runner.close()
        await engine.dispose()


async def test_what_was_counted_in_an_outage_is_in_the_ledger_after_it(
    mortal: Mortal, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    async with working(environment, settings, tmp_path, "-p", "1", "-t", "8"):
        for how in ("", "", "slow", "slower"):
            await mortal.ledger.publish(domain.Happened(subject_id=uuid4(), how=how))
        await until(lambda: is_running(mortal.ledger))
        ledger = await mortal.restart(away=3)
        await until(lambda: all_completed(ledger))
    totals = await statistics.totals(ledger.connection)
    assert sum(counted.count for key, counted in totals.items() if key.outcome == "completed") == 4


async def is_running(ledger: Ledger) -> bool:
    return bool(await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE state = 'running'"))


async def attempts(ledger: Ledger) -> int:
    """The most attempts that a row has used up."""
    assert await ledger.connection.fetchval("SELECT count(*) FROM dead_letter") == 0
    most: int = await ledger.connection.fetchval("SELECT max(attempts) FROM outbox_message")
    return most


async def all_running(ledger: Ledger) -> bool:
    return not await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE state <> 'running'")


async def test_an_outage_longer_than_a_lease_uses_up_no_attempt(
    mortal: Mortal, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    """It begins in mid-run, and what was done outside the database meanwhile is not done again."""
    async with working(environment, settings, tmp_path) as worker:
        ids = await mortal.ledger.publish(domain.Endured(subject_id=uuid4(), seconds=1.5))
        await until(lambda: all_running(mortal.ledger))
        ledger = await mortal.restart(away=3 * settings.outbox.lease)
        await until(lambda: all_completed(ledger))
    assert await attempts(ledger) == 1
    assert await ledger.effects(ids[0]) == 1
    assert [worker.log.read_text().count(f"sent {each}") for each in ids[1:]] == [1, 1]


async def test_a_claim_that_waited_leaves_the_consumer_its_whole_time_limit(
    mortal: Mortal, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    """Dramatiq's own limit counts the wait, too."""
    environment |= {"OUTBOX__TIME_LIMIT": "6000", "OUTBOX__REDISPATCH_AFTER": "60"}
    settings.outbox.time_limit, settings.outbox.redispatch_after = 6_000, 60
    async with relaying(settings):
        ids = await mortal.ledger.publish(domain.Endured(subject_id=uuid4(), seconds=3.5))
        for message_id in ids:
            await until(lambda each=message_id: dispatched(mortal.ledger, each))  # type: ignore[misc]
        await asyncio.to_thread(mortal.postgres.stop, mode="immediate")
        worker = start_worker(environment, tmp_path / "worker.log")
        try:
            await until(lambda: worker.log.read_text().count("claim_waits") >= len(ids))
            await asyncio.sleep(4)  # the fault itself: of limit and grace, less than the consumers need is left
            await asyncio.to_thread(mortal.postgres.start)
            ledger = await mortal.look()
            await until(lambda: all_completed(ledger))
        finally:
            await worker.stop()
    assert await attempts(ledger) == 1


async def test_a_claim_given_up_while_it_waits_uses_up_no_attempt(mortal: Mortal, settings: Settings) -> None:
    """PostgreSQL has made the claim, and nobody is left who could run it."""
    async with a_runner(settings) as (runner, _):
        message_id = await mortal.ledger.happen()
        async with mortal.ledger.connection.transaction():
            await mortal.ledger.connection.execute("SELECT FROM outbox_message WHERE id = $1 FOR UPDATE", message_id)
            run = asyncio.create_task(runner.deliver(message_id))
            await until(lambda: waits(mortal))
            run.cancel()
            with suppress(asyncio.CancelledError):
                await run
        await until(lambda: is_state(mortal.ledger, message_id, "pending"))
    assert await attempts(mortal.ledger) == 0


async def waits(mortal: Mortal) -> bool:
    return bool(mortal.postgres.sql("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))


async def test_a_connection_that_broke_while_nobody_used_it_costs_a_redispatched_row_nothing(
    mortal: Mortal, settings: Settings
) -> None:
    async with a_runner(settings) as (runner, _):
        await runner.deliver(await mortal.ledger.happen())
        ledger = await mortal.restart()
        message_id = await ledger.happen()
        await ledger.set(message_id, dispatches=3)
        await runner.deliver(message_id)
    assert await ledger.state(message_id) == "completed"
    assert await attempts(ledger) == 1


async def test_a_second_and_a_third_restart_use_up_no_attempt_either(
    mortal: Mortal, settings: Settings, raw: bool
) -> None:
    """Eight rows are in the middle of their effects each time."""
    settings.database.pool_size = 8
    async with a_runner(settings) as (runner, _):
        ids = [(await mortal.ledger.publish(domain.Gated(subject_id=uuid4(), raw=raw)))[0] for _ in range(8)]
        for restart in (1, 2, 3):
            gates = {each: domain.Gate() for each in ids}
            for each, gate in gates.items():
                domain.GATES[str(each)] = [gate]
                await mortal.ledger.set(each, state="dispatched", dispatches=restart)
            runs = [asyncio.create_task(runner.deliver(each)) for each in ids]
            for gate in gates.values():
                await gate.reached.wait()
            await mortal.restart()
            for gate in gates.values():
                gate.opened.set()
            await asyncio.gather(*runs)
            for each in ids:
                await until(lambda each=each: is_state(mortal.ledger, each, "pending"))  # type: ignore[misc]
            assert await attempts(mortal.ledger) == 0
        for each in ids:
            await mortal.ledger.set(each, state="dispatched")
            await runner.deliver(each)
    assert await attempts(mortal.ledger) == 1
    assert [await mortal.ledger.effects(each) for each in ids] == [1] * 8


class Tunnel:
    """A way to PostgreSQL over TCP whose open connections can fall silent, as when their server vanishes."""

    def __init__(self, url: str) -> None:
        target = make_url(url)
        self._socket = f"{target.query['host']}/.s.PGSQL.{target.query['port']}"
        self._database = target.database
        self._generation = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        """The URL of PostgreSQL through this tunnel."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            port = server.sockets[0].getsockname()[1]
            yield f"postgresql://postgres@127.0.0.1:{port}/{self._database}"
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()

    def silence(self) -> None:
        """Nothing comes through the connections that are open, and neither side is told."""
        self._generation += 1

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(self._socket)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        generation = self._generation
        try:
            with suppress(OSError):
                while chunk := await source.read(65_536):
                    if generation == self._generation:
                        sink.write(chunk)
                        await sink.drain()
        finally:
            sink.close()


async def test_connections_that_fall_silent_are_replaced(
    ledger: Ledger, settings: Settings, database_url: str, monkeypatch: pytest.MonkeyPatch, raw: bool
) -> None:
    monkeypatch.setattr(driver, "_BEGIN_WITHIN", 1.0, raising=False)
    settings.outbox.time_limit = 60_000
    tunnel = Tunnel(database_url)
    async with tunnel.open() as url:
        settings.database.url = type(settings.database.url)(url)
        async with a_runner(settings) as (runner, _):
            await asyncio.gather(*[runner.deliver(await ledger.happen(raw=raw)) for _ in range(8)])
            ids = [await ledger.happen(raw=raw) for _ in range(8)]
            for message_id in ids:
                await ledger.set(message_id, dispatches=5)
            tunnel.silence()
            async with asyncio.timeout(15):
                await asyncio.gather(*[runner.deliver(each) for each in ids])
            for message_id in ids:
                await until(lambda each=message_id: is_settled(ledger, each))  # type: ignore[misc]
                await ledger.expire(message_id)
                await runner.deliver(message_id)
    assert [await ledger.state(each) for each in ids] == ["completed"] * 8
    assert await attempts(ledger) == 1
    assert [await ledger.effects(each) for each in ids] == [1] * 8


async def is_settled(ledger: Ledger, message_id: UUID) -> bool:
    return await ledger.state(message_id) in ("pending", "completed")


async def test_an_outcome_that_a_silent_connection_swallows_is_written_after_all(
    ledger: Ledger, settings: Settings, database_url: str
) -> None:
    tunnel = Tunnel(database_url)
    async with tunnel.open() as url:
        settings.database.url = type(settings.database.url)(url)
        async with a_runner(settings) as (runner, _):
            _, message_id, _ = await ledger.publish(domain.Endured(subject_id=uuid4(), seconds=0.5))
            await ledger.set(message_id, state="dispatched", dispatches=1)
            run = asyncio.create_task(runner.deliver(message_id))
            await until(lambda: is_state(ledger, message_id, "running"))
            tunnel.silence()
            async with asyncio.timeout(10):
                await run
            await until(lambda: is_state(ledger, message_id, "completed"))
    row = await ledger.row(message_id)
    assert row is not None
    assert row["attempts"] == 1


async def test_a_worker_that_met_a_server_that_only_reads_recovers(
    ledger: Ledger, settings: Settings, capsys: pytest.CaptureFixture[str], raw: bool
) -> None:
    """A session begun on a standby, or under a role that may only read, stays so for good."""
    name = make_url(settings.database.dsn).database
    message_id = await ledger.happen(raw=raw)
    await ledger.connection.execute(f'ALTER ROLE postgres IN DATABASE "{name}" SET default_transaction_read_only = on')
    async with a_runner(settings) as (runner, engine):
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
        run = asyncio.create_task(runner.deliver(message_id))
        await until(lambda: "ReadOnlySQLTransactionError" in capsys.readouterr().out)
        await ledger.connection.execute(f'ALTER ROLE postgres IN DATABASE "{name}" RESET ALL')
        async with asyncio.timeout(15):
            await run
        row = await ledger.row(message_id)
        assert row is not None
        assert (row["state"], row["attempts"]) == ("pending", 0)
        await ledger.expire(message_id)
        await runner.deliver(message_id)
    assert await ledger.effects(message_id) == 1
    assert await attempts(ledger) == 1


async def test_a_session_that_asked_to_be_read_only_keeps_its_connection(ledger: Ledger, engine: AsyncEngine) -> None:
    """Who writes in it is told so, and it is no outage."""
    await ledger.connection.execute("TRUNCATE effect")
    async with engine.connect() as connection:
        await connection.execution_options(postgresql_readonly=True)
        with pytest.raises(DBAPIError, match="read-only") as raised:
            await connection.execute(text("INSERT INTO effect VALUES (gen_random_uuid(), '', '')"))
    assert not raised.value.connection_invalidated


async def test_timeouts_of_the_role_end_no_session_of_a_worker(ledger: Ledger, settings: Settings) -> None:
    role = f'ALTER ROLE postgres IN DATABASE "{make_url(settings.database.dsn).database}"'
    known = ledger.connection.get_server_version() >= (17,)
    for name in ("idle_session_timeout", *(("transaction_timeout",) if known else ())):
        await ledger.connection.execute(f"{role} SET {name} = '200ms'")
    connection = await driver.connect(settings.database, "outbox-test")
    await asyncio.sleep(0.5)  # idle
    async with connection.transaction():
        await connection.execute("SELECT pg_sleep(0.5)")
        await connection.execute("SELECT 1")
    await connection.close()

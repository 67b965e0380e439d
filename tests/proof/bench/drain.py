"""How fast a backlog leaves: the relay, the loop that tutorials show, the claim alone, and two other relays."""

from __future__ import annotations

import asyncio
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import asyncpg
import dramatiq

from service.ledger.dispatching import NO_FLOOR, Pauses, take_due
from tests.proof.bench.plain import plain_broker
from tests.proof.bench.stage import INSERT
from tests.waiting import until

if TYPE_CHECKING:
    from service.database.driver import Connection
    from tests.proof.bench.stage import Stage

__all__ = ["claim_alone", "drained", "loop", "once", "peer", "relay"]

_TUTORIAL_SELECT = """
SELECT id, consumer FROM outbox_message WHERE state = 'pending' AND due_at <= now()
ORDER BY due_at, id LIMIT 100 FOR UPDATE SKIP LOCKED
"""
_TUTORIAL_UPDATE = "UPDATE outbox_message SET state = 'dispatched', dispatched_at = clock_timestamp() WHERE id = $1"


async def drained(stage: Stage, connection: Connection, rows: int, broker: str = "valkey") -> float:
    """Rows per second from when a backlog is visible to when all of it is in the broker. A relay runs already."""
    before = stage.waiting(broker=broker)
    every = 0.005 if broker == "valkey" else 0.05  # asking RabbitMQ takes a connection
    await connection.execute(INSERT, rows)
    began = time.perf_counter()
    await until(lambda: stage.waiting(broker=broker) >= before + rows, timeout=600, every=every)
    return rows / (time.perf_counter() - began)


async def relay(stage: Stage, rows: int, broker: str = "valkey") -> float:
    """Rows per second of `outbox relay`, which has moved a few before."""
    async with stage.database() as database, stage.relay(database, broker):
        connection = await asyncpg.connect(database)
        try:
            await drained(stage, connection, 2_000, broker)
            if broker == "rabbitmq":
                stage.empty_rabbitmq()
            rate = await drained(stage, connection, rows, broker)
            if broker == "rabbitmq":
                stage.empty_rabbitmq()
            await until(lambda: _all_dispatched(connection, rows + 2_000))
            return rate
        finally:
            await connection.close()


async def _all_dispatched(connection: Connection, rows: int) -> bool:
    dispatched: int = await connection.fetchval(
        "SELECT count(*) FROM outbox_message WHERE state = 'dispatched' AND dispatches = 1"
    )
    return dispatched == rows


async def loop(stage: Stage, rows: int, broker: str = "valkey") -> float:
    """Rows per second of SELECT, `enqueue`, UPDATE for each row, and COMMIT for every hundred, in one process."""
    async with stage.database() as database:
        connection = await asyncpg.connect(database)
        sender = plain_broker(stage.settings(database, broker).broker)
        sender.declare_queue("bench")
        try:
            await connection.execute(INSERT, rows)
            began = time.perf_counter()
            while await _tutorial(connection, sender):
                pass
            took = time.perf_counter() - began
            assert stage.waiting(broker=broker) == rows
            return rows / took
        finally:
            if broker == "rabbitmq":
                stage.empty_rabbitmq()
            sender.close()
            await connection.close()


async def _tutorial(connection: Connection, sender: dramatiq.Broker) -> int:
    async with connection.transaction():
        rows = await connection.fetch(_TUTORIAL_SELECT)
        for row in rows:
            message: dramatiq.Message[None] = dramatiq.Message("bench", row["consumer"], (str(row["id"]),), {}, {})
            sender.enqueue(message)
            await connection.execute(_TUTORIAL_UPDATE, row["id"])
    return len(rows)


async def claim_alone(stage: Stage, rows: int) -> float:
    """Rows per second of the relay's own statement and COMMIT, with no broker behind it."""
    async with stage.database() as database:
        connection = await asyncpg.connect(
            database, server_settings={"plan_cache_mode": "force_custom_plan", "enable_sort": "off"}
        )
        try:
            await connection.execute(INSERT, rows)
            floor, taken, minute = NO_FLOOR, 0, timedelta(seconds=60)
            began = time.perf_counter()
            while taken < rows:
                async with connection.transaction():
                    pauses = Pauses(minute, minute, minute)
                    batch = await take_due(connection, "bench", floor, 500, pauses, expired_leases=True)
                assert batch is not None
                floor, taken = batch.floor, taken + len(batch.deliveries)
            return rows / (time.perf_counter() - began)
        finally:
            await connection.close()


async def peer(stage: Stage, name: str, rows: int, *, tuned: bool) -> float:
    """Rows per second of another library's relay into a list of the same Valkey."""
    module = f"tests.proof.bench.peers.{name}"
    async with stage.database("template1") as database:
        environment = stage.environment(database)
        await once(module, "prepare", environment=environment)
        arguments = ("--tuned",) if tuned else ()
        async with stage.running(module, "relay", *arguments, environment=environment, ready="ready"):
            await once(module, "load", "500", environment=environment)
            await until(lambda: _length(stage) >= 500, timeout=60)
            before = _length(stage)
            load = asyncio.create_task(once(module, "load", str(rows), environment=environment))
            # From its first, not from the commit: some look for new rows only every few seconds.
            await until(lambda: _length(stage) > before, timeout=120, every=0.005)
            already, began = _length(stage) - before, time.perf_counter()
            await until(lambda: _length(stage) >= before + rows, timeout=300, every=0.005)
            rate = (rows - already) / (time.perf_counter() - began)
            await load
            return rate


def _length(stage: Stage) -> int:
    count = stage.redis.xlen if stage.redis.type("bench") == b"stream" else stage.redis.llen
    return int(count("bench"))


async def once(*command: str, environment: dict[str, str]) -> list[str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *command, env=environment, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise ChildProcessError(f"{' '.join(command)} ended with {process.returncode}")
    return output.decode().splitlines()

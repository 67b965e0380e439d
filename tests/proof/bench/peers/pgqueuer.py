"""pgqueuer: a job queue in Postgres over asyncpg; one statement fetches a batch of jobs.

Like ours: the job commits with the business row, by its own API; Postgres is the only source of truth; at-least-once;
heartbeats, and a dead worker's jobs are picked again; its result is logged in a table, with the traceback.
Unlike ours: jobs are finished in batches, in a transaction of their own after the effects', so a killed worker's
effects happen again; finishing matches only the id, not the worker; by default nothing is retried and a failed job is
deleted (its log row stays; `on_failure="hold"` keeps it to be queued again).

By default its worker takes all that is due into memory. `--concurrency` is the number of connections that effects may
use at a time.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver, AsyncpgPoolDriver
from pgqueuer.queries import Queries

from tests.proof.bench.peers.orders import TABLES, Write, place_orders
from tests.proof.bench.peers.roles import Options, ready, run

if TYPE_CHECKING:
    from pgqueuer.models import Job

_ENTRYPOINT = "effect"

_TUNED: dict[str, Any] = {"batch_size": 200, "max_concurrent_tasks": 400}

_LOAD = """
INSERT INTO pgqueuer (priority, entrypoint, payload, status)
SELECT 0, $1, convert_to(gen_random_uuid()::text, 'UTF8'), 'queued' FROM generate_series(1, $2::int)
"""


async def prepare(options: Options) -> None:
    connection = await asyncpg.connect(options.postgres)
    try:
        await Queries(AsyncpgDriver(connection)).install()
        await connection.execute(TABLES)
    finally:
        await connection.close()


async def load(options: Options) -> None:
    connection = await asyncpg.connect(options.postgres)
    try:
        async with connection.transaction():
            await connection.execute(_LOAD, _ENTRYPOINT, options.count)
            await connection.execute("ANALYZE pgqueuer")
    finally:
        await connection.close()


async def enqueue(options: Options) -> None:
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(
            asyncpg.create_pool(options.postgres, max_size=options.writers, min_size=1)
        )
        connections = [await stack.enter_async_context(pool.acquire()) for _ in range(options.writers)]
        await place_orders(options.count, [_writer(connection) for connection in connections])


def _writer(connection: Any) -> Write:
    queries = Queries(AsyncpgDriver(connection))

    async def write(order_id: UUID) -> None:
        async with connection.transaction():
            await connection.execute("INSERT INTO bench_order (id, customer) VALUES ($1, $2)", order_id, "c-123")
            await queries.enqueue(_ENTRYPOINT, str(order_id).encode())

    return write


async def worker(options: Options) -> None:
    async with AsyncExitStack() as stack:
        size = options.concurrency
        pool = await stack.enter_async_context(asyncpg.create_pool(options.postgres, min_size=size, max_size=size))
        if options.tuned:
            own = await stack.enter_async_context(asyncpg.create_pool(options.postgres, min_size=3, max_size=3))
            queue = PgQueuer(AsyncpgPoolDriver(own))
        else:
            connection = await asyncpg.connect(options.postgres)
            stack.push_async_callback(connection.close)
            queue = PgQueuer(AsyncpgDriver(connection))

        async def effect(job: Job) -> None:
            await pool.execute("INSERT INTO bench_effect (order_id) VALUES ($1)", UUID(job.payload.decode()))

        queue.entrypoint(_ENTRYPOINT)(effect)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, queue.shutdown.set)
        ready()
        await queue.run(**(_TUNED if options.tuned else {}))


if __name__ == "__main__":
    run(prepare=prepare, load=load, enqueue=enqueue, worker=worker)

"""procrastinate: a job queue in Postgres over psycopg; one statement fetches one job.

Like ours: the job commits with the business row, by its own API; Postgres is the only source of truth; at-least-once;
retries with backoff if the task asks for them; a job that fails for good stays in its table with the status `failed`.
Unlike ours: the job is finished in a transaction of its own after the effect's, so an effect can happen twice;
finishing matches only the id and the status, not the worker; a dead worker's jobs stay `doing` until code of the user's
looks for them and retries them; errors are logged, not stored.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import procrastinate
import psycopg
from psycopg_pool import AsyncConnectionPool

from tests.proof.bench.peers.orders import TABLES, Write, place_orders
from tests.proof.bench.peers.roles import Options, ready, run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from uuid import UUID

_TASK = "bench.effect"
_QUEUE = "bench"

_LOAD = """
INSERT INTO procrastinate_jobs (queue_name, task_name, args)
SELECT %s, %s, jsonb_build_object('order_id', gen_random_uuid()) FROM generate_series(1, %s)
"""


async def prepare(options: Options) -> None:
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=options.postgres))
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
    async with await psycopg.AsyncConnection.connect(options.postgres) as connection:
        await connection.execute(TABLES)


async def load(options: Options) -> None:
    async with await psycopg.AsyncConnection.connect(options.postgres) as connection:
        await connection.execute(_LOAD, (_QUEUE, _TASK, options.count))
        await connection.execute("ANALYZE procrastinate_jobs")


async def enqueue(options: Options) -> None:
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(_pool(options, options.writers))
        app, task = _app(options, pool)
        await stack.enter_async_context(app.open_async())
        connections = [await stack.enter_async_context(pool.connection()) for _ in range(options.writers)]
        await place_orders(options.count, [_writer(task, connection) for connection in connections])


def _writer(task: Any, connection: Any) -> Write:
    async def write(order_id: UUID) -> None:
        async with connection.transaction():
            await connection.execute("INSERT INTO bench_order (id, customer) VALUES (%s, %s)", (order_id, "c-123"))
            await task.configure(connection=connection).defer_async(order_id=str(order_id))

    return write


async def worker(options: Options) -> None:
    async with _pool(options, options.concurrency) as pool:
        app, _task = _app(options, pool)
        async with AsyncExitStack() as stack:
            if options.tuned:
                # A pool of its own: as many connections as jobs, and no query to check one before each use.
                own = await stack.enter_async_context(_pool(options, options.concurrency + 2))
                await stack.enter_async_context(app.open_async(own))
            else:
                await stack.enter_async_context(app.open_async())
            ready()
            settings = {"delete_jobs": "successful"} if options.tuned else {}
            await app.run_worker_async(queues=[_QUEUE], concurrency=options.concurrency, **settings)


@asynccontextmanager
async def _pool(options: Options, size: int) -> AsyncIterator[Any]:
    async with AsyncConnectionPool(options.postgres, min_size=size, max_size=size, open=False) as pool:
        await pool.wait()
        yield pool


def _app(options: Options, pool: Any) -> tuple[Any, Any]:
    """The application and its task, whose effect is a transaction of its own."""
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=options.postgres))

    async def effect(order_id: str) -> None:
        async with pool.connection() as connection:
            await connection.execute("INSERT INTO bench_effect (order_id) VALUES (%s)", (order_id,))

    return app, app.task(name=_TASK, queue=_QUEUE)(effect)


if __name__ == "__main__":
    run(prepare=prepare, load=load, enqueue=enqueue, worker=worker)

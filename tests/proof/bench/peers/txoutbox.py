"""txoutbox: a relay for asyncio over an asyncpg pool; the publisher is a function, here one RPUSH.

Like ours: the event commits with the business row; claims are leases, fenced by the relay's id; at-least-once; retries
with backoff and dead letters, for what the broker refuses. Unlike ours: a row is done once the broker took it, so what
the broker or a consumer loses afterwards is lost; a broker outage burns attempts (dead after ten); nothing makes an
effect happen once; replay is the user's own SQL. What ours does not have: order per key.
"""

from __future__ import annotations

import asyncpg
import redis.asyncio
from txoutbox import OutboxMessage, Relay, RelayConfig
from txoutbox.adapters.postgres import PostgresStorage

from tests.proof.bench.peers.roles import LIST, Options, ready, run

_LOAD = """
INSERT INTO outbox (topic, payload)
SELECT 'bench.ordered',
       convert_to(json_build_object('order_id', gen_random_uuid(), 'customer', 'c-123')::text, 'UTF8')
FROM generate_series(1, $1::int)
"""

# No row has a key, so nothing has to be kept in order; the worst round (50 s) stays below the lease (60 s).
_TUNED = RelayConfig(batch_size=500, concurrency=50, poll_max=0.05)


async def prepare(options: Options) -> None:
    async with asyncpg.create_pool(options.postgres, min_size=1) as pool:
        await PostgresStorage(pool).create_schema()


async def load(options: Options) -> None:
    connection = await asyncpg.connect(options.postgres)
    try:
        async with connection.transaction():
            await connection.execute(_LOAD, options.count)
            await connection.execute("ANALYZE outbox")
    finally:
        await connection.close()


async def relay(options: Options) -> None:
    async with asyncpg.create_pool(options.postgres) as pool, redis.asyncio.from_url(options.valkey) as valkey:

        async def publish(message: OutboxMessage) -> None:
            await valkey.rpush(LIST, message.payload)

        storage = PostgresStorage(pool, strict_ordering=not options.tuned)
        ready()
        await Relay(storage, publish, config=_TUNED if options.tuned else RelayConfig()).run(handle_signals=True)


if __name__ == "__main__":
    run(prepare=prepare, load=load, relay=relay)

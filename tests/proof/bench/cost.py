"""Where the time of one event goes: microseconds of CPU per process, rows, transactions, WAL bytes, broker commands."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import asyncpg
import psutil

from tests.proof.bench.drain import drained
from tests.proof.bench.stage import INSERT
from tests.proof.bench.writers import api, post_all
from tests.waiting import until

if TYPE_CHECKING:
    from service.database.driver import Connection
    from tests.proof.bench.stage import Running, Stage

__all__ = ["Cost", "idle", "per_event", "postgres_cpu", "table"]

_COUNTERS = """
SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8 AS wal,
       (SELECT xact_commit FROM pg_stat_database WHERE datname = current_database())::float8 AS transactions,
       (SELECT sum(n_tup_ins + n_tup_upd + n_tup_del) FROM pg_stat_user_tables WHERE relname = 'outbox_message')::float8
           AS rows
"""


@dataclass(frozen=True)
class Cost:
    """What one event costs on its way through a process, on average."""

    process: float
    """Microseconds of CPU in the process itself."""
    postgres: float
    """Microseconds of CPU in PostgreSQL."""
    broker: float
    """Microseconds of CPU in the broker."""
    transactions: float
    rows: float
    """Rows of the outbox written."""
    wal: float
    """Bytes of write-ahead log."""
    commands: float
    """Commands that the broker executed, those inside scripts included."""


@dataclass(frozen=True)
class _Meter:
    process: float
    postgres: float
    broker: float
    transactions: float
    rows: float
    wal: float
    commands: float


def postgres_cpu(stage: Stage) -> float:
    """Seconds of CPU that PostgreSQL has used so far, with the sessions that have ended."""
    assert stage.postgres.pid is not None
    parent = psutil.Process(stage.postgres.pid)
    ended = sum(parent.cpu_times()[2:4])
    return ended + sum(sum(each.cpu_times()[:2]) for each in [parent, *parent.children()])


async def _read(stage: Stage, connection: Connection, run: Running) -> _Meter:
    assert stage.valkey.pid is not None
    row = await connection.fetchrow(_COUNTERS)
    assert row is not None
    commands = stage.redis.info("commandstats")
    assert isinstance(commands, dict)
    return _Meter(
        process=run.cpu(),
        postgres=postgres_cpu(stage),
        broker=sum(psutil.Process(stage.valkey.pid).cpu_times()[:2]),
        transactions=row["transactions"],
        rows=row["rows"] or 0,
        wal=row["wal"],
        commands=sum(each["calls"] for name, each in commands.items() if not name.endswith(("info", "llen"))),
    )


def _difference(before: _Meter, after: _Meter, events: int) -> Cost:
    spent = {key: (value - getattr(before, key)) / events for key, value in asdict(after).items()}
    return Cost(
        **{key: value * 1e6 if key in ("process", "postgres", "broker") else value for key, value in spent.items()}
    )


async def per_event(stage: Stage, events: int) -> dict[str, Cost]:
    """The cost of publishing through the API, of the relay and of the worker, one after the other."""
    async with stage.database() as database:
        connection = await asyncpg.connect(database)
        costs = {}
        async with api(stage, database) as (run, port):
            await post_all(port, "/order/1", 320)
            before = await _settled(stage, connection, run)
            await post_all(port, "/order/1", events)
            costs["API"] = _difference(before, await _settled(stage, connection, run), events)
        await connection.execute("DELETE FROM outbox_message")
        await connection.execute("VACUUM ANALYZE outbox_message")
        async with stage.relay(database) as run:
            await drained(stage, connection, 2_000)
            await connection.execute("INSERT INTO paused_queue (queue, paused_by) VALUES ('*', 'bench')")
            await connection.execute(INSERT, events * 5)
            before = await _settled(stage, connection, run)
            await connection.execute("DELETE FROM paused_queue")
            await until(lambda: stage.waiting() >= 2_000 + events * 5, timeout=60)
            costs["relay"] = _difference(before, await _settled(stage, connection, run), events * 5)
        async with stage.worker(database) as run:
            await until(lambda: _effects(connection, 2_000), timeout=120)
            before = await _read(stage, connection, run)
            done = await connection.fetchval("SELECT max(id) FROM bench_effect")
            await until(lambda: _effects(connection, done + events), timeout=120)
            now = await connection.fetchval("SELECT max(id) FROM bench_effect")
            costs["worker"] = _difference(before, await _read(stage, connection, run), now - done)
        await connection.close()
        return costs


async def _settled(stage: Stage, connection: Connection, run: Running) -> _Meter:
    """The meters, once PostgreSQL has counted what its sessions did: it does so at most a second later."""
    await asyncio.sleep(1.2)
    return await _read(stage, connection, run)


async def _effects(connection: Connection, expected: int) -> bool:
    newest: int = await connection.fetchval("SELECT coalesce(max(id), 0) FROM bench_effect")
    return newest >= expected


async def idle(stage: Stage, seconds: float) -> dict[str, tuple[float, float]]:
    """(CPU in percent of a core, transactions a minute) of a relay and of a worker that have nothing to do."""
    figures = {}
    for name, process in (("relay", stage.relay), ("worker", stage.worker)):
        async with stage.database() as database, process(database) as run:
            connection = await asyncpg.connect(database)
            await asyncio.sleep(2)
            before = await _read(stage, connection, run)
            await asyncio.sleep(seconds)
            after = await _read(stage, connection, run)
            busy = (after.process - before.process) / seconds * 100
            mine = 2  # of each reading
            figures[name] = busy, (after.transactions - before.transactions - mine) / seconds * 60
            await connection.close()
    return figures


def table(costs: dict[str, Cost]) -> str:
    """As Markdown."""
    lines = ["| | CPU itself | CPU PostgreSQL | CPU broker | transactions | rows written | WAL | broker commands |"]
    lines.append("|---|" + "---:|" * 7)
    for name, cost in costs.items():
        cpu = f"{cost.process:.0f} µs | {cost.postgres:.0f} µs | {cost.broker:.1f} µs"
        lines.append(
            f"| {name} | {cpu} | {cost.transactions:.3g} | {cost.rows:.3g} | {cost.wal:.0f} B | {cost.commands:.3g} |"
        )
    return "\n".join(lines)

"""What the demo breaks. Each fault is aimed, and proves that it hit something in flight; otherwise it tries again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from service.dev.demo.example import HOLD_WORK, QUEUES
from service.dev.demo.stage import Stage, wipe_namespace
from service.dev.places import ServerError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from datetime import datetime

_ATTEMPTS = 8
_AIM_FOR = 10.0

_RUNNING = "SELECT id, claim_token FROM outbox_message WHERE state = 'running'"
_STILL_RUNNING = """
SELECT count(*) FROM outbox_message
JOIN unnest($1::uuid[], $2::uuid[]) AS seen (id, claim_token) USING (id, claim_token) WHERE state = 'running'
"""
# The relay has marked rows as dispatched and not committed yet: it waits for the broker.
_OPEN_BATCHES = """
SELECT pid, xact_start FROM pg_stat_activity
WHERE split_part(application_name, ' ', 1) = 'outbox-relay' AND datname = current_database()
  AND state = 'idle in transaction' AND backend_xid IS NOT NULL
"""


async def _eventually(fault: Callable[[], Awaitable[int]], what: str) -> int:
    for _ in range(_ATTEMPTS):
        if hit := await fault():
            return hit
    raise ServerError(f"{what}: {_ATTEMPTS} attempts found nothing in flight, so the demo would prove nothing")


@asynccontextmanager
async def _work_held(stage: Stage) -> AsyncIterator[None]:
    """Let consumers wait for a lock: on a fast machine hardly anything would be in flight to be hit."""
    async with stage.database.acquire() as connection, connection.transaction():
        await connection.execute(HOLD_WORK)
        yield


async def kill_worker(stage: Stage, name: str) -> int:
    """SIGKILL a worker while consumers run in it, and start it again.

    Returns:
        The deliveries that died with it.
    """
    return await _eventually(lambda: _kill_worker_once(stage, name), "killing a worker at work")


async def _kill_worker_once(stage: Stage, name: str) -> int:
    process = stage.processes[name]
    deadline = time.monotonic() + _AIM_FOR
    async with _work_held(stage):
        while len(await stage.database.fetch(_RUNNING)) < 12 and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        process.kill()
        seen = await stage.database.fetch(_RUNNING)
    # Whatever the other worker runs is done by then; what is still running under the same claim died.
    await asyncio.sleep(1)
    died = await stage.database.fetchval(
        _STILL_RUNNING, [row["id"] for row in seen], [row["claim_token"] for row in seen]
    )
    process.start()
    return int(died)


async def kill_relay(stage: Stage, name: str) -> int:
    """SIGKILL a relay between marking a batch and committing it, and start it again.

    Returns:
        1: the batch that PostgreSQL rolled back.
    """
    return await _eventually(lambda: _kill_relay_once(stage, name), "killing a relay in mid-batch")


async def _kill_relay_once(stage: Stage, name: str) -> int:
    process = stage.processes[name]
    pid = process.pid
    if pid is None:
        raise ServerError(f"{name} ended by itself")
    deadline = time.monotonic() + _AIM_FOR
    while time.monotonic() < deadline:
        os.kill(pid, signal.SIGSTOP)
        if batch := await _frozen_batch(stage):
            process.kill()
            process.start()
            await _until_rolled_back(stage, batch)
            return 1
        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(0.004)
    return 0


async def _frozen_batch(stage: Stage) -> tuple[int, datetime] | None:
    """The open batch of the relay that was just stopped; another relay's would be over a moment later."""
    before = {tuple(row) for row in await stage.database.fetch(_OPEN_BATCHES)}
    if not before:
        return None
    await asyncio.sleep(0.1)
    frozen = before & {tuple(row) for row in await stage.database.fetch(_OPEN_BATCHES)}
    return min(frozen, default=None)


async def _until_rolled_back(stage: Stage, batch: tuple[int, datetime]) -> None:
    deadline = time.monotonic() + _AIM_FOR
    while batch in {tuple(row) for row in await stage.database.fetch(_OPEN_BATCHES)}:
        if time.monotonic() > deadline:
            raise ServerError("PostgreSQL did not notice that the relay is gone")
        await asyncio.sleep(0.01)


async def wipe_broker(stage: Stage) -> int:
    """Wipe the broker while messages wait in it.

    Returns:
        The waiting messages that were lost.
    """

    async def wipe() -> int:
        async with _work_held(stage):
            return await _wipe_broker_once(stage)

    return await _eventually(wipe, "wiping the broker")


async def _wipe_broker_once(stage: Stage) -> int:
    queues = [f"{stage.namespace}:{queue}" for queue in QUEUES]
    deadline = time.monotonic() + _AIM_FOR
    while time.monotonic() < deadline:
        # Counted and wiped in one transaction of the broker, so the count is what was lost.
        if sum([await stage.broker.llen(queue) for queue in queues]) < 5:
            await asyncio.sleep(0.005)
            continue
        async with stage.broker.pipeline(transaction=True) as pipeline:
            for queue in queues:
                pipeline.llen(queue)
            if stage.own_broker:
                pipeline.flushall()
            else:
                pipeline.delete(*queues, *(f"{queue}.msgs" for queue in queues))
            lengths = await pipeline.execute()
        if not stage.own_broker:
            await wipe_namespace(stage.broker, stage.namespace)
        return int(sum(lengths[: len(queues)]))
    return 0

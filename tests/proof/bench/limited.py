"""What a turn of a limited queue costs, however much is due: with one delivery handed over, and without room."""

from __future__ import annotations

import time
from datetime import timedelta
from statistics import median
from typing import TYPE_CHECKING
from uuid import uuid4

from relay.process.relay_session import SESSION
from service.database.driver import bound_waits, connect
from service.ledger import delivering, limiting
from service.ledger.dispatching import NO_FLOOR, Pauses
from service.ledger.limited_dispatching import take_limited
from tests.proof.bench.stage import INSERT

if TYPE_CHECKING:
    from tests.proof.bench.stage import Stage

__all__ = ["turns"]

_PAUSES = Pauses(timedelta(seconds=60), timedelta(seconds=1), timedelta(seconds=60))
_QUEUE = "SELECT queue FROM outbox_message LIMIT 1"
_WAITING = "SELECT waiting[1] FROM limited_queue"
_LEASE = timedelta(seconds=30)


async def turns(stage: Stage, due: int, count: int) -> tuple[float, float]:
    """Milliseconds of a turn that hands one over, and of one without room; the median of `count` each."""
    async with stage.database() as database:
        settings = stage.settings(database).database
        worker = await connect(settings, "bench-worker")
        await worker.execute(INSERT, due, timeout=600)
        queue = await worker.fetchval(_QUEUE)
        await limiting.limit(worker, queue, 4, None, None, by="bench", why=None)
        relay = await connect(settings, "bench-relay")
        await bound_waits(relay, **SESSION)
        took: dict[bool, list[float]] = {True: [], False: []}
        while min(map(len, took.values())) < count:
            began = time.perf_counter()
            async with relay.transaction():
                turn = await take_limited(relay, queue, NO_FLOOR, 500, _PAUSES, expired_leases=True)
            took[turn.batch is not None].append((time.perf_counter() - began) * 1000)
            if turn.batch is None:
                claimed = await delivering.claim(worker, await worker.fetchval(_WAITING), uuid4(), _LEASE)
                assert claimed is not None
                await delivering.complete(worker, claimed)
        await relay.close()
        await worker.close()
    return median(took[True]), median(took[False])

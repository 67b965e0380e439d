"""The relay process: hands every row that is due to the broker, for as long as it runs.

What must stay true: a row is marked as dispatched and handed over in one transaction, so what the broker did not take
stays due. A failure of the broker or of PostgreSQL counts against no event; the relay rolls back, waits with backoff
and goes on by itself. Any number of relays may run: they skip each other's rows.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import asyncpg

from relay.ledger import NO_FLOOR, Batch, Floor, QueueHead, queue_heads, recover_lost, take_due
from relay.publisher import BrokerUnavailableError, Publisher, QueueRefusedError, make_publisher
from relay.purge import purge
from relay.sparing import Sparing
from relay.wakeup import SHORTEST_SLEEP, Wakeup
from service.driver import DRIVER_ERRORS, bound_waits, driver_arguments
from service.errors import ConfigurationError
from service.outbox.failures import backoff
from service.telemetry import configure_logging, get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.settings import Settings

__all__ = ["Relay", "run"]

_log = get_logger(__name__)

_LONGEST_SLEEP = 15.0
"""Seconds. A lease or a pause may have begun since the relay looked."""

_SESSION = {
    "plan_cache_mode": "force_custom_plan",
    "jit": "off",
    # Rows come in the index's order, whatever the statistics say: any other plan sorts the backlog for each batch.
    "enable_sort": "off",
    # Ends the session of a relay that is stopped or gone while it holds the sleeper's lock.
    "idle_session_timeout": f"{int(_LONGEST_SLEEP * 4)}s",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}

_PURGE_EVERY = 60.0
"""Seconds between purges."""


@contextmanager
def _migrated() -> Iterator[None]:
    try:
        yield
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedFunctionError) as error:
        raise ConfigurationError("the database is not migrated: run `alembic upgrade heads`") from error


class _Queue:
    """What the relay remembers of a queue between its rounds."""

    def __init__(self) -> None:
        self.floor: Floor = NO_FLOOR
        self.depth = 0
        self.refused = 0
        self.blocked_until = 0.0


class Relay:
    """One relay. `run` until `stop`."""

    def __init__(self, settings: Settings, publisher: Publisher | None = None) -> None:
        self._settings = settings
        self._outbox = settings.outbox
        self._publisher = publisher or make_publisher(settings.broker)
        self._stopping = asyncio.Event()
        self._wakeup: Wakeup | None = None
        self._was_told = False
        self._queues: dict[str, _Queue] = {}
        self._heads: list[QueueHead] = []
        self._looked_at = 0.0
        self._serving_since = float("inf")
        self._sparing = Sparing(settings.outbox.lease)

    def stop(self) -> None:
        """Finish the batch at hand and end."""
        self._stopping.set()
        if self._wakeup is not None:
            self._wakeup.wake()

    async def run(self) -> None:
        """Serve until stopped; an outage of PostgreSQL or of the broker is waited out."""
        attempt = 0
        try:
            while not self._stopping.is_set():
                self._serving_since = float("inf")
                try:
                    await self._serve()
                except DRIVER_ERRORS as error:
                    attempt = 1 if self._now() - self._serving_since > 1 else attempt + 1
                    pause = backoff(attempt, 100, 5_000).total_seconds()
                    reason = f"{type(error).__name__}: {error}"[:200]
                    _log.warning("relay.database_unavailable", error=reason, retry_in=round(pause, 2))
                    await self._pause(pause)
        finally:
            await self._publisher.close()

    async def _serve(self) -> None:
        direct = self._settings.database.model_copy(update={"pooler": False})
        arguments = driver_arguments(direct, "outbox-relay")
        connection = await asyncpg.connect(**arguments)
        try:
            wakeup = Wakeup(connection)
            await self._prove(wakeup, arguments)
            await bound_waits(connection, **_SESSION)
            with _migrated():
                await queue_heads(connection)
            self._serving_since = self._now()
            self._sparing.connected(self._serving_since)
            self._queues.clear()
            self._wakeup = wakeup
            _log.info("relay.started")
            await self._rounds(connection, wakeup)
        finally:
            self._wakeup = None
            with suppress(*DRIVER_ERRORS):
                await connection.close(timeout=2)

    async def _prove(self, wakeup: Wakeup, arguments: dict[str, Any]) -> None:
        """Make sure that notifications arrive. Where they once did, it is no wrong setting when they do not."""
        notifier = await asyncpg.connect(**arguments)
        try:
            await wakeup.open(notifier)
        except ConfigurationError as error:
            if self._was_told:
                raise ConnectionError("notifications do not arrive any more") from error
            raise
        finally:
            await notifier.close(timeout=2)
        self._was_told = True

    async def _rounds(self, connection: asyncpg.Connection[asyncpg.Record], wakeup: Wakeup) -> None:
        moved = 0
        while not self._stopping.is_set():
            looked = not moved or self._now() - self._looked_at >= 1
            if looked:
                await self._look(connection)
            try:
                moved = await self._round(connection)
            except BrokerUnavailableError as error:
                await self._wait_for_broker(connection, error)
                continue
            if moved or not looked:
                continue  # what was seen before the last batch does not tell what is due now
            if self._due_in() <= 0:
                # Due, but locked by somebody, in a full or refused queue, or spared: look again soon.
                await self._pause(SHORTEST_SLEEP)
            else:
                await wakeup.sleep(lambda: self._look(connection), min(_LONGEST_SLEEP, self._outbox.lease / 2))

    async def _look(self, connection: asyncpg.Connection[asyncpg.Record]) -> float:
        """See which queues have open rows, recover lost ones, and let the next scans begin without a floor."""
        self._heads = [head for head in await queue_heads(connection) if not head.paused]
        self._looked_at = self._now()
        self._sparing.heard(self._looked_at)
        for head in self._heads:
            self._queues.setdefault(head.queue, _Queue()).floor = NO_FLOOR
            if head.due_in <= 0 and not self._sparing.active(self._now()):
                await self._recover(connection, head.queue)
        return self._due_in()

    async def _recover(self, connection: asyncpg.Connection[asyncpg.Record], queue: str) -> None:
        shortest = timedelta(milliseconds=self._outbox.min_backoff)
        longest = timedelta(milliseconds=self._outbox.max_backoff)
        recovered = await recover_lost(connection, queue, self._outbox.batch_size, shortest, longest)
        if recovered:
            _log.warning("relay.workers_lost", queue=queue, messages=recovered)

    async def _round(self, connection: asyncpg.Connection[asyncpg.Record]) -> int:
        """Give each queue one batch; how many rows were handed over."""
        moved = 0
        for head in self._heads:
            if not self._stopping.is_set():
                moved += await self._dispatch(connection, head.queue, self._queues[head.queue])
        return moved

    async def _dispatch(self, connection: asyncpg.Connection[asyncpg.Record], name: str, queue: _Queue) -> int:
        limit = await self._room(name, queue)
        if limit <= 0:
            return 0
        try:
            async with connection.transaction():
                batch = await self._take(connection, name, queue, limit)
                if batch is None:
                    return 0
                queue.depth = await self._publisher.publish(name, batch.rows, uuid4().hex[:16])
        except QueueRefusedError as error:
            queue.refused += 1
            pause = backoff(queue.refused, 250, 5_000).total_seconds()
            queue.blocked_until = self._now() + pause
            _log.warning("relay.queue_refused", queue=name, error=str(error), retry_in=round(pause, 2))
            return 0
        queue.floor, queue.refused = batch.floor, 0
        _log.debug("relay.dispatched", queue=name, messages=len(batch.rows), waiting=queue.depth)
        return len(batch.rows)

    async def _room(self, name: str, queue: _Queue) -> int:
        """How many rows the queue may take now: a backlog waits in PostgreSQL, where it cannot fill the broker."""
        if self._now() < queue.blocked_until:
            return 0
        if queue.depth >= self._outbox.high_water_mark:
            queue.depth = await self._publisher.depth(name)
        return min(self._outbox.batch_size, self._outbox.high_water_mark - queue.depth)

    async def _take(
        self, connection: asyncpg.Connection[asyncpg.Record], name: str, queue: _Queue, limit: int
    ) -> Batch | None:
        floors = (queue.floor, NO_FLOOR) if queue.floor != NO_FLOOR else (NO_FLOOR,)
        redispatch_after = timedelta(seconds=self._outbox.redispatch_after)
        for floor in floors:
            batch = await take_due(
                connection, name, floor, limit, redispatch_after, expired_leases=not self._sparing.active(self._now())
            )
            if batch is not None:
                return batch
        return None

    async def _wait_for_broker(
        self, connection: asyncpg.Connection[asyncpg.Record], error: BrokerUnavailableError
    ) -> None:
        _log.warning("relay.broker_unavailable", error=str(error))
        attempt = 0
        while not self._stopping.is_set():
            attempt += 1
            await self._pause(backoff(attempt, 100, 5_000).total_seconds())
            await connection.execute("SELECT 1")
            self._sparing.heard(self._now())
            try:
                await self._publisher.ping()
            except BrokerUnavailableError:
                continue
            _log.info("relay.broker_back", probes=attempt)
            return

    def _due_in(self) -> float:
        return min((head.due_in for head in self._heads), default=float("inf"))

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


async def run(settings: Settings) -> int:
    """Run a relay until SIGTERM or SIGINT; a second signal does not wait for the batch at hand.

    Returns:
        The exit status.

    Raises:
        ConfigurationError: when the relay cannot work on this database connection.
    """
    configure_logging(settings.log_format, settings.log_level)
    relay = Relay(settings)
    task = asyncio.create_task(relay.run())
    purger = asyncio.create_task(_purge_regularly(settings))
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        _log.info("relay.stopping", signals=signals)
        relay.stop()
        if signals > 1:
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    try:
        with suppress(asyncio.CancelledError):
            await task
    finally:
        purger.cancel()
        await asyncio.wait((purger,), timeout=2)
    _log.info("relay.stopped")
    return 0


async def _purge_regularly(settings: Settings) -> None:
    """Purge once a minute, on a connection that is open no longer than that takes."""
    keep = timedelta(seconds=settings.outbox.keep_completed)
    keep_http_keys = timedelta(seconds=settings.api.keep_idempotency_keys)
    while True:
        await asyncio.sleep(_PURGE_EVERY)
        try:
            connection = await asyncpg.connect(**driver_arguments(settings.database, "outbox-purge"))
            try:
                removed = await purge(connection, keep, keep_http_keys)
            finally:
                await connection.close(timeout=2)
        except DRIVER_ERRORS as error:
            _log.warning("relay.purge_failed", error=type(error).__name__)
        else:
            _log.debug("relay.purged", messages=removed)

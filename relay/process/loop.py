"""The relay process: hands every delivery that is due to the broker, for as long as it runs.

What must stay true: a delivery is marked as dispatched and handed over in one transaction, so what the broker did not
take stays due. A failure of the broker or of PostgreSQL counts against no delivery; the relay rolls back, waits with
backoff and goes on by itself. A queue that takes nothing holds no other up: it is tried again apart from them. Looking
for work never takes most of the time, whatever it costs: each round serves somebody, the queue first that has waited
longest. Any number of relays may run: they skip each other's deliveries.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg

from relay.brokers import make_sender
from relay.brokers.sender import BrokerUnavailableError, QueueRefusedError, Sender
from relay.process.known_queue import KnownQueue
from relay.process.purge import purge_regularly
from relay.process.relay_session import SESSION, Sessions
from relay.process.reporting import Reporting
from relay.process.sparing import Sparing
from relay.process.tally import Tally
from relay.process.wakeup import LONGEST_SLEEP, SHORTEST_SLEEP, Wakeup
from service.backoff import backoff
from service.database.driver import DRIVER_ERRORS, bound_waits
from service.errors import ConfigurationError
from service.ledger.dispatching import NO_FLOOR, Batch, Pauses, QueueHead, due_queues, queue_heads, take_due
from service.ledger.limited_dispatching import take_limited
from service.ledger.sharing import Shares, take_shared
from service.production import check_production
from service.telemetry.logs import brief, configure_logging, get_logger
from service.telemetry.loop_lag import LoopLag
from service.telemetry.probe import SignOfLife

if TYPE_CHECKING:
    from service.database.driver import Connection
    from service.settings import Settings

_log = get_logger(__name__)

_LOOK_EVERY = 1.0
"""Seconds between looks at all queues: a new one is found within that, as is what committed late below a floor."""

_GLANCE_EVERY = 0.02
"""Seconds between looks which of the known queues have something due, while there is something to hand over."""

_LOOKING = 4
"""A look, or a glance, that took long is followed by so many times as long without another."""

_SLOW_LOOK = 1.0
_WARN_EVERY = 60.0
"""A look, or a glance, that takes longer than so many seconds is warned of, so often at most."""

_CONFLICTS = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError)
"""PostgreSQL is well, and asks for another try."""

_PATIENCE = 10.0


class Relay:
    """One relay. `run` until `stop`; `tally` is what it has done."""

    def __init__(self, settings: Settings, sender: Sender | None = None) -> None:
        self._sessions = Sessions(settings.database)
        self._outbox = settings.outbox
        self._pauses = Pauses(
            timedelta(seconds=settings.outbox.redispatch_after),
            timedelta(milliseconds=settings.outbox.min_backoff),
            timedelta(milliseconds=settings.outbox.max_backoff),
        )
        self._sender = sender or make_sender(settings.broker)
        self._stopping = asyncio.Event()
        self._wakeup: Wakeup | None = None
        self._queues: dict[str, KnownQueue] = {}
        self._heads: list[QueueHead] = []
        self._due: list[str] = []
        self._look_at = 0.0
        self._glance_at = 0.0
        self._warn_at = 0.0
        self._serving_since = float("inf")
        self._sparing = Sparing(settings.outbox.lease)
        sign = SignOfLife(settings.probe_folder, "relay") if settings.probe_folder else None
        self._lag = LoopLag(settings.loop_held_after, sign=sign, ready=lambda: self._wakeup is not None)
        self._reporting = Reporting(settings.version, self._lag)
        self.tally = Tally()
        self._trial: asyncio.Task[None] | None = None
        self._tried = ""

    def stop(self) -> None:
        """Finish the batch at hand and end."""
        self._stopping.set()
        if self._wakeup is not None:
            self._wakeup.end()

    def cut(self) -> None:
        """Stop without finishing anything: a transaction that was begun is rolled back, by whoever is still there.

        Cancelling would not do: what is cancelled in a transaction asks PostgreSQL for a ROLLBACK and waits for it.
        """
        self.stop()
        self._sessions.cut()

    async def run(self) -> None:
        """Serve until stopped; an outage of PostgreSQL or of the broker is waited out."""
        self._lag.start()
        try:
            await self._serve_until_stopped()
            if self._trial is not None:
                await asyncio.wait((self._trial,))
        finally:
            if self._trial is not None:
                self._trial.cancel()
                await asyncio.wait((self._trial,), timeout=2)
            await self._sender.close()
            self._lag.stop()

    async def _serve_until_stopped(self) -> None:
        attempt = 0
        while not self._stopping.is_set():
            self._serving_since = float("inf")
            try:
                await self._serve()
            except DRIVER_ERRORS as error:
                attempt = 1 if self._now() - self._serving_since > 1 else attempt + 1
                pause = backoff(attempt, 100, 5_000).total_seconds()
                _log.warning("relay.database_unavailable", error=brief(error), retry_in=round(pause, 2))
                await self._pause(pause)

    async def _serve(self) -> None:
        connection = await self._sessions.connect()
        try:
            wakeup = Wakeup(connection)
            await self._sessions.prove(wakeup)
            await bound_waits(connection, **SESSION)
            try:
                await queue_heads(connection)
            except (asyncpg.UndefinedTableError, asyncpg.UndefinedFunctionError) as error:
                raise ConfigurationError("the database is not migrated: run `alembic upgrade heads`") from error
            self._serving_since = self._now()
            self._sparing.connected(self._serving_since)
            self._wakeup = wakeup
            _log.info("relay.started")
            await self._rounds(connection, wakeup)
            await self._reporting.leave(connection)
        finally:
            self._wakeup = None
            with suppress(*DRIVER_ERRORS):
                await connection.close(timeout=2)

    async def _rounds(self, connection: Connection, wakeup: Wakeup) -> None:
        moved = vain = 0
        while not self._stopping.is_set():
            looked = not moved or self._must_look()
            async with self._reporting.beside(connection):
                if looked:
                    await self._look(connection)
                elif self._now() >= self._glance_at:
                    await self._glance(connection)
            moved = await self._round(connection)
            vain = 0 if moved else vain
            if moved or not looked or self._must_look():
                continue  # what was seen before the last batch or the last wait does not tell what is due now
            if self._due_in() <= 0 or vain > 1:
                # Due, but locked by somebody or spared; or those who write into a full, limited or paused queue wake
                # this relay all the time. Look again soon.
                vain = 0
                await self._pause(self._shortest())
            elif await wakeup.sleep(
                lambda: self._look(connection), min(LONGEST_SLEEP, self._outbox.lease / 2), self._shortest()
            ):
                vain += 1

    def _must_look(self) -> bool:
        return self._now() >= self._look_at

    def _next(self, began: float, every: float) -> float:
        """When to look again after a look that began then and is over now; one that took long is told of."""
        now = self._now()
        if now - began > _SLOW_LOOK and now >= self._warn_at:
            self._warn_at = now + _WARN_EVERY
            _log.warning("relay.slow_look", seconds=round(now - began, 1), queues=len(self._queues))
        return now + max(every, _LOOKING * (now - began))

    async def _look(self, connection: Connection) -> float:
        """See which queues are not empty, and let the next scans begin without a floor; seconds until one is due."""
        began = self._now()
        self._heads = [head for head in await queue_heads(connection) if not head.paused]
        self._sparing.heard(self._now())
        self._due = [head.queue for head in self._heads if head.due_in <= 0]
        for head in self._heads:
            known = self._queues.setdefault(head.queue, KnownQueue())
            known.floor, known.limited = NO_FLOOR, head.limited
            known.shares = (known.shares or Shares(head.queue)) if head.shared else None
            if known.shares is not None:
                await known.shares.look(connection)
        self._look_at = self._next(began, _LOOK_EVERY)
        return self._due_in()

    async def _glance(self, connection: Connection) -> None:
        """See which of the known queues have something due: one that was empty must not wait for the next look."""
        began = self._now()
        self._due = await due_queues(connection, {name: known.floor for name, known in self._queues.items()})
        self._glance_at = self._next(began, _GLANCE_EVERY)

    async def _round(self, connection: Connection) -> int:
        """Give each queue one batch, those first that have waited longest; how many deliveries were dealt with.

        A look that is due ends it, but not before it has served somebody.
        """
        self._end_trial()
        moved, served = 0, False
        for name in sorted(self._due, key=lambda name: self._queues[name].served_at):
            if self._stopping.is_set() or (served and self._must_look()):
                break
            known = self._queues[name]
            if known.held_for(self._now()) > 0:
                continue
            if not known.refused:
                moved += await self._give(connection, name, known)
                served = True
            elif self._trial is None and known.rests_for(self._now()) <= 0:
                self._tried = name
                self._trial = asyncio.create_task(self._try_apart(name, known))
        return moved

    async def _give(self, connection: Connection, name: str, known: KnownQueue) -> int:
        """Hand a batch over. If it fails and the broker is well all the same, then the queue is at fault."""
        try:
            return await self._dispatch(connection, name, known)
        except QueueRefusedError as error:
            self._refuse(name, known, error)
        except BrokerUnavailableError as error:
            if await self._wait_for_broker(connection, error) == 1:
                self._refuse(name, known, error)
        return 0

    def _refuse(self, name: str, known: KnownQueue, error: Exception) -> None:
        pause = known.refuse(self._now())
        self.tally.refused[name] += 1
        _log.warning("relay.queue_refused", queue=name, error=str(error), retry_in=round(pause, 2))

    async def _try_apart(self, name: str, known: KnownQueue) -> None:
        """Try a queue that was refused, on a connection of its own: the others go on meanwhile."""
        try:
            connection = await self._sessions.connect("outbox-relay-apart")
            try:
                await bound_waits(connection, **SESSION)
                moved = await self._dispatch(connection, name, known)
            finally:
                await connection.close(timeout=2)
            if not moved and self._is_full(known):
                known.refused = 0  # it is full, and says so
            elif not moved:
                known.rest(self._now())  # another relay is trying it
        except (QueueRefusedError, BrokerUnavailableError) as error:
            self._refuse(name, known, error)
        except DRIVER_ERRORS as error:
            _log.warning("relay.database_unavailable", error=brief(error), retry_in=round(known.rest(self._now()), 2))
        finally:
            self._tried = ""
            if self._wakeup is not None:
                self._wakeup.interrupt()

    def _end_trial(self) -> None:
        if self._trial is not None and self._trial.done():
            trial, self._trial = self._trial, None
            trial.result()

    async def _dispatch(self, connection: Connection, name: str, known: KnownQueue) -> int:
        known.served_at = self._now()
        limit = await self._room(name, known)
        if limit <= 0:
            return 0
        began = self._now()
        try:
            async with connection.transaction():
                batch = await self._take(connection, name, known, limit)
                if batch is None:
                    return 0
                if batch.deliveries:
                    known.depth = await self._sender.hand_over(name, batch.deliveries, uuid4().hex[:16])
        except _CONFLICTS as error:
            _log.warning("relay.conflict", queue=name, error=brief(error))
            return 0
        known.floor, known.refused = batch.floor, 0
        self.tally.add(name, batch, self._now() - began)
        if batch.suspects:
            _log.warning("relay.workers_lost", queue=name, deliveries=batch.suspects)
        _log.debug("relay.dispatched", queue=name, deliveries=len(batch.deliveries), waiting=known.depth)
        return len(batch.deliveries) + batch.suspects

    async def _room(self, name: str, known: KnownQueue) -> int:
        """How many the queue may take now: a backlog waits in PostgreSQL, where it cannot fill the broker."""
        if self._is_full(known):
            known.depth = await self._sender.depth(name)
        return min(self._outbox.batch_size, self._outbox.high_water_mark - known.depth)

    async def _take(self, connection: Connection, name: str, known: KnownQueue, limit: int) -> Batch | None:
        floors = (known.floor, NO_FLOOR) if known.floor != NO_FLOOR else (NO_FLOOR,)
        expired_leases = not self._sparing.active(self._now())
        if known.limited:
            turn = await take_limited(
                connection, name, known.floor, limit, self._pauses, expired_leases=expired_leases, shares=known.shares
            )
            known.hold(self._now(), turn.wait, handed_over=turn.batch is not None)
            return turn.batch
        if known.shares is not None:
            return await take_shared(
                connection, name, known.shares, known.floor, limit, self._pauses, expired_leases=expired_leases
            )
        for floor in floors:
            batch = await take_due(connection, name, floor, limit, self._pauses, expired_leases=expired_leases)
            if batch is not None:
                return batch
        return None

    async def _wait_for_broker(self, connection: Connection, error: BrokerUnavailableError) -> int:
        """Wait until the broker takes messages; how often it was asked."""
        _log.warning("relay.broker_unavailable", error=str(error))
        attempt = 0
        while not self._stopping.is_set():
            attempt += 1
            await self._pause(backoff(attempt, 100, 5_000).total_seconds())
            async with self._reporting.beside(connection):
                await connection.execute("SELECT 1")
            self._sparing.heard(self._now())
            try:
                await self._sender.ping()
            except BrokerUnavailableError:
                continue
            _log.info("relay.broker_back", probes=attempt)
            break
        return attempt

    def _due_in(self) -> float:
        """Seconds until there is something to do, 0 or less if there is now."""
        return min((max(head.due_in, self._rests_for(head.queue)) for head in self._heads), default=float("inf"))

    def _shortest(self) -> float:
        """Seconds to sleep at least."""
        held = (self._queues[head.queue].held_for(self._now()) for head in self._heads)
        return min([SHORTEST_SLEEP, *(each for each in held if each > 0)])

    def _rests_for(self, name: str) -> float:
        if name == self._tried:
            return float("inf")  # the end of its trial ends the sleep
        known = self._queues[name]
        return max(
            known.rests_for(self._now()), known.held_for(self._now()), SHORTEST_SLEEP if self._is_full(known) else 0
        )

    def _is_full(self, known: KnownQueue) -> bool:
        return known.depth >= self._outbox.high_water_mark

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


async def run(settings: Settings) -> int:
    """Run a relay until SIGTERM or SIGINT; the batch at hand has `_PATIENCE` seconds, a second signal gives it none.

    Returns:
        The exit status.

    Raises:
        ConfigurationError: when the relay cannot work on this database connection, or is not safe in production.
    """
    configure_logging(settings.log_format, settings.log_level)
    check_production(settings, "relay")
    relay = Relay(settings)
    task = asyncio.create_task(relay.run())
    purger = asyncio.create_task(purge_regularly(settings, relay.tally))
    signals = 0

    def cut() -> None:
        relay.cut()
        task.cancel()

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        _log.info("relay.stopping", signals=signals)
        relay.stop()
        if signals > 1:
            cut()
        else:
            # A server that has vanished would be waited for much longer.
            asyncio.get_running_loop().call_later(_PATIENCE, cut)

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    try:
        async with AsyncExitStack() as beside:
            if settings.metrics.port:
                from relay.process.relay_metrics import relay_metrics_served

                await beside.enter_async_context(relay_metrics_served(settings, relay.tally))
            with suppress(asyncio.CancelledError):
                await task
    finally:
        purger.cancel()
        await asyncio.wait((purger,), timeout=2)
    _log.info("relay.stopped")
    return 0

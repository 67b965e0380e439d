"""What a relay tells Prometheus: the state of the ledger and of the broker, what workers have run, and its own work.

What must stay true: a scrape is answered in time whatever is down, with what was known before, and the timestamp of
each part tells how old that is; and however often it is scraped, a part is asked for once at a time, and those that
cost more with every open delivery take a twentieth of the time at most.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from relay.brokers import make_sender
from relay.brokers.sender import BrokerUnavailableError, QueueRefusedError
from service.database.driver import DRIVER_ERRORS, open_connection
from service.ledger import counting
from service.ledger.dispatching import queue_heads
from service.ledger.limiting import limited_queues
from service.ledger.pausing import EVERY_QUEUE, paused_queues
from service.ledger.statistics import BOUNDS, OUTCOMES, Histogram, Key, Runs, processes, totals
from service.telemetry.logs import brief, get_logger
from service.telemetry.metrics import Durations, Sample
from service.telemetry.metrics_endpoint import metrics_served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set

    from relay.process.tally import Tally
    from service.database.driver import Connection
    from service.ledger.dispatching import QueueHead
    from service.ledger.statistics import SeenProcess
    from service.settings import Settings

_log = get_logger(__name__)

_PATIENCE = 2.0
"""Seconds that a scrape waits for what it has asked for."""

_ANSWER = 1.5
"""Seconds until a system that is well has answered."""

_KEPT = 15.0
_TIMES_ITS_COST = 20
"""For how long the costly parts are kept: seconds, or so many times as long as they took if that is longer."""

_LONGEST = 60.0
"""Seconds that a part may take."""

_AT_ONCE = 8
"""Queues that the broker is asked about at the same time."""

_STATES = ("pending", "dispatched", "running")
_COUNTED = {
    "failed": "outbox_retrying_deliveries",
    "unclaimed": "outbox_unclaimed_deliveries",
    "dead": "outbox_dead_letters",
}
_COUNTED_IN_ORDER = {
    "parked": "outbox_parked_deliveries",
    "blocked": "outbox_blocked_lanes",
    "behind": "outbox_blocked_deliveries",
    "blocked_for": "outbox_blocked_seconds",
}
"""Told of consumers that were seen to wait for a turn."""
_DURATIONS = {
    "run": "outbox_run_duration_seconds",
    "start": "outbox_start_latency_seconds",
    "effect": "outbox_effect_latency_seconds",
}


@asynccontextmanager
async def relay_metrics_served(settings: Settings, tally: Tally) -> AsyncIterator[None]:
    """Serve them for as long as the block runs."""
    collector = _Collector(settings, tally)
    try:
        async with metrics_served(settings.metrics.host, settings.metrics.port, collector.collect):
            yield
    finally:
        await collector.close()


class _Part:
    """What is asked for together; the answer stands until the next one."""

    def __init__(self, name: str, ask: Callable[[], Awaitable[list[Sample]]], *, kept: float) -> None:
        self._name = name
        self._ask = ask
        self._kept = kept
        self._again_at = self._answered_at = self._took = 0.0
        self._failed = False
        self._answer: list[Sample] = []
        self.task: asyncio.Task[None] | None = None

    def begin(self) -> asyncio.Task[None] | None:
        """Ask again, if it is time to and nobody does."""
        if (self.task is None or self.task.done()) and time.monotonic() >= self._again_at:
            self.task = asyncio.create_task(self._collect())
            return self.task
        return None

    async def _collect(self) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(_LONGEST):
                self._answer = await self._ask()
            self._answered_at, self._failed = time.time(), False
        except (*DRIVER_ERRORS, BrokerUnavailableError, QueueRefusedError) as error:
            if not self._failed:
                _log.warning("metrics.not_collected", part=self._name, error=brief(error))
            self._failed = True
        finally:
            self._took = time.monotonic() - began
            self._again_at = began + self._took + (max(self._kept, _TIMES_ITS_COST * self._took) if self._kept else 0)

    def samples(self) -> Iterable[Sample]:
        if not self._answered_at:
            return ()
        answered = Sample("outbox_collected_timestamp_seconds", (self._name,), self._answered_at)
        return (*self._answer, answered, Sample("outbox_collect_duration_seconds", (self._name,), self._took))


class _Collector:
    def __init__(self, settings: Settings, tally: Tally) -> None:
        self._settings = settings
        self._tally = tally
        self._connection: Connection | None = None
        self._up = {"postgresql": False, "broker": False}
        # What was there before and is not now counts as 0: a number that vanishes looks like one that stayed.
        self._queues: set[str] = set()
        self._consumers: set[tuple[str, str]] = set()
        self._in_order: set[tuple[str, str]] = set()
        self._parts = (
            _Part("ledger", self._ask_ledger, kept=0),
            _Part("counts", self._ask_counts, kept=_KEPT),
            _Part("broker", self._ask_broker, kept=_KEPT),
        )

    async def collect(self) -> list[Sample]:
        if begun := [task for part in self._parts if (task := part.begin())]:
            await asyncio.wait(begun, timeout=_PATIENCE)
        up = [Sample("outbox_up", (system,), up) for system, up in self._up.items()]
        return [*up, *_done(self._tally), *(each for part in self._parts for each in part.samples())]

    async def close(self) -> None:
        tasks = [part.task for part in self._parts if part.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._connection is not None:
            self._connection.terminate()

    async def _ask_ledger(self) -> list[Sample]:
        self._up["postgresql"] = False
        try:
            async with asyncio.timeout(_ANSWER):
                if self._connection is None:
                    self._connection = await open_connection(self._settings.database, "outbox-metrics")
                await self._connection.execute("SELECT 1")
            self._up["postgresql"] = True
            paused = {pause.queue for pause in await paused_queues(self._connection)}
            limited = {limit.queue for limit in await limited_queues(self._connection)}
            waiting = self._waiting(await queue_heads(self._connection), paused, limited)
            runs = self._runs(await totals(self._connection), await processes(self._connection))
        except BaseException:
            if self._connection is not None:
                self._connection.terminate()
            self._connection = None
            raise
        return [*waiting, *runs]

    def _waiting(self, heads: Sequence[QueueHead], paused: Set[str], limited: Set[str]) -> Iterator[Sample]:
        self._queues |= {head.queue for head in heads} | limited
        due = dict.fromkeys(self._queues, 0.0) | {head.queue: max(-head.due_in, 0.0) for head in heads}
        yield from (Sample("outbox_oldest_due_seconds", (queue,), seconds) for queue, seconds in due.items())
        for name in {*due, *paused, EVERY_QUEUE}:
            yield Sample("outbox_queue_paused", (name,), bool(paused & {name, EVERY_QUEUE}))
        yield from (Sample("outbox_queue_limited", (name,), name in limited) for name in due)

    def _runs(self, counted: Mapping[Key, Runs], alive: Sequence[SeenProcess]) -> Iterator[Sample]:
        for each in alive:
            process = f"{each.kind} {each.host} {each.pid}"
            yield Sample("event_loop_lag_seconds", (process,), each.loop_lag)
            if each.kind == "worker":
                yield Sample("db_pool_timeouts_total", (process,), each.pool_timeouts)
        per_queue = Counter(queue for each in alive if each.kind == "worker" for queue in each.queues)
        for queue in self._queues | per_queue.keys():
            yield Sample("outbox_worker_processes", (queue,), per_queue[queue])
        # An increase shows only from a number that was there before, be it 0.
        consumers = {labels: Runs() for labels in self._consumers}
        for key, counts in counted.items():
            consumers.setdefault((key.queue, key.consumer), Runs()).merge(counts)
        for labels, counts in consumers.items():
            for outcome in OUTCOMES:
                yield Sample("outbox_runs_total", (*labels, outcome), counted.get(Key(*labels, outcome), Runs()).count)
            yield from (Sample(name, labels, _durations(getattr(counts, of))) for of, name in _DURATIONS.items())

    async def _ask_counts(self) -> list[Sample]:
        connection = await open_connection(self._settings.database, "outbox-metrics", command_timeout=_LONGEST)
        try:
            # The time that it takes is what it costs.
            await connection.execute("SET jit = off; SET max_parallel_workers_per_gather = 0")
            counted = await counting.count(connection)
        finally:
            await connection.close(timeout=2)
        self._consumers |= counted.consumers.keys()
        self._in_order |= {labels for labels, of in counted.consumers.items() if of.parked or of.blocked}
        samples = [
            Sample("outbox_relays", (), counted.relays),
            Sample("outbox_stranded_lanes", (), counted.stranded),
        ]
        for labels in self._consumers:
            of = counted.consumers.get(labels, counting.Counts())
            samples += [Sample("outbox_open_deliveries", (*labels, state), getattr(of, state)) for state in _STATES]
            names = _COUNTED | _COUNTED_IN_ORDER if labels in self._in_order else _COUNTED
            samples += [Sample(name, labels, getattr(of, attribute) or 0) for attribute, name in names.items()]
        return samples

    async def _ask_broker(self) -> list[Sample]:
        self._up["broker"] = False
        sender = make_sender(self._settings.broker)
        turn = asyncio.Semaphore(_AT_ONCE)

        async def ask(queue: str) -> tuple[str, int | None]:
            async with turn:
                with suppress(QueueRefusedError):
                    return queue, await sender.inspect(queue)
                return queue, None

        try:
            async with asyncio.timeout(_ANSWER):
                await sender.ping()
            self._up["broker"] = True
            found = await asyncio.gather(*map(ask, self._queues))
        finally:
            await sender.close()
        return [Sample("outbox_broker_queue_messages", (queue,), count) for queue, count in found if count is not None]


def _done(tally: Tally) -> Iterator[Sample]:
    for name in ("handed_over", "redispatched", "refused", "workers_lost"):
        counted: Counter[str] = getattr(tally, name)
        yield from (Sample(f"outbox_relay_{name}_total", (queue,), count) for queue, count in counted.items())
    yield from (Sample("outbox_purged_rows_total", (table,), count) for table, count in tally.purged.items())
    yield Sample("outbox_purge_failures_total", (), tally.purge_failures)
    yield from (
        Sample("outbox_relay_batch_seconds", (queue,), _durations(each)) for queue, each in tally.batches.items()
    )


def _durations(histogram: Histogram) -> Durations:
    return Durations(BOUNDS, tuple(histogram.buckets), histogram.seconds)

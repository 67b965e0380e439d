"""The worker process, under the stock Dramatiq CLI: `dramatiq service.worker:setup_broker`.

Every consumer becomes a Dramatiq actor of its name whose one argument is a delivery's id. What must stay true: an actor
returns whatever happened, so Dramatiq acknowledges and never retries; the ledger alone decides what comes next.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

import dramatiq
from dramatiq.asyncio import EventLoopThread, get_event_loop_thread, set_event_loop_thread
from dramatiq.middleware import (
    AgeLimit,
    AsyncIO,
    Callbacks,
    CurrentMessage,
    Middleware,
    Pipelines,
    Retries,
    ShutdownNotifications,
    TimeLimit,
)
from dramatiq.middleware.threading import Interrupt

import service.domains
from service.database.engine import create_engine, pool_timeouts
from service.ledger.message import OF_LEDGER, delivery_in
from service.ledger.presence import Presence
from service.outbox.consumers import ANY_QUEUE, Consumer, registered_consumers
from service.outbox.running.batches import BatchRunner
from service.outbox.schedules import starting as schedules
from service.production import exit_if_unsafe
from service.settings import Settings, settings_at_start
from service.telemetry.logs import configure_logging, flush_logs, get_logger
from service.telemetry.loop_lag import LoopLag
from service.telemetry.probe import SignOfLife
from service.telemetry.tracing import start_tracing, stop_tracing
from service.worker.batch_worker import BATCH, BatchWorker
from service.worker.dramatiq_broker import declare_unknown, make_broker
from service.worker.loop_worker import ON_LOOP, WorkQueue
from service.worker.watchdog import Watchdog

try:
    import uvloop
except ImportError:  # there is none for Windows
    uvloop = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from uuid import UUID

    from dramatiq.broker import Broker

_log = get_logger(__name__)

_CLOSING = 5
"""Seconds that a stopping worker gives PostgreSQL to close its connections in good order."""


class _Loop(AsyncIO):
    """Dramatiq's event-loop thread, on uvloop where there is one."""

    def before_worker_boot(self, broker: Broker, worker: dramatiq.Worker) -> None:
        thread = EventLoopThread(self.logger)
        if uvloop is not None:
            thread.loop.close()
            thread.loop = uvloop.new_event_loop()
        thread.daemon = True  # or a process that is to end at once would wait for it for ever
        thread.start(timeout=1.0)
        set_event_loop_thread(thread)


class _Limits(TimeLimit):
    """Dramatiq's time limits, but for deliveries: those have theirs from when they are claimed."""

    def before_process_message(self, broker: Broker, message: Any) -> None:
        if not broker.get_actor(message.actor_name).options.get(OF_LEDGER):
            super().before_process_message(broker, message)  # type: ignore[no-untyped-call]


class _Outbox(Middleware):
    """Gives every worker process an engine, a runner and what watches over them, made on its event loop at boot."""

    runner: BatchRunner
    loop_worker: BatchWorker
    watchdog: Watchdog

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.settings = settings.outbox
        self.limits = _Limits()

    def before_worker_boot(self, broker: Broker, worker: dramatiq.Worker) -> None:
        # Dramatiq only logs an exception raised here, and would run a worker that can do nothing.
        try:
            threading.excepthook = _exit_on_dead_thread
            start_tracing("worker", self._settings.version)
            queues = set(broker.get_declared_queues()) & (worker.consumer_whitelist or broker.get_declared_queues())
            _on_loop(self._open(broker, worker, queues))
        except Exception as error:
            _log.exception("worker.boot_failed")
            raise SystemExit(1) from error
        worker.work_queue = WorkQueue(self.loop_worker)
        self.loop_worker.start()

    def after_worker_boot(self, broker: Broker, worker: dramatiq.Worker) -> None:
        worker.workers.append(self.loop_worker)

    async def _open(self, broker: Broker, worker: dramatiq.Worker, queues: set[str]) -> None:
        self._engine = create_engine(self._settings.database, application_name="outbox-worker")
        self.runner = BatchRunner(self._settings, self._engine)
        folder = self._settings.probe_folder
        self._lag = LoopLag(
            self._settings.loop_held_after,
            self.runner.running,
            sign=SignOfLife(folder, "worker") if folder else None,
            ready=lambda: self.runner.is_connected,
        )
        self._lag.start()
        await self.runner.open()

        def waited() -> int:
            return pool_timeouts(self._engine) + self.runner.connections.timeouts

        version, threads = self._settings.version, worker.worker_threads
        presence = Presence("worker", version, self._lag, waited, queues=queues, threads=threads)
        self.runner.report(presence)
        self._schedules = schedules.start(self._engine, presence)
        self.loop_worker = BatchWorker(broker, worker, self.runner, self.settings)
        patience = self.runner.patience
        limits = [patience(spec) for spec in registered_consumers() if spec.is_async]
        self.watchdog = Watchdog(asyncio.get_running_loop(), max(limits, default=patience(None)))
        self.watchdog.start()

    def after_process_message(self, *_: Any, **_results: Any) -> None:
        self.watchdog.ended()

    def before_worker_shutdown(self, broker: Broker, worker: dramatiq.Worker) -> None:
        thread = get_event_loop_thread()
        assert thread is not None
        self.watchdog.stopping()
        thread.loop.call_soon_threadsafe(self.runner.stop)

    def after_worker_shutdown(self, broker: Broker, worker: dramatiq.Worker) -> None:
        try:
            _on_loop(self._close())
        finally:
            self.watchdog.stop()
            stop_tracing()

    async def _close(self) -> None:
        self._lag.stop()
        self._schedules.cancel()
        try:
            async with asyncio.timeout(_CLOSING):
                await self.runner.close()
                await self._engine.dispose()
        except TimeoutError:
            # PostgreSQL stands still. The connections end with the process.
            _log.warning("worker.connections_not_closed")


def _on_loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
    thread = get_event_loop_thread()
    assert thread is not None, "the AsyncIO middleware comes first"
    return thread.run_coroutine(coroutine)


def _exit_on_dead_thread(args: threading.ExceptHookArgs) -> None:
    """End the process when a thread of it dies: Dramatiq would go on without it, and nobody would notice."""
    _log.critical("worker.thread_died", thread=args.thread and args.thread.name, error=repr(args.exc_value))
    flush_logs()
    os._exit(70)


def _deliver(outbox: _Outbox, delivery_id: UUID) -> None:
    """Run one delivery from a worker thread; a `def` consumer runs in this very thread."""
    runner = outbox.runner
    try:
        run = _on_loop(runner.deliver(delivery_id))
        if run is not None:
            stuck = outbox.watchdog.running(f"{run.spec.name} ({run.claim.id})", runner.patience(run.spec))
            runner.run_in_thread(run, outbox.limits, stuck, _on_loop)
    except (Interrupt, RuntimeError, asyncio.CancelledError) as error:
        # A time limit may be raised in the thread just where the run is over. The row comes due when its lease does.
        _log.error("worker.abandoned", delivery_id=str(delivery_id), error=repr(error))


def _declare(broker: Broker, outbox: _Outbox, spec: Consumer, queue: str) -> None:
    def deliver(*args: Any, **_kwargs: Any) -> None:
        delivery_id = delivery_in(args)
        if delivery_id is None:
            # No relay wrote it. An exception would make Dramatiq log all of it, whatever it holds.
            _log.error("worker.odd_message", consumer=spec.name)
            return
        _deliver(outbox, delivery_id)

    for name in (spec.name, *spec.formerly):
        dramatiq.Actor(
            deliver,
            broker=broker,
            actor_name=name,
            queue_name=queue,
            priority=spec.priority,
            options={OF_LEDGER: True, ON_LOOP: spec.is_async, BATCH: spec.batch, "max_retries": 0},
        )


def setup_broker() -> None:
    """Make the broker from the settings and declare every consumer on it."""
    settings = settings_at_start("worker", service.domains.check_settings)
    configure_logging(settings.log_format, settings.log_level)
    exit_if_unsafe(settings, "worker")
    service.domains.discover()
    dramatiq.set_broker(build(settings))


def build(settings: Settings) -> Broker:
    """A broker with every registered consumer as an actor."""
    outbox = _Outbox(settings)
    # `before_*` hooks run in this order, `after_*` hooks in reverse: the loop is there before and after the runner.
    middleware = [
        _Loop(), outbox, AgeLimit(), outbox.limits, ShutdownNotifications(), Callbacks(), Pipelines(), Retries(),
        CurrentMessage(),
    ]  # fmt: skip
    broker = make_broker(settings.broker, middleware, settings.outbox.concurrency)
    consumers = registered_consumers()
    # An actor runs what comes from any queue, so one that has none of its own belongs to one that is there anyway.
    home = next((spec.queue for spec in consumers if spec.queue != ANY_QUEUE), None)
    if home is not None:
        for spec in consumers:
            _declare(broker, outbox, spec, home if spec.queue == ANY_QUEUE else spec.queue)
        declare_unknown(broker, lambda delivery_id: _deliver(outbox, delivery_id), home)
    return broker

"""Runs the deliveries of one worker process: from the id in a broker message to a settled delivery.

What must stay true: a message may be acknowledged whatever happens here, since the delivery comes due again by itself.
So nothing is raised into Dramatiq. An outage of PostgreSQL uses up no attempts: a claim waits for it to come back, and
so does what became of a run, for as long as the process lives. The claim's token makes it safe to be late.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID, uuid4

from dramatiq.middleware import Shutdown, TimeLimit, TimeLimitExceeded
from dramatiq.middleware.threading import raise_thread_exception

from service.backoff import backoff
from service.database.driver import CONTENT_ERRORS, DRIVER_ERRORS, connect
from service.database.sessions import OneTransaction, session_factory
from service.errors import DeliveryError, TransactionError
from service.outbox.consumers import Consumer, Fail, Postpone, Retry, consumer_named, registered_consumers
from service.outbox.delivery import Delivery, LeaseLostError, Progress
from service.outbox.events import AnyEvent
from service.outbox.running.claims import Claims
from service.outbox.running.clock import Clock
from service.outbox.running.connections import Connections, Lender
from service.outbox.running.failures import lost_database, said, trace
from service.outbox.running.heartbeat import Heartbeat
from service.outbox.running.ledger_pool import LedgerPool
from service.outbox.running.outcomes import (
    Completed,
    Dead,
    Expired,
    Failed,
    Finished,
    Lost,
    Outcome,
    Released,
    Suspected,
    Unknown,
    Unwritten,
    log_completed,
    log_lost,
    unstorable,
    write,
)
from service.outbox.running.recorder import Recorder
from service.outbox.upcasting import read
from service.telemetry import tracing
from service.telemetry.logs import get_logger, trace_context

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator
    from contextlib import AbstractContextManager

    from sqlalchemy.ext.asyncio import AsyncEngine

    from service.ledger.delivering import Claim
    from service.ledger.presence import Presence
    from service.settings import OutboxSettings, Settings

_log = get_logger(__name__)

_UNSETTLED = 1_000
"""Outcomes that wait for PostgreSQL in this process at most; what is beyond is left to the lease."""

_ONE_TRACE = 900
"""Seconds for which a first attempt belongs to the trace of its event: few viewers show one that goes on for longer."""


class _UnknownConsumerError(Exception):
    """This worker's code knows no such consumer, or not with this event; another deployment may."""


@dataclass(frozen=True, slots=True)
class Run:
    """A consumer's run under a claim."""

    claim: Claim
    spec: Consumer
    delivery: Delivery
    progress: Progress
    clock: Clock
    """Of an `async def`; a `def` consumer has Dramatiq's."""

    def call(self) -> Any:
        """Call the consumer; of an `async def` it is a coroutine that is returned."""
        claim, kind = self.claim, self.spec.class_of(self.claim.event_type)
        assert kind is not None, "it is not run otherwise"
        # What passes an event on must not drop a field that only newer code has.
        event = read(kind, claim.version, claim.document, keep_unknown=self.spec.event is AnyEvent)
        return self.spec.fn(event, self.delivery)


class Runner:
    """Claims, runs and settles deliveries on the worker's event loop. Make it and use it on that loop."""

    def __init__(self, settings: Settings, engine: AsyncEngine) -> None:
        self._settings: OutboxSettings = settings.outbox
        self._lease = timedelta(seconds=settings.outbox.lease)
        self.connections = Connections(engine, session_factory(engine, OneTransaction), settings.database.pool_size)
        self._ledger = LedgerPool(settings)
        beat_on = partial(connect, settings.database, "outbox-worker-heartbeat")
        self._heartbeat = Heartbeat(beat_on, self._lease, transactions=settings.database.pooler)
        self._claims = Claims(self._ledger, self._lease)
        self._recorder = Recorder(self._ledger)
        on_loop = [spec for spec in registered_consumers() if spec.is_async]
        self._on_loop = [name for spec in on_loop for name in (spec.name, *spec.formerly)]
        self._running: dict[asyncio.Task[Any], Claim] = {}
        self._in_threads: dict[int, Claim] = {}
        self._suspect: UUID | None = None
        self._leaving: set[asyncio.Future[None]] = set()
        self._unsettled: dict[UUID, asyncio.Task[None]] = {}
        self._stopping = False
        self._releasing = False

    async def open(self) -> None:
        """Start the heartbeat. PostgreSQL need not be up yet."""
        await self._ledger.open()
        self._heartbeat.start()

    async def close(self) -> None:
        """Write down what is still to be written, and end the heartbeat and the connections."""
        self._stopping = True
        try:
            for claim in list(self._in_threads.values()):
                # Blocked in a call that nothing interrupts; it ends with this process, which is about to end.
                await self.settle(claim, Released())
            if self._unsettled:
                await asyncio.wait(self._unsettled.values())
        finally:
            # Also where the caller's patience is over: a thread that is left may fail while the interpreter exits.
            await asyncio.to_thread(self._heartbeat.stop)
        await self._recorder.stop()
        await self._ledger.close()

    def report(self, presence: Presence) -> None:
        """Tell the ledger from now on what this process runs, and that it does."""
        self._recorder.start(presence, self._count)

    def _count(self) -> int:
        """How many deliveries run."""
        return len(self._running) + len(self._in_threads)

    def running(self, task: asyncio.Task[Any]) -> dict[str, str]:
        """Which delivery this task of the loop runs, for the log; for any thread."""
        claim = self._running.get(task)
        return {} if claim is None else {"consumer": claim.consumer, "delivery_id": str(claim.id)}

    @property
    def is_connected(self) -> bool:
        """Whether PostgreSQL can be reached, as far as the heartbeat knows; for any thread."""
        return self._heartbeat.is_connected

    def stop(self) -> None:
        """Wait for PostgreSQL no longer, and release what still runs when the grace is over. Called on the loop."""
        self._stopping = True
        asyncio.get_running_loop().call_later(self._settings.shutdown_grace, self._release_running)

    def _release_running(self) -> None:
        self._releasing = True
        for task in list(self._running):
            task.cancel()
        for thread in list(self._in_threads):
            raise_thread_exception(thread, Shutdown)

    async def deliver(self, delivery_id: UUID) -> Run | None:
        """Run a delivery to its end; that of a `def` consumer is returned, for `run_in_thread`."""
        run = await self.claim(delivery_id)
        if run is None or not run.spec.is_async:
            return run
        await self.run(run)
        return None

    async def claim(self, delivery_id: UUID, token: UUID | None = None) -> Run | None:
        """Take a delivery that is to be run; `None` if there is nothing to do about it any more.

        Whoever is given a run calls `run`, `run_in_thread` or `release` with it.

        Args:
            delivery_id: Which.
            token: Under which it may have been claimed already, without an answer; else a new one.
        """
        token = token or uuid4()
        claim = await self._claim(delivery_id, token, partial(self._claims.claim, delivery_id, token))
        if claim is None:
            _log.debug("outbox.nothing_to_claim", delivery_id=str(delivery_id))
            return None
        return await self._claimed(claim)

    async def claim_next(self, run: Run) -> Run | None:
        """Take what is next in the lane of a run that `claims_next`, as `claim` does; only what runs on the loop."""
        if not run.progress.claims_next:
            return None
        ended, token = run.claim, uuid4()
        ask = partial(self._claims.claim_next, ended, token, self._on_loop)
        claim = await self._claim(ended.id, token, ask)
        return None if claim is None else await self._claimed(claim)

    async def _claimed(self, claim: Claim) -> Run | None:
        spec = consumer_named(claim.consumer)
        if self._releasing:
            # What has waited for its claim meanwhile; a run begun now would hold up the shutdown.
            await self.settle(claim, Released(delay=timedelta(seconds=1)))
        elif claim.expired:
            await self.settle(claim, Expired())
        elif spec is None or not spec.knows(claim.event_type, claim.version):
            await self.settle(claim, self._unknown(claim, spec))
        elif claim.attempts > self.max_attempts(spec):
            error = RuntimeError("a worker was lost in the last attempt")
            await self.settle(claim, Dead(error, "worker lost"))
        elif claim.suspect and self._suspect is not None:
            await self._avoid(claim)
        else:
            run = self._start(claim, spec)
            if claim.suspect:
                await self._stand_apart(claim)
            return run
        return None

    async def _avoid(self, claim: Claim) -> None:
        """Leave a suspect for later, while another one runs that may kill this process; those in line one by one."""
        delay = timedelta(seconds=0.2 * (1 + len(self._leaving)))
        leaving = asyncio.ensure_future(self.settle(claim, Released(delay=delay)))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)
        await leaving

    async def _stand_apart(self, claim: Claim) -> None:
        """Wait until those are gone that were claimed with this suspect."""
        self._suspect = claim.token
        await asyncio.sleep(0)
        if self._leaving:
            await asyncio.wait(self._leaving)

    async def release(self, run: Run) -> None:
        """Let somebody else have it."""
        await self.settle(run.claim, Released())

    def _start(self, claim: Claim, spec: Consumer) -> Run:
        """Keep the claim's lease alive from now on, and make what the consumer is handed."""
        limit, grace = self.time_limit(spec), self._settings.grace
        longest = limit + timedelta(seconds=grace)
        self._heartbeat.watch(claim.id, claim.token, longest)

        def extend(seconds: float) -> None:
            self._heartbeat.watch(claim.id, claim.token, longest + timedelta(seconds=seconds))

        clock = Clock(limit.total_seconds(), grace, extend)
        lender, progress = Lender(self.connections, clock), Progress()
        delivery = Delivery(
            claim,
            lender,
            lender.connection,
            progress,
            is_async=spec.is_async,
            timeout_ms=int(longest.total_seconds() * 1000),
            last_attempt=claim.attempts >= self.max_attempts(spec),
        )
        return Run(claim, spec, delivery, progress, clock)

    async def _claim(self, delivery_id: UUID, token: UUID, ask: Callable[[], Awaitable[Claim | None]]) -> Claim | None:
        attempt = 0
        try:
            while True:
                try:
                    return await ask()
                except DRIVER_ERRORS as error:
                    attempt += 1
                    _log.warning("outbox.claim_waits", error=type(error).__name__, delivery_id=str(delivery_id))
                    if self._stopping:
                        break
                    await asyncio.sleep(backoff(attempt, 100, 3_000).total_seconds())
        except asyncio.CancelledError:
            self._later(delivery_id, token, partial(self._release_unheard, ask))
            raise
        self._later(delivery_id, token, partial(self._release_unheard, ask))
        return None

    async def _release_unheard(self, ask: Callable[[], Awaitable[Claim | None]]) -> None:
        """Release what nobody waits for any more: it may have been claimed without a reply."""
        claim = await ask()
        if claim is not None:
            await self._write(claim, Released())

    async def run(
        self, run: Run, abandon: Callable[[], None] = lambda: None, may_claim_next: Callable[[], bool] = lambda: False
    ) -> None:
        """Run an `async def` consumer to its end.

        Args:
            run: What `claim` returned.
            abandon: Called when the consumer goes on although it was cancelled at its time limit. Its fence and its
                transaction's timeout end it, and the row comes due when its lease does.
            may_claim_next: Whether the caller will call `claim_next` after this; asked when a delivery of a lane is
                completed.
        """
        if run.spec.order is not None:
            run.progress.may_claim_next = may_claim_next
        run.clock.start(partial(self._abandon, run, abandon))
        task = asyncio.current_task()
        assert task is not None
        with _traced(run.claim):
            self._running[task] = run.claim
            try:
                outcome = await self._run(run)
            finally:
                del self._running[task]  # what is over is not to be cancelled at the end of the grace
            if isinstance(outcome, Finished):
                run.progress.claims_next = run.progress.may_claim_next()
            await self.settle(run.claim, outcome)

    def _abandon(self, run: Run, abandon: Callable[[], None]) -> None:
        _log.error("worker.abandoned", consumer=run.claim.consumer, delivery_id=str(run.claim.id))
        abandon()

    async def _run(self, run: Run) -> Outcome:
        clock = run.clock
        try:
            await run.call()
        except BaseException as error:  # noqa: BLE001  also what would end the loop for every delivery: SystemExit
            if isinstance(error, asyncio.CancelledError) and self._releasing:
                return Lost() if run.progress.lost else Released()
            if clock.expired or isinstance(error, asyncio.CancelledError):
                error = TimeLimitExceeded(f"ran longer than {clock.limit:g} s")
            return self.judge(error, run)
        finally:
            clock.stop()
        return self.returned(run)

    def run_in_thread(
        self,
        run: Run,
        limits: TimeLimit,
        stuck: AbstractContextManager[None],
        on_loop: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """Run a `def` consumer in the calling thread, to its end: for a worker's threads and the test kit's.

        Args:
            run: What `deliver` returned.
            limits: Raises the time limit in this thread.
            stuck: Looks after a consumer that not even this brings back.
            on_loop: Waits for a coroutine on the runner's loop.
        """
        thread, manager = threading.get_ident(), cast("Any", limits.manager)
        with _traced(run.claim):
            manager.add_timeout(thread, self.time_limit(run.spec).total_seconds() * 1000)
            try:
                try:
                    with self._in_thread(run.claim), stuck:
                        run.call()
                    outcome = self.returned(run)
                except BaseException as error:  # noqa: BLE001  the time limit is an exception in this thread
                    outcome = self.judge(error, run)
                on_loop(self.settle(run.claim, outcome))
            finally:
                manager.remove_timeout(thread)
                self._forget(run.claim)

    @contextmanager
    def _in_thread(self, claim: Claim) -> Iterator[None]:
        """While this thread runs a consumer, the end of the grace raises `Shutdown` in it."""
        thread = threading.get_ident()
        self._in_threads[thread] = claim
        try:
            if self._releasing:
                raise Shutdown
            yield
        finally:
            self._in_threads.pop(thread, None)

    def _forget(self, claim: Claim) -> None:
        """The run is over; its lease is kept while its outcome waits for PostgreSQL."""
        if claim.token not in self._unsettled:
            self._heartbeat.forget(claim.id, claim.token)

    def returned(self, run: Run) -> Outcome:
        """What it means that the consumer returned."""
        if run.progress.completed:
            return Completed()
        if run.progress.lost:
            return Lost()
        if run.progress.begun:
            error = DeliveryError(
                "the error that ended its transaction was swallowed: let it out, or return before it begins"
            )
            return self.judge(error, run)
        return Finished()

    def judge(self, error: BaseException, run: Run) -> Outcome:
        """What it means that the consumer raised."""
        claim, spec = run.claim, run.spec
        if run.progress.completed:
            _log.warning("outbox.raised_after_completion", error=type(error).__name__)
            return Completed()
        match error:
            case Shutdown() if self._releasing:
                return Released()
            case LeaseLostError():
                return Lost()
            case _ if run.progress.lost:
                return Lost()
            case Postpone():
                return _postponed(claim, error)
            case Fail() | DeliveryError() | TransactionError():
                return Dead(error, said(error) or "the consumer failed it")
            case _ if spec.throws and isinstance(error, spec.throws):
                return Dead(error, f"{type(error).__name__} is not retried")
            case _ if lost_database(error) and run.progress.unreached:
                # Nothing was executed, so it is never the delivery's doing.
                tries = min(claim.dispatches, 7)
                return Released(error, backoff(tries, self.min_backoff(spec), self.max_backoff(spec)))
            case _ if lost_database(error):
                delay = backoff(1, self.min_backoff(spec), self.max_backoff(spec))
                return Suspected(error, delay, self._charged(error, claim, spec))
            case _:
                return self._charged(error, claim, spec)

    def _charged(self, error: BaseException, claim: Claim, spec: Consumer) -> Failed | Dead:
        if claim.attempts >= self.max_attempts(spec):
            return Dead(error, f"failed {claim.attempts} times")
        if isinstance(error, Retry) and error.delay is not None:
            return Failed(error, timedelta(milliseconds=error.delay))
        return Failed(error, backoff(claim.attempts, self.min_backoff(spec), self.max_backoff(spec)))

    def _unknown(self, claim: Claim, spec: Consumer | None) -> Unknown:
        if spec is None:
            error = _UnknownConsumerError(f"no consumer named {claim.consumer} is deployed")
        elif spec.event is AnyEvent:
            error = _UnknownConsumerError(f"no event {claim.event_type} of version {claim.version} is deployed")
        elif claim.event_type != spec.event_type:
            error = _UnknownConsumerError(
                f"{claim.consumer} consumes {spec.event_type} in this worker, not {claim.event_type}"
            )
        else:
            known = f"{spec.event_type} version {spec.event.event_version}"
            error = _UnknownConsumerError(f"version {claim.version} of the event is newer than this worker's {known}")
        return _postponed(claim, error)

    async def settle(self, claim: Claim, outcome: Outcome) -> None:
        """Write the outcome down. What PostgreSQL does not take at once is written as soon as it does, after this."""
        try:
            await self._write(claim, outcome)
        except (*DRIVER_ERRORS, asyncio.CancelledError) as error:
            self._later(claim.id, claim.token, partial(self._write, claim, outcome))
            if isinstance(error, asyncio.CancelledError):
                raise
        finally:
            self._forget(claim)
            if self._suspect == claim.token:
                self._suspect = None

    def _later(self, delivery_id: UUID, token: UUID, write: Callable[[], Awaitable[None]]) -> None:
        """Go on until it is written, or one lease long from when this worker stops; the lease is kept until then."""

        async def write_at_last() -> None:
            loop = asyncio.get_running_loop()
            longest = min(3_000, int(self._lease.total_seconds() * 250))  # several times while the relay spares leases
            attempt, give_up_at = 0, float("inf")
            try:
                while True:
                    attempt += 1
                    await asyncio.sleep(backoff(attempt, 100, longest).total_seconds())
                    try:
                        return await write()
                    except DRIVER_ERRORS as error:
                        _log.warning("outbox.not_settled", error=type(error).__name__, delivery_id=str(delivery_id))
                    if self._stopping:
                        give_up_at = min(give_up_at, loop.time() + self._lease.total_seconds())
                    if loop.time() >= give_up_at:
                        _log.error("outbox.given_up", delivery_id=str(delivery_id))
                        return None
            finally:
                self._heartbeat.forget(delivery_id, token)

        if len(self._unsettled) >= _UNSETTLED:
            _log.error("outbox.given_up", delivery_id=str(delivery_id))
            self._heartbeat.forget(delivery_id, token)
            return
        task = asyncio.create_task(write_at_last())
        self._unsettled[token] = task
        task.add_done_callback(lambda _: self._unsettled.pop(token, None))

    async def _write(self, claim: Claim, outcome: Outcome) -> None:
        if isinstance(outcome, Lost):
            word = log_lost(claim)
        elif isinstance(outcome, Completed):
            word = log_completed(claim)
        else:
            try:
                word = await self._store(claim, outcome)
            except Exception as error:  # what a consumer raised may do anything when it is asked what it says
                if isinstance(error, DRIVER_ERRORS) and not isinstance(error, CONTENT_ERRORS):
                    raise
                _log.error("outbox.unstorable", delivery_id=str(claim.id), exception=trace(error, claim.payload))
                word = await self._store(claim, unstorable(outcome, error))
        self._recorder.count(claim, word)
        tracing.ran(word, getattr(outcome, "error", None))

    async def _store(self, claim: Claim, outcome: Unwritten) -> str:
        async with self._ledger() as connection:
            return await write(connection, claim, outcome, timedelta(seconds=self._settings.unknown_consumer_after))

    def max_attempts(self, spec: Consumer) -> int:
        """Attempts in all: the first and the retries."""
        return 1 + (self._settings.max_retries if spec.max_retries is None else spec.max_retries)

    def min_backoff(self, spec: Consumer) -> int:
        """Milliseconds before the first retry."""
        return spec.min_backoff or self._settings.min_backoff

    def max_backoff(self, spec: Consumer) -> int:
        """Milliseconds between retries at most."""
        return max(spec.max_backoff or self._settings.max_backoff, self.min_backoff(spec))

    def time_limit(self, spec: Consumer | None) -> timedelta:
        """How long the consumer may run, or one that does not say."""
        return timedelta(milliseconds=(spec and spec.time_limit) or self._settings.time_limit)

    def patience(self, spec: Consumer | None) -> float:
        """Seconds after which a run is stuck: its lease has ended long ago."""
        return self.time_limit(spec).total_seconds() + self._settings.grace + self._settings.lease


def _postponed(claim: Claim, error: BaseException) -> Unknown:
    return Unknown(error, backoff(min(claim.dispatches, 7), 2_000, 120_000))


@contextmanager
def _traced(claim: Claim) -> Iterator[None]:
    """What a run publishes and logs carries the ids of what caused it."""
    delivery_id = str(claim.id)
    apart = claim.attempts > 1 or claim.deferred or claim.waited > _ONE_TRACE
    about: dict[str, str | int] = {
        "messaging.consumer.group.name": claim.consumer,
        "messaging.outbox.queue": claim.queue,
        "messaging.outbox.event_id": str(claim.event_id),
        "messaging.outbox.attempt": claim.attempts,
    }
    headers = claim.headers | {"causation_id": delivery_id}
    with (
        tracing.running(claim.event_type, delivery_id, claim.headers, apart=apart, about=about),
        trace_context(headers, consumer=claim.consumer, delivery_id=delivery_id),
    ):
        yield

"""Runs the deliveries of one worker process: from the id in a broker message to a settled row.

What must stay true: a message may be acknowledged whatever happens here, since the row comes due again by itself.
So nothing is raised into Dramatiq; a failure that cannot be written down is left to the lease. An outage of
PostgreSQL uses up no attempts: a claim waits for it to come back.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import asyncpg
from dramatiq.middleware import TimeLimitExceeded

from service.database import OneTransaction, session_factory
from service.driver import DRIVER_ERRORS, bound_waits, connect, driver_arguments
from service.errors import DeliveryError, TransactionError
from service.outbox import statements
from service.outbox.claims import Claims
from service.outbox.consumers import Consumer, Fail, Retry, consumer_named
from service.outbox.delivery import Delivery, LeaseLostError
from service.outbox.failures import backoff, describe, lost_database
from service.outbox.heartbeat import Heartbeat
from service.telemetry import get_logger, trace_context

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from service.outbox.statements import Claim
    from service.settings import OutboxSettings, Settings

__all__ = ["Runner"]

_log = get_logger(__name__)


class _UnknownConsumerError(Exception):
    """This worker's code knows no such consumer, or not this version of its event; another deployment may."""


@dataclass(frozen=True, slots=True)
class _Completed:
    """The effect and the row's completion are committed."""


@dataclass(frozen=True, slots=True)
class _Lost:
    """The row is somebody else's; the effect was rolled back."""


@dataclass(frozen=True, slots=True)
class _Returned:
    """The consumer came back without `begin()`: its effect is outside, or there was nothing to do."""


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException
    delay: timedelta


@dataclass(frozen=True, slots=True)
class _Dead:
    error: BaseException
    reason: str


@dataclass(frozen=True, slots=True)
class _Released:
    """Not the consumer's fault: the attempt is refunded."""

    error: BaseException | None = None
    delay: timedelta = timedelta()


_Outcome = _Completed | _Lost | _Returned | _Failed | _Dead | _Released


class Runner:
    """Claims, runs and settles deliveries on the worker's event loop. Make it and use it on that loop."""

    def __init__(self, settings: Settings, engine: AsyncEngine) -> None:
        self._settings: OutboxSettings = settings.outbox
        self._lease = timedelta(seconds=settings.outbox.lease)
        self._sessions = session_factory(engine, OneTransaction)
        prepare = None if settings.database.pooler else bound_waits
        arguments = driver_arguments(settings.database, "outbox-worker-ledger")
        self._pool = asyncpg.create_pool(min_size=0, max_size=4, init=prepare, reset=_keep, **arguments)
        self._heartbeat = Heartbeat(lambda: connect(settings.database, "outbox-worker-heartbeat"), self._lease)
        # A pooler in transaction mode may give a statement's second half another server outside a transaction.
        self._transactions = settings.database.pooler
        self._claims = Claims(self._ledger, self._lease)
        self._running: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self._releasing = False

    async def open(self) -> None:
        """Start the heartbeat. PostgreSQL need not be up yet."""
        await self._pool
        self._heartbeat.start()

    async def close(self) -> None:
        """End the heartbeat and the connections."""
        await asyncio.to_thread(self._heartbeat.stop)
        await self._pool.close()

    def stop(self) -> None:
        """Wait for PostgreSQL no longer, and release what still runs when the grace is over. Called on the loop."""
        self._stopping = True
        asyncio.get_running_loop().call_later(self._settings.shutdown_grace, self._release_running)

    def _release_running(self) -> None:
        self._releasing = True
        for task in self._running:
            task.cancel()

    async def deliver(self, message_id: UUID) -> Claim | None:
        """Run the delivery of a row to its end; a claim of a `def` consumer is returned for the caller to run."""
        claim = await self._claim(message_id)
        if claim is None:
            _log.debug("outbox.nothing_to_claim", message_id=str(message_id))
            return None
        spec = consumer_named(claim.consumer)
        if self._releasing:
            # Dramatiq's threads take messages for a moment longer; a run begun now would hold up the shutdown.
            await self.settle(claim, _Released(delay=timedelta(seconds=1)))
        elif spec is None or claim.version > spec.event.event_version:
            await self.settle(claim, self._unknown(claim, spec))
        elif claim.attempts > self.max_attempts(spec):
            error = RuntimeError("a worker was lost in the last attempt")
            await self.settle(claim, _Dead(error, "worker lost"))
        elif not spec.is_async:
            self.watch(claim, spec)
            return claim
        else:
            await self._run_and_settle(claim, spec)
        return None

    @asynccontextmanager
    async def _ledger(self) -> AsyncIterator[statements.Connection]:
        async with self._pool.acquire(timeout=10) as connection:
            if self._transactions:
                async with connection.transaction():
                    yield connection
            else:
                yield connection

    async def _claim(self, message_id: UUID) -> Claim | None:
        token = uuid4()
        attempt = 0
        while True:
            try:
                return await self._claims.claim(message_id, token)
            except DRIVER_ERRORS as error:
                attempt += 1
                _log.warning("outbox.claim_waits", error=type(error).__name__, message_id=str(message_id))
                if self._stopping:
                    return None
                await asyncio.sleep(backoff(attempt, 100, 3_000).total_seconds())

    async def _run_and_settle(self, claim: Claim, spec: Consumer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        self.watch(claim, spec)
        try:
            with trace_context(_headers(claim), consumer=claim.consumer, message_id=str(claim.id)):
                outcome = await self._run(claim, spec)
                await self.settle(claim, outcome)
        finally:
            self._running.discard(task)
            self.forget(claim)

    async def _run(self, claim: Claim, spec: Consumer) -> _Outcome:
        delivery = self.delivery(claim, spec)
        limit = self.time_limit(spec)
        timer = asyncio.timeout(limit.total_seconds())
        try:
            async with timer:
                await spec.fn(spec.event.model_validate(claim.payload), delivery)
        except BaseException as error:  # noqa: BLE001  also what would end the loop for every delivery: SystemExit
            if isinstance(error, asyncio.CancelledError) and self._releasing:
                return _Lost() if delivery.lost else _Released()
            if timer.expired() or isinstance(error, asyncio.CancelledError):
                error = TimeLimitExceeded(f"ran longer than {limit.total_seconds():g} s")
            return self.judge(error, claim, spec, delivery)
        return self.returned(claim, spec, delivery)

    def delivery(self, claim: Claim, spec: Consumer) -> Delivery:
        """What the consumer is handed."""
        longest = self._longest(spec)
        return Delivery(claim, self._sessions, is_async=spec.is_async, timeout_ms=int(longest.total_seconds() * 1000))

    def watch(self, claim: Claim, spec: Consumer) -> None:
        """Keep the claim's lease alive while the consumer runs."""
        self._heartbeat.watch(claim.id, claim.token, self._longest(spec))

    def forget(self, claim: Claim) -> None:
        """The run is over."""
        self._heartbeat.forget(claim.id, claim.token)

    def returned(self, claim: Claim, spec: Consumer, delivery: Delivery) -> _Outcome:
        """What it means that the consumer returned."""
        if delivery.completed:
            return _Completed()
        if delivery.lost:
            return _Lost()
        if delivery.begun:
            error = DeliveryError("the error that ended begin() was swallowed: let it out, or return before begin()")
            return self.judge(error, claim, spec, delivery)
        return _Returned()

    def judge(self, error: BaseException, claim: Claim, spec: Consumer, delivery: Delivery) -> _Outcome:
        """What it means that the consumer raised."""
        if delivery.completed:
            _log.warning("outbox.raised_after_completion", error=type(error).__name__)
            return _Completed()
        delay = backoff(claim.attempts, self.min_backoff(spec), self.max_backoff(spec))
        match error:
            case LeaseLostError():
                return _Lost()
            case _ if delivery.lost:
                return _Lost()
            case Fail():
                return _Dead(error, str(error) or "the consumer failed it")
            case DeliveryError() | TransactionError():
                return _Dead(error, str(error))
            case _ if spec.throws and isinstance(error, spec.throws):
                return _Dead(error, f"{type(error).__name__} is not retried")
            # Refunded once only: what crashes its backend each time must run out of attempts.
            case _ if claim.dispatches < 2 and lost_database(error):
                return _Released(error, delay)
            case _ if claim.attempts >= self.max_attempts(spec):
                return _Dead(error, f"failed {claim.attempts} times")
            case Retry() if error.delay is not None:
                return _Failed(error, timedelta(milliseconds=error.delay))
            case _:
                return _Failed(error, delay)

    def _unknown(self, claim: Claim, spec: Consumer | None) -> _Released:
        if spec is None:
            error = _UnknownConsumerError(f"no consumer named {claim.consumer} is deployed")
        else:
            known = f"{spec.event.event_type} version {spec.event.event_version}"
            error = _UnknownConsumerError(f"version {claim.version} of the event is newer than this worker's {known}")
        return _Released(error, backoff(min(claim.dispatches, 7), 2_000, 120_000))

    async def settle(self, claim: Claim, outcome: _Outcome) -> None:
        """Write the outcome down; while PostgreSQL is away, for as long as the lease lasts."""
        if isinstance(outcome, _Completed):
            return
        give_up_at = asyncio.get_running_loop().time() + self._lease.total_seconds()
        attempt = 0
        while True:
            try:
                async with self._ledger() as connection:
                    await self._apply(connection, claim, outcome)
            except DRIVER_ERRORS as error:
                attempt += 1
                pause = backoff(attempt, 100, 3_000).total_seconds()
                if asyncio.get_running_loop().time() + pause > give_up_at:
                    _log.error("outbox.not_settled", error=type(error).__name__, outcome=type(outcome).__name__)
                    return
                await asyncio.sleep(pause)
            else:
                return

    async def _apply(self, connection: statements.Connection, claim: Claim, outcome: _Outcome) -> None:
        match outcome:
            case _Lost():
                _log.warning("outbox.lease_lost", consumer=claim.consumer, message_id=str(claim.id))
            case _Returned():
                if not await statements.complete(connection, claim):
                    _log.warning("outbox.lease_lost", consumer=claim.consumer, message_id=str(claim.id))
            case _Failed(error, delay):
                await statements.fail(connection, claim, describe(error, claim.payload), delay)
                _log.warning("outbox.failed", attempt=claim.attempts, retry_in=delay.total_seconds(), **_shown(error))
            case _Dead(error, reason):
                number = await statements.die(connection, claim, describe(error, claim.payload), reason[:500])
                _log.error(
                    "outbox.dead_lettered", dead_letter=number, reason=reason, attempt=claim.attempts, **_shown(error)
                )
            case _Released(error, delay):
                await self._apply_release(connection, claim, error, delay)

    async def _apply_release(
        self, connection: statements.Connection, claim: Claim, error: BaseException | None, delay: timedelta
    ) -> None:
        document = None if error is None else describe(error, claim.payload)
        patience = timedelta(seconds=self._settings.unknown_consumer_after)
        overdue = await statements.release(connection, claim, error=document, delay=delay, patience=patience)
        _log.info("outbox.released", consumer=claim.consumer, error=None if error is None else type(error).__name__)
        if overdue and isinstance(error, _UnknownConsumerError):
            assert document is not None
            await statements.die(connection, claim, document, str(error), states=("pending",))

    def max_attempts(self, spec: Consumer) -> int:
        """Attempts in all: the first and the retries."""
        return 1 + (self._settings.max_retries if spec.max_retries is None else spec.max_retries)

    def min_backoff(self, spec: Consumer) -> int:
        """Milliseconds before the first retry."""
        return spec.min_backoff or self._settings.min_backoff

    def max_backoff(self, spec: Consumer) -> int:
        """Milliseconds between retries at most."""
        return max(spec.max_backoff or self._settings.max_backoff, self.min_backoff(spec))

    def time_limit(self, spec: Consumer) -> timedelta:
        """How long the consumer may run."""
        return timedelta(milliseconds=spec.time_limit or self._settings.time_limit)

    def _longest(self, spec: Consumer) -> timedelta:
        return self.time_limit(spec) + timedelta(seconds=self._settings.grace)


def _headers(claim: Claim) -> dict[str, str]:
    return claim.headers | {"causation_id": str(claim.id)}


def _shown(error: BaseException) -> dict[str, Any]:
    """How a failure is logged: what a consumer raised to steer needs no traceback."""
    return {"error": type(error).__name__, "exc_info": None if isinstance(error, Retry | Fail) else error}


async def _keep(_connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Nothing of the session is ever changed, so there is nothing to reset."""

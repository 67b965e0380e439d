"""Runs of batch consumers: many deliveries at once, each of which may still be settled alone.

A batch that fails as a whole is undone, and run again as two halves, until what fails is one delivery: that one alone
is charged with the attempt. So nobody pays for a neighbour, and one failure in a hundred costs fifteen transactions
instead of a hundred.

What must stay true: a delivery is run again only when nothing of its effect can be there; halves run at the same time,
so that a batch which is slow as a whole takes a few time limits and not hundreds; and the leases are kept until the
last half is settled.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from service.database.driver import DRIVER_ERRORS
from service.errors import DeliveryError, TransactionError
from service.ledger import batch_claims
from service.outbox.consumers import consumer_named
from service.outbox.deliveries import Deliveries
from service.outbox.delivery import Progress
from service.outbox.running.clock import Clock
from service.outbox.running.connections import Lender
from service.outbox.running.outcomes import Completed, Dead, Failed, Finished, Lost, Released, Suspected, Unknown
from service.outbox.running.runner import Run, Runner
from service.outbox.upcasting import read
from service.telemetry import tracing
from service.telemetry.logs import get_logger, trace_context

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from uuid import UUID

    from service.ledger.delivering import Claim
    from service.outbox.consumers import Consumer
    from service.outbox.running.outcomes import Outcome

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ClaimedBatch:
    """Deliveries of one consumer that were claimed together."""

    spec: Consumer
    claims: Sequence[Claim]


@dataclass(frozen=True, slots=True)
class _BatchRun(Run):
    """A run of a batch consumer; `claim` is the first of its claims."""

    claims: Sequence[Claim]
    deliveries: Deliveries

    def call(self) -> Any:
        events = [read(self.spec.event, each.version, each.document) for each in self.claims]
        return self.spec.fn(events, self.deliveries)


class BatchRunner(Runner):
    """A runner that knows batch consumers too."""

    _more = 0
    """Deliveries that run beside the first ones of their batches."""

    async def claim_together(self, consumer: str, asked: Mapping[UUID, UUID]) -> ClaimedBatch | None:
        """Take those deliveries that can run together. Each of the others is to be claimed alone, under its token.

        Args:
            consumer: As their messages name it.
            asked: Their tokens, by ID.
        """
        spec = consumer_named(consumer)
        if spec is None or spec.batch is None or len(asked) == 1:
            return None
        try:
            async with self._claims.waiting() as connection:
                claims = await batch_claims.claim(
                    connection,
                    list(asked.items()),
                    self._lease,
                    consumer=(spec.name, *spec.formerly),
                    event_type=spec.event_type,
                    version=spec.event.event_version,
                )
        except DRIVER_ERRORS as error:
            _log.warning("outbox.claim_waits", error=type(error).__name__, deliveries=len(asked))
            return None
        return ClaimedBatch(spec, sorted(claims, key=lambda claim: claim.id.bytes)) if claims else None

    async def run_together(self, batch: ClaimedBatch, abandon: Callable[[], None] = lambda: None) -> None:
        """Run a batch to the end of all its deliveries; see `run`."""
        spec, claims = batch.spec, batch.claims
        if self._releasing:
            await self._settle_each(claims, Released(delay=timedelta(seconds=1)))
            return
        run = self._start_together(spec, claims)
        if len(claims) == 1:
            await self.run(run, abandon)
            return
        run.clock.start(partial(self._abandon, run, abandon))
        task = asyncio.current_task()
        assert task is not None
        with _traced(run):
            self._running[task] = run.claim
            self._more += len(claims) - 1
            try:
                outcome = await self._run(run)
            finally:
                del self._running[task]
                self._more -= len(claims) - 1
            again = await self._settle_all(run, outcome)
        await asyncio.gather(*(self.run_together(ClaimedBatch(spec, part), abandon) for part in again))

    def _count(self) -> int:
        return super()._count() + self._more

    def _start(self, claim: Claim, spec: Consumer) -> Run:
        return super()._start(claim, spec) if spec.batch is None else self._start_together(spec, [claim])

    def _start_together(self, spec: Consumer, claims: Sequence[Claim]) -> _BatchRun:
        limit, grace = self.time_limit(spec), self._settings.grace
        longest = limit + timedelta(seconds=grace)
        # A half begins when all of the batch has failed, and its leases are counted from the claim.
        spent = timedelta(seconds=time.perf_counter() - claims[0].began)

        def extend(seconds: float) -> None:
            for each in claims:
                self._heartbeat.watch(each.id, each.token, spent + longest + timedelta(seconds=seconds))

        extend(0)
        clock = Clock(limit.total_seconds(), grace, extend)
        lender, progress = Lender(self.connections, clock), Progress()
        deliveries = Deliveries(
            claims,
            lender,
            lender.connection,
            progress,
            timeout_ms=int(longest.total_seconds() * 1000),
            last_attempt=claims[0].attempts >= self.max_attempts(spec),
        )
        return _BatchRun(claims[0], spec, deliveries[0], progress, clock, claims, deliveries)

    def returned(self, run: Run) -> Outcome:
        outcome = super().returned(run)
        if isinstance(outcome, Dead) and isinstance(run, _BatchRun):
            # An error was swallowed that may be one delivery's. Nothing was committed.
            return Failed(outcome.error, timedelta()) if len(run.claims) > 1 else outcome
        return outcome

    async def _settle_all(self, run: _BatchRun, outcome: Outcome) -> list[Sequence[Claim]]:
        """Write down what became of them; the parts of the batch that are to be run again."""
        claims, missing = run.claims, run.deliveries.missing
        match outcome:
            case Completed():
                self._completed(claims)
            case Finished():
                await self._finish(claims)
            case Lost() if missing:
                await self._settle_each([each for each in claims if each.id in missing], outcome)
                left = [each for each in claims if each.id not in missing]
                return [left] if left else []
            case Suspected(error, delay, _):
                forgiven = (Suspected(error, delay, self._charged(error, each, run.spec)) for each in claims)
                await asyncio.gather(*map(self.settle, claims, forgiven))
            case Lost() | Released():
                await self._settle_each(claims, outcome)
            case Dead(DeliveryError() | TransactionError(), _):
                # A part of the effect may be committed, so that none of them may be run again.
                await self._settle_each(claims, outcome)
            case Failed(error, _) | Dead(error, _) | Unknown(error, _):
                _log.warning("outbox.batch_undone", deliveries=len(claims), error=type(error).__name__)
                tracing.ran("failed", error)
                half = len(claims) // 2
                return [claims[:half], claims[half:]]
        return []

    async def _settle_each(self, claims: Sequence[Claim], outcome: Outcome) -> None:
        await asyncio.gather(*(self.settle(each, outcome) for each in claims))

    async def _finish(self, claims: Sequence[Claim]) -> None:
        """Tick those off whose effect is outside the database."""
        try:
            async with self._ledger() as connection:
                mine = await batch_claims.complete(connection, claims)
        except DRIVER_ERRORS:
            await self._settle_each(claims, Finished())
            return
        self._completed([each for each in claims if each.id in mine])
        await self._settle_each([each for each in claims if each.id not in mine], Lost())

    def _completed(self, claims: Sequence[Claim]) -> None:
        """One line tells it of all: a line for each would cost as much as all the rest."""
        if not claims:
            return
        ran = round((time.perf_counter() - claims[0].began) * 1000, 1)
        _log.info("outbox.batch_completed", deliveries=len(claims), duration_ms=ran)
        for each in claims:
            self._recorder.count(each, "completed")
            self._forget(each)
        tracing.ran("completed", None)


@contextmanager
def _traced(run: _BatchRun) -> Iterator[None]:
    """What a batch publishes has many causes, and belongs to their conversation if it is the same one."""
    correlations = {each.headers.get("correlation_id") for each in run.claims}
    correlation = correlations.pop() if len(correlations) == 1 else None
    about: dict[str, str | int] = {
        "messaging.consumer.group.name": run.claim.consumer,
        "messaging.outbox.queue": run.claim.queue,
    }
    with (
        tracing.running_together(run.claim.event_type, [each.headers for each in run.claims], about),
        trace_context({"correlation_id": correlation or str(uuid4())}, consumer=run.spec.name),
    ):
        yield

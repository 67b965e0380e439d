"""Test kit: see what was published, and run consumers on the real database without a broker.

    await assert_published(session, OrderPlaced, order_id=order.id)

    async with inline_worker(settings, engine) as worker:
        assert await worker.deliver_all() == ["orders.reserve_stock", "orders.send_confirmation"]
        assert await worker.travel(timedelta(days=7)) == ["orders.send_report"] * 7

What must stay true: nothing here stands in for anything. Consumers go through the worker's own `Runner`, with its
claims, fences and retries, on the database they will have; only the relay and the broker are left out.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from contextlib import asynccontextmanager, nullcontext
from contextvars import copy_context
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from dramatiq.middleware import TimeLimit

from service.database.sessions import session_factory, transaction
from service.ledger.for_tests import defer, make_due, next_due, next_until, now, published_documents, unfinished
from service.ledger.ids import FAN_OUT
from service.ledger.scheduling import TICK
from service.outbox.consumers import consumer_named, consumers_of
from service.outbox.events import Event
from service.outbox.publish import publish
from service.outbox.running.batches import BatchRunner
from service.outbox.schedules.definitions import declared
from service.outbox.schedules.starting import put_in_force
from service.outbox.upcasting import read

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

    from service.outbox.running.runner import Run
    from service.settings import Settings

E = TypeVar("E", bound=Event)

_UNTOLD = (TICK, FAN_OUT)
"""Consumers of the template's own, which only let others run."""

_MOST = 1_000
"""Deliveries after which `deliver_all` takes it for a consumer that publishes what it consumes."""


async def published(where: AsyncSession | AsyncConnection, event: type[E]) -> list[E]:
    """Every event of this class that `where` can see, the oldest first.

    A session sees what it has published itself, before any commit, and what others have committed. Events stay visible
    when they are delivered, dead or replayed, until they are purged.

    Raises:
        AssertionError: for an event that nobody consumes: publishing it writes nothing.
    """
    if not consumers_of(event):
        raise AssertionError(f"nobody consumes {event.event_type!r}, so publishing it leaves nothing to look for")
    found = await published_documents(where, event.event_type)
    return [read(event, *found[event_id]) for event_id in sorted(found)]


async def assert_published(where: AsyncSession | AsyncConnection, event: type[E], **fields: Any) -> E:
    """Assert that exactly one event of this class with these fields was published, and return it."""
    everything = await published(where, event)
    matching = [each for each in everything if _has(each, fields)]
    if len(matching) != 1:
        raise AssertionError(f"expected one {_shown(event, fields)}, found {len(matching)} among {everything}")
    return matching[0]


async def assert_not_published(where: AsyncSession | AsyncConnection, event: type[Event], **fields: Any) -> None:
    """Assert that no event of this class with these fields was published."""
    if matching := [each for each in await published(where, event) if _has(each, fields)]:
        raise AssertionError(f"expected no {_shown(event, fields)}, found {matching}")


def _has(event: Event, fields: dict[str, Any]) -> bool:
    if unknown := fields.keys() - type(event).model_fields.keys():
        raise AssertionError(f"{type(event).__name__} has no field {', '.join(sorted(unknown))}")
    return all(getattr(event, name) == value for name, value in fields.items())


def _shown(event: type[Event], fields: dict[str, Any]) -> str:
    return f"{event.__name__}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"


class _RecordingRunner(BatchRunner):
    """The worker's runner; it keeps what a consumer raised, which the ledger holds only in words."""

    raised: BaseException | None = None

    def judge(self, error: BaseException, run: Run) -> Any:
        self.raised = error
        return super().judge(error, run)


class InlineWorker:
    """Runs deliveries one after the other, and those of batch consumers together, in the test's own event loop.

    Made by `inline_worker`.

    Attributes:
        runner: What runs them; use it directly to run several at the same time, or one twice.
    """

    def __init__(self, runner: _RecordingRunner, engine: AsyncEngine) -> None:
        self.runner = runner
        self._sessions = session_factory(engine)
        self._ahead = timedelta()
        self._looked_at: datetime | None = None

    async def deliver_all(self, only: str | None = None, *, may_fail: bool = False) -> list[str]:
        """Run whatever is due, and what is published meanwhile, until nothing is due.

        A delivery runs at most once in a call: a retry waits for the next one, and `make_due` shortens the wait.

        Args:
            only: Run this consumer alone; what is due for others waits.
            may_fail: Let failures become retries and dead letters, as they would in production.

        Returns:
            The consumers' names in the order they ran.

        Raises:
            AssertionError: when a delivery did not complete, caused by what its consumer raised.
        """
        return await self._drain(only, None, may_fail)

    async def deliver(self, event: Event, to: str | None = None, *, may_fail: bool = False) -> list[str]:
        """Publish an event in a transaction of its own and run its consumers, or one of them.

        What they publish in turn waits for `deliver_all`.
        """
        async with transaction(self._sessions) as session:
            event_id = publish(session, event)
        return await self._drain(to, event_id, may_fail)

    async def make_due(self) -> None:
        """Let delayed events and retries come due now instead of later."""
        async with transaction(self._sessions) as session:
            await make_due(session)

    async def travel(self, by: timedelta, *, may_fail: bool = False) -> list[str]:
        """Let so much time pass: schedules fire, and delayed events and retries come due, each in its turn.

        What the code declares with `@scheduled` is in force from the first journey on. Only the ledger travels, and not
        Python's clock or PostgreSQL's: a consumer knows the time by its event's `scheduled_at`, and a schedule that is
        made on the way begins at PostgreSQL's time.

        Args:
            by: How long from where the last journey ended.
            may_fail: As in `deliver_all`.

        Returns:
            The consumers' names in the order they ran.

        Raises:
            AssertionError: as in `deliver_all`.
        """
        await self._arrive(None)
        target = self._ahead + by
        ran: list[str] = []
        while True:
            async with transaction(self._sessions) as session:
                following = await next_until(session, target)
            if following is None:
                self._ahead = target
                return ran
            delivery_id, consumer, ahead = following
            self._ahead = max(self._ahead, ahead)
            if len(ran) == _MOST:
                raise AssertionError(f"{_MOST:,} deliveries, and more come due: travel less far at once")
            await self._run([delivery_id], consumer, may_fail)
            await self._arrive(delivery_id)
            if consumer not in _UNTOLD:
                ran.append(consumer)

    async def _arrive(self, delivery_id: UUID | None) -> None:
        """What was published, or put back for a retry, since the last look was so at the time that the test is at."""
        async with transaction(self._sessions) as session:
            if self._looked_at is None:
                await put_in_force(session, declared())
            else:
                await defer(session, self._ahead, self._looked_at, delivery_id)
            self._looked_at = await now(session)

    async def _drain(self, only: str | None, event_id: UUID | None, may_fail: bool) -> list[str]:
        if only is not None and consumer_named(only) is None:
            raise AssertionError(f"there is no consumer named {only!r}")
        ran: dict[UUID, str] = {}
        while (due := await self._next_due(list(ran), only, event_id)) is not None:
            if len(ran) >= _MOST:
                raise AssertionError(f"{_MOST:,} deliveries, and more are due: does {due[1]} publish what it consumes?")
            delivery_id, consumer = due
            together = [delivery_id, *await self._due_with(list(ran), delivery_id, consumer, event_id)]
            ran |= dict.fromkeys(together, consumer)
            await self._run(together, consumer, may_fail)
        return [consumer for consumer in ran.values() if consumer not in _UNTOLD]

    async def _next_due(self, ran: list[UUID], only: str | None, event_id: UUID | None) -> tuple[UUID, str] | None:
        async with self._sessions() as session:
            return await next_due(session, ran, only=only, event_id=event_id)

    async def _due_with(self, ran: list[UUID], first: UUID, consumer: str, event_id: UUID | None) -> list[UUID]:
        """What a batch consumer would be handed beside this one."""
        spec = consumer_named(consumer)
        more: list[UUID] = []
        while spec is not None and len(more) + 1 < (spec.batch or 1):
            due = await self._next_due([*ran, first, *more], consumer, event_id)
            if due is None:
                break
            more.append(due[0])
        return more

    async def _run(self, together: list[UUID], consumer: str, may_fail: bool) -> None:
        self.runner.raised = None
        batch = await self.runner.claim_together(consumer, {each: uuid4() for each in together})
        if batch is not None:
            await self.runner.run_together(batch)
        taken = set() if batch is None else {claim.id for claim in batch.claims}
        for each in together:
            run = None if each in taken else await self.runner.deliver(each)
            if run is not None:
                await self._run_in_thread(run)
        if not may_fail:
            for each in together:
                await self._assert_finished(each, consumer)

    async def _assert_finished(self, delivery_id: UUID, consumer: str) -> None:
        async with self._sessions() as session:
            failure = await unfinished(session, delivery_id)
        if failure is not None:
            state, why = failure
            what = "a dead letter" if state == "dead" else state
            raise AssertionError(f"the delivery to {consumer} is {what}: {why}") from self.runner.raised

    async def _run_in_thread(self, run: Run) -> None:
        """As a worker runs it; where that would end its process, the test fails."""
        loop, patience, done = asyncio.get_running_loop(), self.runner.patience(run.spec), asyncio.Event()

        def work() -> None:
            try:
                self.runner.run_in_thread(
                    run, _limits(), nullcontext(), lambda each: asyncio.run_coroutine_threadsafe(each, loop).result()
                )
            finally:
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=copy_context().run, args=(work,), name=run.spec.name, daemon=True).start()
        try:
            await asyncio.wait_for(done.wait(), patience)
        except TimeoutError:
            raise AssertionError(f"{run.spec.name} has not come back for {patience:g} s") from None


@functools.cache
def _limits() -> TimeLimit:
    limits = TimeLimit()
    limits.manager.start()
    return limits


@asynccontextmanager
async def inline_worker(settings: Settings, engine: AsyncEngine) -> AsyncIterator[InlineWorker]:
    """A worker without a broker, on the database of `engine`, which must be that of `settings`."""
    runner = _RecordingRunner(settings, engine)
    await runner.open()
    try:
        yield InlineWorker(runner, engine)
    finally:
        await runner.close()

"""Gathers what has arrived for batch consumers, and runs it together.

What is fetched waits here while batches of its consumer run; what has arrived when the next one begins is the next one.
So a batch waits for nothing: with little to do there are small ones, and with much full ones.

What must stay true: of each batch consumer one message at most stands in line for a slot, for all that wait here; what
waits here has not been begun, so that a stop gives it back; and what cannot run with the others goes on alone at once,
in a slot of its own.
"""

from __future__ import annotations

from collections import deque
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from service.ledger.message import delivery_in
from service.worker.loop_worker import LoopWorker

if TYPE_CHECKING:
    from collections.abc import Callable

    import dramatiq
    from dramatiq.broker import Broker

    from service.outbox.running.batches import BatchRunner
    from service.settings import OutboxSettings

BATCH = "batch"
"""The option of an actor that says how many of its messages may run together."""

_AT_A_TIME = 2
"""Batches of a consumer that run at a time in a process: one uses the loop while PostgreSQL commits the other."""


class Gathering:
    """What waits for batches of one consumer.

    Args:
        size: How many may run together.
    """

    def __init__(self, size: int) -> None:
        self.items: deque[Any] = deque()
        self._size = size
        self._running = 0
        self._in_line = False

    def next(self) -> Any:
        """The item that is to stand in line now, for all; `None` while another does, or enough of them run."""
        if self._in_line or self._running == _AT_A_TIME or not self.items:
            return None
        self._in_line = True
        return self.items.popleft()

    def begin(self, item: Any) -> list[Any]:
        """What runs with this item, whose turn it is."""
        self._in_line = False
        self._running += 1
        return [item, *(self.items.popleft() for _ in range(min(self._size - 1, len(self.items))))]

    def end(self) -> None:
        """A batch is over."""
        self._running -= 1


class BatchWorker(LoopWorker):
    """A loop's worker that knows batch consumers too."""

    def __init__(self, broker: Broker, worker: dramatiq.Worker, runner: BatchRunner, settings: OutboxSettings) -> None:
        super().__init__(broker, worker, runner, settings)
        self._batches = runner
        self._gatherings = {
            name: Gathering(size) for name, actor in broker.actors.items() if (size := actor.options.get(BATCH))
        }

    def _stand_in_line(self, item: Any) -> None:
        gathering = self._gatherings.get(item.message.actor_name)
        if gathering is None:
            super()._stand_in_line(item)
        else:
            gathering.items.append(item)
            self._go_on(gathering)

    def _go_on(self, gathering: Gathering) -> None:
        item = gathering.next()
        if item is not None:
            super()._stand_in_line(item)

    def unbegun(self) -> Any:
        item = super().unbegun()
        if item is not None:
            return item
        waiting = next((each for each in self._gatherings.values() if each.items), None)
        return None if waiting is None else waiting.items.popleft()

    def _begin(self, item: Any) -> None:
        gathering = self._gatherings.get(item.message.actor_name)
        if gathering is None:
            super()._begin(item)
            return
        items = gathering.begin(item)
        self._go_on(gathering)
        self._claiming.add(id(items))
        self._begun[id(items)] = self._loop.create_task(self._run_together(gathering, items))

    async def _run_together(self, gathering: Gathering, items: list[Any]) -> None:
        """Run them in one slot, but for those that have to run alone."""
        over: list[Any] = []

        def end() -> None:
            if id(items) in self._begun:  # else it was abandoned
                gathering.end()
                self._go_on(gathering)
                self._end(items, *(each.message for each in over))

        try:
            await self._process_together(items, over, end)
        finally:
            end()

    async def _process_together(self, items: list[Any], over: list[Any], abandon: Callable[[], None]) -> None:
        ready: dict[UUID, tuple[Any, Context]] = {}
        for item in items:
            context = copy_context()  # each message has its own, as in a thread or a task
            if not context.run(self._before, item.message):
                over.append(item)
                continue
            delivery_id = delivery_in(item.message.args)
            if delivery_id is None or delivery_id in ready:
                self._begin_alone(item, context, None)
            else:
                ready[delivery_id] = item, context
        tokens = {delivery_id: uuid4() for delivery_id in ready}
        batch = await self._batches.claim_together(items[0].message.actor_name, tokens) if ready else None
        taken = set() if batch is None else {each.id for each in batch.claims}
        for delivery_id, (item, context) in ready.items():
            if delivery_id in taken:
                over.append(item)
            else:
                self._begin_alone(item, context, tokens[delivery_id])
        self._claiming.discard(id(items))
        self._fill_soon()
        if batch is not None:
            await self._batches.run_together(batch, abandon)
            for delivery_id in taken:
                item, context = ready[delivery_id]
                context.run(self._after, item.message)

    def _begin_alone(self, item: Any, context: Context, token: UUID | None) -> None:
        task = self._loop.create_task(self._run_alone(item, token), context=context)
        self._begun[id(item)] = task

    async def _run_alone(self, item: Any, token: UUID | None) -> None:
        try:
            await self._deliver_and_tell(item, token)
        finally:
            self._end(item, item.message)

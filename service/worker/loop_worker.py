"""Runs `async def` consumers straight on the worker's event loop, many at a time and without a thread for each.

To Dramatiq it is one more of its worker threads: what it takes comes past the queue that the others take from,
what it has not begun goes back with theirs, and a stop waits for it as for them. Its own thread does nothing but
acknowledge, which may wait for the broker.

What must stay true:

- A message is begun only when a slot is free for it, and no run waits for a connection to PostgreSQL: until then
  another process may have it.
- Queues take turns for a free slot, so that a long one does not hold up the others, within Dramatiq's priorities.
- Whatever a message does, its slot becomes free: also of a consumer that goes on although it was cancelled.
- What is next in a lane takes over its slot only while no other message waits for one, and for a second at most.
- A stop waits for the runs as long as the grace and a moment, and no longer. A loop that stands still is for the
  watchdog.
- Every message passes the same hooks of Dramatiq's middleware as in a thread. They run on the loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from functools import partial
from queue import Empty, PriorityQueue, SimpleQueue
from typing import TYPE_CHECKING, Any

from dramatiq.middleware import SkipMessage
from dramatiq.worker import WorkerThread

from service.ledger.message import delivery_in
from service.telemetry.logs import get_logger

if TYPE_CHECKING:
    from uuid import UUID

    import dramatiq
    from dramatiq.broker import Broker, MessageProxy

    from service.outbox.running.runner import Runner
    from service.settings import OutboxSettings

_log = get_logger(__name__)

ON_LOOP = "on_loop"
"""The option that marks an actor of an `async def` consumer."""


_TOGETHER = 0.005
"""Seconds for which an acknowledgement waits for others."""

_PAST_THE_RELAY = 1.0
"""Seconds for which what is next in a lane is begun past the relay, which alone knows that a queue is paused."""


class _Turns:
    """What waits for a slot: the lowest priority first, and within it one of each queue in turn."""

    def __init__(self) -> None:
        self._levels: dict[int, dict[str, deque[Any]]] = {}

    def __bool__(self) -> bool:
        return bool(self._levels)

    def add(self, item: Any) -> None:
        """An item of Dramatiq's: with its priority and message."""
        level = self._levels.setdefault(item.priority, {})
        level.setdefault(item.message.queue_name, deque()).append(item)

    def next(self) -> Any:
        """Whose turn it is."""
        priority = min(self._levels)
        level = self._levels[priority]
        queue = next(iter(level))
        waiting = level.pop(queue)
        item = waiting.popleft()
        if waiting:
            level[queue] = waiting  # behind the others
        elif not level:
            del self._levels[priority]
        return item


class WorkQueue(PriorityQueue[Any]):
    """Dramatiq's queue to its threads, past which the loop's messages go."""

    def __init__(self, loop_worker: LoopWorker) -> None:
        super().__init__()
        self._loop_worker = loop_worker

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """From Dramatiq's consumers."""
        if not self._loop_worker.takes(item):
            super().put(item, block, timeout)

    def get_nowait(self) -> Any:
        """For Dramatiq, to give back what nobody has begun when all have stopped."""
        item = self._loop_worker.unbegun()
        return super().get_nowait() if item is None else item


class LoopWorker(WorkerThread):
    """Runs on the event loop on which it is made.

    Args:
        broker: Whose middleware's hooks are called.
        worker: Whose consumers fetch.
        runner: Runs the deliveries.
        settings: How many at a time, and how long a stop may take.
    """

    def __init__(self, broker: Broker, worker: dramatiq.Worker, runner: Runner, settings: OutboxSettings) -> None:
        super().__init__(
            broker=broker,
            consumers=worker.consumers,
            work_queue=worker.work_queue,
            worker_timeout=worker.worker_timeout,
        )
        self._loop = asyncio.get_running_loop()
        self._runner = runner
        self._slots = settings.concurrency
        self._patience = settings.shutdown_grace + settings.grace
        self._arrived: deque[Any] = deque()
        self._called = False
        self._filling = False
        self._turns = _Turns()
        self._begun: dict[int, asyncio.Task[None]] = {}
        self._claiming: set[int] = set()
        self._stopping = False
        self._ended: list[MessageProxy] = []
        self._over: SimpleQueue[list[MessageProxy] | None] = SimpleQueue()
        runner.connections.when_enough = self._fill_soon

    def takes(self, item: Any) -> bool:
        """Take what a consumer has fetched, unless it is for a thread. Called in the consumer's thread."""
        actor = self.broker.actors.get(item.message.actor_name)
        if actor is None or not actor.options.get(ON_LOOP):
            return False
        self._arrived.append(item)
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._look)
        return True

    def unbegun(self) -> Any:
        """Something that was not begun, once it has stopped; `None` if there is nothing more."""
        if self._arrived:
            return self._arrived.popleft()
        return self._turns.next() if self._turns else None

    def stop(self) -> None:
        """Begin nothing more. What runs has the grace."""
        self._loop.call_soon_threadsafe(self._stop)
        self._over.put(None)

    def run(self) -> None:
        """Acknowledge what is over, until there is nothing more to come."""
        while (messages := self._over.get()) is not None:
            self._acknowledge(messages)
        until = time.monotonic() + self._patience
        try:
            while (messages := self._over.get(timeout=max(until - time.monotonic(), 0))) is not None:
                self._acknowledge(messages)
        except Empty:
            _log.error("worker.runs_abandoned", runs=len(self._begun))

    def _acknowledge(self, messages: list[MessageProxy]) -> None:
        for each in messages:
            self.consumers[each.queue_name].post_process_message(each)
            each.clear_exception()

    def _look(self) -> None:
        self._called = False
        while self._arrived:
            self._stand_in_line(self._arrived.popleft())
        self._fill()

    def _stand_in_line(self, item: Any) -> None:
        self._turns.add(item)

    def _fill_soon(self) -> None:
        """Once all that is under way has come as far as it can, so that those which begin next claim together."""
        if not self._filling:
            self._filling = True
            self._loop.call_soon(self._fill)

    def _fill(self) -> None:
        self._filling = False
        while self._turns and self._has_room():
            self._begin(self._turns.next())

    def _begin(self, item: Any) -> None:
        self._claiming.add(id(item))
        self._begun[id(item)] = self._loop.create_task(self._run(item))

    def _has_room(self) -> bool:
        # No more claims at a time than connections: or all slots would be taken before it shows that runs wait for one.
        connections = self._runner.connections
        room = len(self._begun) < self._slots and len(self._claiming) < connections.count
        return room and not connections.short and not self._stopping

    def _stop(self) -> None:
        self._stopping = True
        if not self._begun:
            self._tell()

    async def _run(self, item: Any) -> None:
        try:
            await self._process(item)
        finally:
            self._end(item, item.message)

    def _end(self, begun: Any, *messages: MessageProxy) -> None:
        """Free the slot of what was begun. A run that was abandoned, and ends later, has none any more."""
        if self._begun.pop(id(begun), None) is None:
            return
        self._claiming.discard(id(begun))
        if not self._ended:
            self._loop.call_later(_TOGETHER, self._tell)
        self._ended += messages
        self._fill_soon()
        if self._stopping and not self._begun:
            self._tell()

    def _tell(self) -> None:
        """Let its thread acknowledge what has ended. To wake it costs as much as many acknowledgements."""
        ended, self._ended = self._ended, []
        self._over.put(ended)
        if self._stopping and not self._begun:
            self._over.put(None)

    async def _process(self, item: Any) -> None:
        """As Dramatiq's threads do."""
        if self._before(item.message):
            await self._deliver_and_tell(item)

    async def _deliver_and_tell(self, item: Any, token: UUID | None = None) -> None:
        try:
            await self._deliver(item, token)
        except BaseException as error:  # noqa: BLE001  it ends with the message
            self._after(item.message, error)
        else:
            self._after(item.message)

    def _before(self, message: MessageProxy) -> bool:
        """Call the hooks before it is processed; whether it is to be."""
        try:
            self.broker.emit_before("process_message", message)
        except SkipMessage as error:
            if message.failed:
                message.stuff_exception(error)
            self.broker.emit_after("skip_message", message)
            return False
        except BaseException as error:  # noqa: BLE001  it is the hooks', and ends with the message
            self._after(message, error)
            return False
        if message.failed:
            self._after(message)
        return not message.failed

    def _after(self, message: MessageProxy, error: BaseException | None = None) -> None:
        """Call the hooks after it was processed."""
        if error is None:
            self.broker.emit_after("process_message", message, result=None)
            return
        message.stuff_exception(error)
        _log.error("worker.message_failed", consumer=message.actor_name, exc_info=error)
        self.broker.emit_after("process_message", message, exception=error)

    async def _deliver(self, item: Any, token: UUID | None) -> None:
        delivery_id = delivery_in(item.message.args)
        if delivery_id is None:
            # No relay wrote it. An exception would make Dramatiq log all of it, whatever it holds.
            _log.error("worker.odd_message", consumer=item.message.actor_name)
            return
        run = await self._runner.claim(delivery_id, token)
        self._claiming.discard(id(item))
        self._fill_soon()
        if run is not None and not run.spec.is_async:
            # The message names another consumer than the delivery has. The relay hands it over under its name.
            await self._runner.release(run)
            return
        free = partial(self._end, item, item.message)
        may_claim_next = partial(self._may_claim_next, item, self._loop.time() + _PAST_THE_RELAY)
        while run is not None:
            await self._runner.run(run, free, may_claim_next)
            run = await self._runner.claim_next(run)

    def _may_claim_next(self, item: Any, until: float) -> bool:
        """Whether nobody waits for the slot of this message, so that what is next in its lane may have it."""
        waited_for = self._turns or self._arrived or self._runner.connections.short
        return id(item) in self._begun and not waited_for and not self._stopping and self._loop.time() < until

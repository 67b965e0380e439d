"""Planted bugs: systems that the checker must accuse, or it proves nothing about the one that it acquits.

`CHAOS_BUG` names one. Each changes the service's modules as they are imported, and refuses to start where the code it
changes is not there any more.
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from tests.proof.chaos.patching import replace, when_imported

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

__all__ = ["BUGS"]

_DUE_AGAIN = "$5::interval * (2 ^ LEAST(GREATEST(message.dispatches - message.attempts, 0), 3))"


def _replace(module: Any, name: str, old: str, new: str) -> None:
    statement: str = getattr(module, name)
    if old not in statement:
        raise SystemExit(f"cannot plant the bug: {module.__name__}.{name} is another statement by now")
    replace(module, name, statement.replace(old, new))


def no_fence() -> None:
    """Whoever finishes completes the row, whether it is still theirs or not."""

    @when_imported("service.ledger.delivering")
    def patch(module: Any) -> None:
        fence = f"AND claim_token = $2 AND {module._STATE} IN ('running', 'dispatched')"
        _replace(module, "_COMPLETE", fence, "AND $2::uuid IS NOT NULL")


def complete_before_effect() -> None:
    """The row is ticked off first, and then the work is done."""

    @when_imported("service.outbox.delivery")
    def patch(module: Any) -> None:
        begin = module.Delivery._begin

        @asynccontextmanager
        async def begin_completed(self: Any) -> AsyncIterator[Any]:
            async with self._sessions(mark=str(self._claim.token)) as session:
                driver = await self._start(session)
                await session.execute(module.text("SELECT 1"))
                await self._complete(driver)
                await module.commit(session)

            async def nothing(*_: Any) -> None:
                """It is completed already."""

            self._complete = nothing
            async with begin(self) as session:
                yield session

        replace(module.Delivery, "_begin", begin_completed)


def commit_before_publish() -> None:
    """The relay marks rows as handed over for good, commits, and only then hands them over."""

    @when_imported("service.ledger.dispatching")
    def forget(module: Any) -> None:
        _replace(module, "_TAKE_DUE", _DUE_AGAIN, "$5::interval * 100000")

    @when_imported("relay.process.loop")
    def patch(module: Any) -> None:
        async def dispatch(self: Any, connection: Any, name: str, queue: Any) -> int:
            limit = await self._room(name, queue)
            if limit <= 0:
                return 0
            async with connection.transaction():
                batch = await self._take(connection, name, queue, limit)
            if batch is None:
                return 0
            queue.depth = await self._sender.hand_over(name, batch.deliveries, module.uuid4().hex[:16])
            return len(batch.deliveries)

        replace(module.Relay, "_dispatch", dispatch)


def narrow_claim() -> None:
    """A worker takes only what it can see to be dispatched, so one that is faster than the relay's commit misses it."""

    @when_imported("service.ledger.delivering")
    def patch(module: Any) -> None:
        for name in ("_CLAIM", "_CLAIM_FREE"):
            _replace(module, name, module._CLAIMABLE, f"{module._STATE} = 'dispatched'")


def heartbeat_without_token() -> None:
    """A worker that came back to life keeps alive the lease of whoever has its row by now."""

    @when_imported("service.ledger.delivering")
    def patch(module: Any) -> None:
        _replace(module, "_HEARTBEAT", " AND message.claim_token = lease.token", "")


def limit_without_lock() -> None:
    """Two relays look at once how much room a limited queue has."""

    @when_imported("service.ledger.limited_dispatching")
    def patch(module: Any) -> None:
        _replace(module, "_LOCK", " FOR UPDATE SKIP LOCKED", "")


def slots_end_when_due() -> None:
    """A slot is free once its delivery is due again, although the message may still be in the broker."""

    @when_imported("service.ledger.limited_dispatching")
    def patch(module: Any) -> None:
        _replace(module, "_SEE", "WHERE id", "WHERE due_at > now() AND id")


def claim_without_slot() -> None:
    """A worker claims of a limited queue what is due, like of any other."""

    @when_imported("service.ledger.delivering")
    def patch(module: Any) -> None:
        for name in ("_CLAIM", "_CLAIM_FREE"):
            _replace(module, name, module._MAY_START, "true")


def rate_of_hand_overs() -> None:
    """What was handed over counts against the rate at that moment, whether it starts then or not."""

    @when_imported("service.ledger.limited_dispatching")
    def patch(module: Any) -> None:
        take = module._Slots.take

        def start_at_once(self: Any, batch: Any, rows: Any) -> None:
            take(self, batch, rows)
            for _ in self.waiting:
                self._start(self.now)
            self.waiting = []

        replace(module._Slots, "take", start_at_once)


def completion_without_lock() -> None:
    """A worker completes in a lane without its lock; the function that lets the next one go takes it no more either."""

    @when_imported("service.ledger.delivering")
    def patch(module: Any) -> None:
        _replace(module, "_COMPLETED", ", CASE WHEN lane IS NOT NULL THEN outbox_lock_all_lanes(lane) END", "")


def any_tick() -> None:
    """A tick fires its schedule whether it is the next one or not."""

    class Whoever(str):
        __slots__ = ()

        def __ne__(self, other: object) -> bool:
            return False

        __eq__ = str.__eq__
        __hash__ = str.__hash__

    class Whose:
        def __str__(self) -> str:
            return Whoever()

    @when_imported("service.ledger.scheduling")
    def patch(module: Any) -> None:
        lock = module.lock

        async def lock_any(session: Any, name: str) -> Any:
            found = await lock(session, name)
            return None if found is None else dataclasses.replace(found, tick_id=Whose())

        replace(module, "lock", lock_any)


def next_from_now() -> None:
    """What follows a tick follows from when it runs."""

    @when_imported("service.outbox.schedules.ticking")
    def patch(module: Any) -> None:
        fire = module.fire

        def fire_late(timing: Any, catch_up: str, tick: Any, now: Any, anchor: Any, **options: Any) -> Any:
            fired = fire(timing, catch_up, tick, tick, anchor, **options)
            return dataclasses.replace(fired, following=timing.after(now, anchor))

        replace(module, "fire", fire_late)


BUGS: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        no_fence,
        complete_before_effect,
        commit_before_publish,
        narrow_claim,
        heartbeat_without_token,
        limit_without_lock,
        slots_end_when_due,
        claim_without_slot,
        rate_of_hand_overs,
        completion_without_lock,
        any_tick,
        next_from_now,
    )
}

if os.environ.get("CHAOS_BUG"):
    BUGS[os.environ["CHAOS_BUG"]]()

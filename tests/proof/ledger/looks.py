"""What tests wait for in the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uuid import UUID

    from tests.proof.ledger.conftest import Ledger

__all__ = ["all_completed", "all_dispatched", "blocked", "dispatched", "effects_once", "is_state", "sleeping"]


async def is_state(ledger: Ledger, message_id: UUID, state: str) -> bool:
    """Whether the delivery is in this state, or `dead`."""
    return await ledger.state(message_id) == state


async def dispatched(ledger: Ledger, message_id: UUID) -> bool:
    """Whether it was handed over, and nothing since."""
    return await is_state(ledger, message_id, "dispatched")


async def all_dispatched(ledger: Ledger) -> bool:
    """Whether no delivery waits for the relay."""
    return not await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE state = 'pending'")


async def all_completed(ledger: Ledger) -> bool:
    """Whether every delivery that did not die is completed."""
    return not await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE state <> 'completed'")


async def sleeping(ledger: Ledger) -> bool:
    """Whether a relay holds the sleeper's lock."""
    return bool(
        await ledger.connection.fetchval(
            """SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
               WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND datname = current_database()"""
        )
    )


async def blocked(ledger: Ledger) -> bool:
    """Whether a statement waits for a row lock."""
    return bool(
        await ledger.connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
    )


async def effects_once(ledger: Ledger) -> None:
    """Fail unless every completed delivery has one effect."""
    odd = await ledger.connection.fetch(
        """SELECT id, count(effect) FROM outbox_message LEFT JOIN effect ON message_id = id
           WHERE state = 'completed' GROUP BY id HAVING count(effect) <> 1"""
    )
    assert odd == []

"""What the consumers of either release do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text

if TYPE_CHECKING:
    from service.outbox import Delivery

__all__ = ["store"]


async def store(delivery: Delivery, note: str) -> None:
    """One row of `effect`, which says what was read by which release."""
    async with delivery.begin() as session:
        await session.execute(
            text("INSERT INTO effect VALUES (:id, :consumer, :note)"),
            {"id": delivery.idempotency_key, "consumer": delivery.consumer, "note": note},
        )

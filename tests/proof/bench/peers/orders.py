"""What the job queues are measured with: an order and its job in one transaction, and a job with one effect."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from uuid import UUID

from uuid_utils.compat import uuid7

__all__ = ["TABLES", "Write", "place_orders"]

TABLES = """
CREATE TABLE IF NOT EXISTS bench_order (
    id uuid PRIMARY KEY,
    customer text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE IF NOT EXISTS bench_effect (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_id uuid NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
"""

Write = Callable[[UUID], Awaitable[None]]
"""Stores an order of this id and enqueues its job, in one transaction."""


async def place_orders(count: int, writers: Sequence[Write]) -> None:
    """Share `count` orders among the writers, all at once, and print how long it took."""
    left = iter(range(count))

    async def place(write: Write) -> None:
        for _ in left:
            await write(uuid7())

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for write in writers:
            group.create_task(place(write))
    print(f"seconds {time.perf_counter() - began:.6f}", flush=True)

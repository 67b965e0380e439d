"""Carries out the operations that were begun in this console.

What must stay true: an operation outlives whoever carries it out. This process dies or stops, and what is done is done;
the operation is then `interrupted` or `stopped`, and any console or command line goes on with it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from service.database.driver import DRIVER_ERRORS
from service.ledger import operations
from service.ledger.replaying import carry_out
from service.telemetry.logs import brief, get_logger

if TYPE_CHECKING:
    from uuid import UUID

    from service.console.looks import ConsolePool

AT_ONCE = 3
"""Operations; each holds a connection."""

_log = get_logger(__name__)


class OperationRunner:
    """Runs operations beside the requests that began them."""

    def __init__(self, pool: ConsolePool) -> None:
        self._pool = pool
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_full(self) -> bool:
        """Whether no more may begin here."""
        return len(self._tasks) >= AT_ONCE

    async def begin(self, number: int, *, by: str, why: str | None = None, rate: float | None = None) -> bool:
        """Take an operation and go on with it; whether it was to be had."""
        async with self._pool() as connection:
            runner = await operations.take(connection, number, by=by, why=why, rate=rate)
        if runner is None:
            return False
        task = asyncio.create_task(self._carry_out(number, runner))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def _carry_out(self, number: int, runner: UUID) -> None:
        try:
            async with self._pool() as connection:
                headway = await carry_out(connection, number, runner)
        except DRIVER_ERRORS as error:
            _log.warning("console.operation_interrupted", operation=number, error=brief(error))
            return
        _log.info(
            "console.operation_ended", operation=number, done=len(headway.done), refused=len(headway.refused),
            stopped=headway.stopped or headway.interrupted,
        )  # fmt: skip

    async def close(self) -> None:
        """Let each finish its batch, and leave it stopped."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

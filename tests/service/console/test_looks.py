"""What is asked of PostgreSQL when many look."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import asyncpg
import pytest

from service.console.looks import ConsolePool, Shared, SharedByKey

if TYPE_CHECKING:
    from service.settings import Settings


async def test_however_many_look_it_is_asked_once() -> None:
    asked = 0

    async def ask() -> int:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return asked

    shared = Shared(ask, kept=60)
    looks = await asyncio.gather(*(shared.get() for _ in range(50)))
    assert {look.value for look in looks} == {1}
    shared.forget()
    assert (await shared.get()).value == 1  # what is known, while it is asked again
    await asyncio.sleep(0.01)
    assert (await shared.get()).value == 2


async def test_what_is_dear_is_asked_for_a_twentieth_of_the_time() -> None:
    asked = 0

    async def ask() -> None:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.05)

    shared = Shared(ask, kept=0)
    await shared.get()
    for _ in range(50):
        await shared.get()
        await asyncio.sleep(0.005)
    assert asked == 1


async def test_a_failure_is_told_and_the_last_answer_stands(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([17])

    async def ask() -> int:
        try:
            return next(answers)
        except StopIteration:
            raise OSError("gone") from None

    shared = Shared(ask, kept=0)
    assert (await shared.get()).value == 17
    shared.forget()
    await shared.get()
    await asyncio.sleep(0.01)
    look = await shared.get()
    assert look.value == 17
    assert isinstance(look.problem, OSError)


async def test_few_answers_are_kept_of_the_many_that_somebody_may_ask_for() -> None:
    async def ask(key: int) -> int:
        return key

    shared = SharedByKey(ask, kept=60, remembered=8)
    for key in range(100):
        assert (await shared.get(key)).value == key
    assert len(shared._answers) == 8


async def test_a_statement_ends_in_time_and_nothing_can_be_changed(settings: Settings) -> None:
    pool = ConsolePool(settings.database, "tests", size=2, longest=0.2)
    await pool.open()
    try:
        with pytest.raises(asyncpg.QueryCanceledError):
            async with pool() as connection:
                await connection.fetch("SELECT pg_sleep(30)")
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            async with pool() as connection:
                await connection.execute("DELETE FROM dead_letter")
        async with pool() as connection:
            assert await connection.fetchval("SELECT 1") == 1
    finally:
        pool.close()

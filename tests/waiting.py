"""Waiting for a condition instead of sleeping."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["InVainError", "until", "until_sync"]

T = TypeVar("T")


class InVainError(AssertionError):
    """What was waited for did not come."""


async def until(
    condition: Callable[[], Any],
    *,
    timeout: float = 60,  # noqa: ASYNC109  its own message instead of a TimeoutError
    every: float = 0.02,
    what: str = "",
) -> Any:
    """Poll `condition` until it returns something true, and return that.

    Args:
        condition: A function or coroutine function without arguments; an `AssertionError` in it counts as "not yet".
        timeout: Seconds until the test fails. Only a hang shall reach it, on however busy a machine: a smaller one
            proves that what was waited for is not something else, which takes longer.
        every: Seconds between two looks.
        what: What is waited for, for the failure's message.
    """
    deadline = time.monotonic() + timeout
    while True:
        failure: AssertionError | None = None
        try:
            outcome = condition()
            value = await outcome if inspect.isawaitable(outcome) else outcome
            if value:
                return value
        except AssertionError as error:
            failure = error
        if time.monotonic() > deadline:
            raise InVainError(f"waited {timeout} s in vain for {what or condition}") from failure
        await asyncio.sleep(every)


def until_sync(condition: Callable[[], T], *, timeout: float = 60, every: float = 0.02, what: str = "") -> T:
    """The same for a test that is not a coroutine."""
    deadline = time.monotonic() + timeout
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise InVainError(f"waited {timeout} s in vain for {what or condition}")
        time.sleep(every)

"""Waiting for a condition instead of sleeping."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["until", "until_sync"]

T = TypeVar("T")


async def until(
    condition: Callable[[], Any],
    *,
    timeout: float = 10,  # noqa: ASYNC109  an assertion with its own message instead of a TimeoutError
    every: float = 0.02,
    what: str = "",
) -> Any:
    """Poll `condition` until it returns something true, and return that.

    Args:
        condition: A function or coroutine function without arguments; an `AssertionError` in it counts as "not yet".
        timeout: Seconds until the test fails.
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
            raise AssertionError(f"waited {timeout} s in vain for {what or condition}") from failure
        await asyncio.sleep(every)


def until_sync(condition: Callable[[], T], *, timeout: float = 10, every: float = 0.02, what: str = "") -> T:
    """The same for a test that is not a coroutine."""
    deadline = time.monotonic() + timeout
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s in vain for {what or condition}")
        time.sleep(every)

"""A queue's limit, as a person gives it and as it is said."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.ledger.limiting import Limit

_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_RATE = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)/([smhd])")
_MOST = 10_000
_SLOWEST = 1 / 86_400


def read_limit(
    concurrency: int | None, rate: str | None, burst: int | None
) -> tuple[int | None, float | None, int | None]:
    """How many at once, how many a second, and of these how many at a time.

    Args:
        concurrency: At once, at most.
        rate: Starts, as `10/s`, `600/m` or `5000/h`.
        burst: Of the rate at a time; by default what it allows in a tenth of a second.

    Raises:
        ValueError: beginning with the name of what is wrong.
    """
    if rate is None and burst is not None:
        raise ValueError("burst is how many of a rate may start at a time, so it needs one")
    per_second = None if rate is None else _per_second(rate)
    if per_second is not None and burst is None:
        burst = max(int(per_second / 10), 1)
    for name, number in (("concurrency", concurrency), ("burst", burst)):
        if number is not None and not 1 <= number <= _MOST:
            raise ValueError(f"{name}: {number} is not between 1 and {_MOST:,}")
    return concurrency, per_second, burst


def _per_second(text: str) -> float:
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"rate: {text!r} is no rate; expected something like 10/s, 600/m or 5000/h")
    per_second = float(match[1]) / _SECONDS[match[2]]
    if not _SLOWEST <= per_second <= _MOST:
        raise ValueError(f"rate: {text} is not between 1/d and {_MOST:,}/s")
    return per_second


def said(limit: Limit) -> str:
    """What a queue is limited to."""
    return say_limit(limit.concurrency, limit.per_second, limit.burst)


def say_limit(concurrency: int | None, per_second: float | None, burst: int | None) -> str:
    """The same of what `read_limit` makes."""
    parts = [] if concurrency is None else [f"{concurrency:,} at once"]
    if per_second is not None:
        parts.append(f"{say_rate(per_second)}, {burst:,} at a time")
    return " and ".join(parts)


def say_rate(per_second: float) -> str:
    """In the unit in which it is a whole number, if there is one."""
    for unit, seconds in _SECONDS.items():
        number = per_second * seconds
        if number >= 1 and abs(number - round(number)) < 1e-6 * number:
            return f"{round(number):,}/{unit}"
    return f"{per_second:g}/s"

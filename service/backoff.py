"""How long to wait before the next try."""

from __future__ import annotations

import random
from datetime import timedelta


def backoff(attempt: int, minimum: int, maximum: int) -> timedelta:
    """Time before the retry that follows `attempt` (from 1): doubled each time, between a half and the whole of it.

    Args:
        attempt: Which attempt failed.
        minimum: Milliseconds after the first.
        maximum: Milliseconds at most.
    """
    longest = min(maximum, minimum * 2 ** min(attempt - 1, 40))
    return timedelta(milliseconds=longest * random.uniform(0.5, 1.0))  # noqa: S311  jitter, not a secret

"""How events look on a terminal."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from relay.cli.output import Column, age, plain, screen_width, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay.cli.events import ListedEvent

__all__ = ["summary"]

_AGE, _ID, _TYPE, _GAP = 5, 36, 14, 2
_WIDE = 140
"""Columns from which on there is room for the correlation id too."""

_URGENT = ("dead", "running", "dispatched", "pending", "completed")


def summary(events: Sequence[ListedEvent]) -> str:
    """One line for each."""
    correlated = screen_width() >= _WIDE
    taken = [_AGE, _ID, _TYPE, *([_ID] if correlated else [])]
    room = screen_width() - sum(taken) - _GAP * len(taken)
    columns = [
        Column("AGE", right=True),
        Column("EVENT"),
        Column("TYPE", least=_TYPE),
        *([Column("CORRELATION", least=_ID)] if correlated else []),
        Column("DELIVERIES", least=room),
    ]
    return table(columns, [_cells(event, room, correlated=correlated) for event in events], gap=_GAP)


def _cells(event: ListedEvent, room: int, *, correlated: bool) -> list[str]:
    return [
        age(event.age),
        str(event.event_id),
        event.event_type,
        *([event.correlation_id or "-"] if correlated else []),
        _deliveries(event, room),
    ]


def _deliveries(event: ListedEvent, room: int) -> str:
    """Each consumer with its state; where that is too wide, how many are in which state, the urgent first."""
    each = plain(" ".join(f"{delivery.consumer}:{delivery.state}" for delivery in event.deliveries))
    if len(each) <= room:
        return each
    counts = Counter(delivery.state for delivery in event.deliveries)
    return ", ".join(f"{counts[state]} {state}" for state in _URGENT if state in counts)

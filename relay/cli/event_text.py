"""How events look on a terminal."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from relay.cli.output import Column, age, plain, rounded, screen_width, table, timestamp
from service.ledger.limit_text import said
from service.ledger.pausing import EVERY_QUEUE
from service.ledger.scheduling import TICK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from service.ledger.event_search import Delivered, ListedEvent
    from service.ledger.history import DeliveryStory, Step, Story

_AGE, _ID, _TYPE, _GAP = 5, 36, 14, 2
_WIDE = 140
"""Columns from which on there is room for the correlation id too."""

_URGENT = ("dead", "running", "dispatched", "pending", "expired", "cancelled", "completed")


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


def story_lines(story: Story) -> Iterator[tuple[str, str]]:
    """Each line with the indent of what does not fit on it."""
    yield f"Event {story.event_id}", ""
    yield f"{story.event_type}, version {story.version}, published {timestamp(story.published_at)}", "  "
    yield f"payload: {json.dumps(story.payload, ensure_ascii=False)}", "  "
    if story.event_type == TICK and story.payload and "schedule" in story.payload:
        yield _tick(story.payload), "  "
    for name, value in sorted(story.headers.items()):
        yield f"{name.replace('_', ' ')}: {value}", "  "
    for delivery in story.deliveries:
        yield "", ""
        yield from _part(delivery)


def _tick(payload: dict[str, Any]) -> str:
    name, by, why = payload["schedule"], payload.get("by"), payload.get("why")
    if by is not None:
        return f"{by} asked for the schedule {name} to fire{f': {why}' if why else ''}."
    if payload.get("skip"):
        return f"The schedule {name} goes on after {payload['at']}, for which it does not fire."
    return f"The schedule {name} fires for {payload['at']}."


def _part(delivery: DeliveryStory) -> Iterator[tuple[str, str]]:
    yield f"{delivery.consumer}, queue {delivery.queue}: {delivery.state.upper()}", ""
    yield f"  delivery {delivery.delivery_id}", ""
    for step in delivery.steps:
        yield f"  {timestamp(step.at)}  {_said(step, delivery)}", " " * 24
    yield f"  What is next: {_expected(delivery)}", " " * 16


def event_as_json(event: ListedEvent) -> dict[str, Any]:
    """What `summary` shows, for machines."""
    return asdict(event) | {"deliveries": [_as_json(each) for each in event.deliveries]}


def story_as_json(story: Story) -> dict[str, Any]:
    """What `story_lines` tells, for machines; steps and what is next as a person reads them."""
    parts = [
        _as_json(each)
        | {"steps": [{"at": step.at, "what": _said(step, each)} for step in each.steps], "next": _expected(each)}
        for each in story.deliveries
    ]
    return asdict(story) | {"deliveries": parts}


def _as_json(delivery: Delivered | DeliveryStory) -> dict[str, Any]:
    fields = asdict(delivery)
    return {"message_id": fields.pop("delivery_id")} | fields  # its name in the ledger's tables


_STEPS = {
    "published": "It was published for {consumer}.",
    "handed_over": "The relay handed it to the broker, for the {nth} time.",
    "begun": "A worker began its {nth} attempt.",
    "failed": "Its {nth} attempt failed with {step.why}",
    "completed": "It was completed.",
    "expired": "It had expired when a worker took it, and was not run.",
    "cancelled": "It was cancelled before a worker began it.",
    "died": "It became dead letter {step.number}: {step.why}.",
    "replayed": "{step.by} replayed it{because}.",
    "discarded": "{step.by} discarded it{because}.",
    "edited": "{step.by} replayed it with another payload, as a delivery of its own{because}.",
}

_NEXT = {
    "delayed": "It is delayed; its {nth} attempt is due in {span}.",
    "parked": "It waits for its turn in lane {next.lane}: `outbox lanes list`.",
    "follows": "It is published once all consumers of event {next.follows} are done.",
    "due": "It waits for its {nth} attempt, due {since} {span}.",
    "dispatched": "It waits in the broker for a worker to take it. Otherwise the relay hands it over again in {left}.",
    "running": "A worker is at its {nth} attempt; the lease {ends} without a heartbeat.",
    "completed": "Nothing. The delivery is kept until {next.kept_until:%Y-%m-%d %H:%M}Z.",
    "dead": "Nothing, until a person decides: `outbox dead-letters replay {next.number}`, or `discard`.",
    "discarded": "Nothing. It was discarded, its effect did not happen.",
    "edited": "Nothing. What was corrected goes its own way.",
    "purged": "Nothing. It was replayed and completed, and has been purged since.",
}


def _said(step: Step, delivery: DeliveryStory) -> str:
    because = f": {step.why}" if step.why else ""
    return _STEPS[step.kind].format(step=step, nth=_ordinal(step.number), consumer=delivery.consumer, because=because)


def _expected(delivery: DeliveryStory) -> str:
    following = delivery.next
    span, later = rounded(following.wait, " s", " min", " h", " days"), following.wait > timedelta()
    sentence = _NEXT[following.kind].format(
        next=following,
        nth=_ordinal(following.number),
        span=span,
        since="in" if later else "for",
        left=span if later else "0 s",
        ends=f"ends in {span}" if later else f"ended {span} ago",
    )
    held = f" Until then lane {following.lane} stands." if following.kind == "dead" and following.lane else ""
    return sentence + held + _halt(delivery)


def _halt(delivery: DeliveryStory) -> str:
    limit, pause = delivery.next.limit, delivery.next.pause
    halt = "" if limit is None else f" Queue {delivery.queue} is limited to {said(limit)} by {limit.limited_by}."
    if pause is None:
        return halt
    name = "--all" if pause.queue == EVERY_QUEUE else pause.queue
    return f"{halt} Queue {delivery.queue} is paused by {pause.paused_by}: `outbox queues resume {name}`."


def _ordinal(number: int) -> str:
    """`1st`, `2nd`, `3rd`, `11th`."""
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"

"""The story of one event: who did what when, for each of its deliveries, and what happens next.

The ids of an event's deliveries follow its own, so a range of the primary key finds them. Steps that a row no longer
remembers, such as the second of five hand-overs, are not told.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from relay.cli.queue_commands import EVERY_QUEUE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relay.cli.command import Connection

__all__ = ["Delivery", "Step", "Story", "tell"]

_ROWS = """
SELECT *, due_at - clock_timestamp() AS due_in FROM outbox_message WHERE id > $1 AND id <= $2 ORDER BY id
"""
_DEAD = "SELECT * FROM dead_letter WHERE message_id > $1 AND message_id <= $2 ORDER BY id"
_EVENT_ID = """
SELECT event_id FROM outbox_message WHERE id = $1 UNION SELECT event_id FROM dead_letter WHERE message_id = $1 LIMIT 1
"""
_PAUSED = "SELECT queue, paused_by FROM paused_queue"


@dataclass(frozen=True, slots=True)
class Step:
    """Something that happened."""

    at: datetime
    what: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """One consumer's part: how it stands, what happened, and what happens next."""

    message_id: UUID
    consumer: str
    queue: str
    state: str
    steps: list[Step]
    next: str


@dataclass(frozen=True, slots=True)
class Story:
    """One event and all that is known of its deliveries."""

    event_id: UUID
    event_type: str
    version: int
    published_at: datetime
    payload: dict[str, Any]
    headers: dict[str, str]
    deliveries: list[Delivery]


async def tell(connection: Connection, given: UUID, keep: timedelta) -> Story | None:
    """The story of the event with this id, or of the delivery's event; `None` when nothing is known of it."""
    # A delivery's id is its event's with a number in the last byte; the row says so itself while there is one.
    event_id = await connection.fetchval(_EVENT_ID, given) or UUID(int=given.int & ~0xFF)
    reach = event_id, UUID(int=event_id.int | 0xFF)
    rows = {row["id"]: dict(row) for row in await connection.fetch(_ROWS, *reach)}
    dead: dict[UUID, list[dict[str, Any]]] = {}
    for letter in await connection.fetch(_DEAD, *reach):
        dead.setdefault(letter["message_id"], []).append(dict(letter))
    paused = {row["queue"]: row["paused_by"] for row in await connection.fetch(_PAUSED)}
    ids = sorted(rows.keys() | dead.keys())
    if not ids:
        return None
    first = rows.get(ids[0]) or dead[ids[0]][0]
    return Story(
        event_id=event_id,
        event_type=first["event_type"],
        version=first["version"],
        published_at=first["created_at"],
        payload=first["payload"],
        headers=first["headers"],
        deliveries=[_delivery(each, rows.get(each), dead.get(each, []), paused, keep) for each in ids],
    )


def _delivery(
    message_id: UUID,
    row: dict[str, Any] | None,
    dead: list[dict[str, Any]],
    paused: dict[str, str],
    keep: timedelta,
) -> Delivery:
    latest = row or dead[-1]
    steps = [Step(latest["created_at"], f"It was published for {latest['consumer']}.")]
    for letter in dead:
        steps += _death(letter)
    if row is not None:
        steps += _life(row)
    return Delivery(
        message_id=message_id,
        consumer=latest["consumer"],
        queue=latest["queue"],
        state=row["state"] if row else ("dead" if latest["resolution"] is None else latest["resolution"]),
        steps=sorted(steps, key=lambda step: step.at),
        next=_next(row, paused, keep) if row else _after_death(latest),
    )


def _death(letter: dict[str, Any]) -> Iterator[Step]:
    yield from _errors(letter["errors"])
    yield Step(letter["died_at"], f"It became dead letter {letter['id']}: {letter['reason']}.")
    if letter["resolution"] is not None:
        why = f": {letter['resolved_why']}" if letter["resolved_why"] else ""
        yield Step(letter["resolved_at"], f"{letter['resolved_by']} {_resolved(letter)} it{why}.")


def _resolved(letter: dict[str, Any]) -> str:
    return "replayed" if letter["resolution"] == "replayed" else "discarded"


def _life(row: dict[str, Any]) -> Iterator[Step]:
    yield from _errors(row["errors"])
    if row["dispatched_at"] is not None:
        yield Step(
            row["dispatched_at"], f"The relay handed it to the broker, for the {ordinal(row['dispatches'])} time."
        )
    failed_at = max((datetime.fromisoformat(each["at"]) for each in row["errors"] if "at" in each), default=None)
    if row["started_at"] is not None and (failed_at is None or row["started_at"] > failed_at):
        # A released attempt was refunded, so its number is used again.
        number = row["attempts"] if row["state"] in ("running", "completed") else row["attempts"] + 1
        yield Step(row["started_at"], f"A worker began its {ordinal(number)} attempt.")
    if row["completed_at"] is not None:
        yield Step(row["completed_at"], "It was completed.")


def _errors(errors: list[dict[str, Any]]) -> Iterator[Step]:
    for error in errors:
        if "at" in error:
            number = ordinal(int(error.get("attempt") or 0))
            what = f"{error.get('type')}: {error.get('message')}"
            yield Step(datetime.fromisoformat(error["at"]), f"Its {number} attempt failed with {what}")


def _next(row: dict[str, Any], paused: dict[str, str], keep: timedelta) -> str:
    from_now: timedelta = row["due_in"]
    due = f"in {seconds(from_now)}" if from_now > timedelta() else f"for {seconds(-from_now)}"
    again = f"Otherwise the relay hands it over again in {seconds(max(from_now, timedelta()))}."
    by = paused.get(row["queue"]) or paused.get(EVERY_QUEUE)
    if by is not None and row["state"] != "completed":
        name = row["queue"] if row["queue"] in paused else "--all"
        halt = f" Queue {row['queue']} is paused by {by}: `outbox queues resume {name}`."
    else:
        halt = ""
    attempt = f"{ordinal(row['attempts'] + 1)} attempt"
    match row["state"]:
        case "pending" if from_now > timedelta(seconds=1) and row["attempts"] == 0 and not row["errors"]:
            return f"It is delayed; its {attempt} is due in {seconds(from_now)}.{halt}"
        case "pending":
            return f"It waits for its {attempt}, due {due}.{halt}"
        case "dispatched":
            return f"It waits in the broker for a worker to take it. {again}{halt}"
        case "running":
            lease = f"ends in {seconds(from_now)}" if from_now > timedelta() else f"ended {seconds(-from_now)} ago"
            return (
                f"A worker is at its {ordinal(row['attempts'])} attempt; the lease {lease} without a heartbeat.{halt}"
            )
    return f"Nothing. The row is kept until {row['completed_at'] + keep:%Y-%m-%d %H:%M}Z."


def _after_death(letter: dict[str, Any]) -> str:
    if letter["resolution"] is None:
        return f"Nothing, until a person decides: `outbox dead-letters replay {letter['id']}`, or `discard`."
    if letter["resolution"] == "discarded":
        return "Nothing. It was discarded, its effect did not happen."
    return "Nothing. It was replayed and completed, and its row has been purged since."


def seconds(span: timedelta) -> str:
    """A duration in prose: `12 s`, `5 min`, `3 h`, `4 days`."""
    total = span.total_seconds()
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7_200), ("h", 3_600, 172_800)):
        if total < limit:
            return f"{total / size:.0f} {unit}"
    return f"{total / 86_400:.0f} days"


def ordinal(number: int) -> str:
    """`1st`, `2nd`, `3rd`, `11th`."""
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"

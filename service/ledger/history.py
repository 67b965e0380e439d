"""The history of one event: who did what when, for each of its deliveries, and what happens next.

Steps that a row no longer remembers, such as the second of five hand-overs, are not told.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from service.ledger import dead_letters
from service.ledger.follow_ups import AFTER
from service.ledger.ids import event_of, last_delivery_of
from service.ledger.limiting import limited_queues
from service.ledger.pausing import EVERY_QUEUE, paused_queues

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from service.database.driver import Connection
    from service.ledger.limiting import Limit
    from service.ledger.pausing import Pause

_ROWS = """
SELECT {columns}, due_at - clock_timestamp() AS due_in, state = 'pending' AND due_at = outbox_parked() AS parked
FROM outbox_message WHERE id > $1 AND id <= $2 ORDER BY id
"""
_DEAD = "SELECT {columns} FROM dead_letter WHERE message_id > $1 AND message_id <= $2 ORDER BY id"
_MASKED = """
id, event_id, event_type, version, consumer, queue, headers, state, due_at, attempts, dispatches, created_at,
dispatched_at, started_at, completed_at, errors, lane, position, ended_as
"""
_PAYLOAD = """
SELECT payload FROM outbox_message WHERE id > $1 AND id <= $2
UNION ALL
SELECT payload FROM dead_letter WHERE message_id > $1 AND message_id <= $2 LIMIT 1
"""
_EVENT_ID = """
SELECT event_id FROM outbox_message WHERE id = $1 UNION SELECT event_id FROM dead_letter WHERE message_id = $1 LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class Step:
    """Something that happened.

    Attributes:
        number: Which hand-over or attempt it was (from 1), or which dead letter.
        by: Who replayed, discarded or edited it.
        why: What an attempt failed with, why it died, or why somebody did that.
    """

    at: datetime
    kind: Literal[
        "published", "handed_over", "begun", "failed", "completed", "expired", "cancelled", "died", "replayed",
        "discarded", "edited",
    ]  # fmt: skip
    number: int = 0
    by: str | None = None
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Next:
    """What happens next, unless something comes between.

    Attributes:
        kind: It is `delayed`; it is `parked` in its lane, or `follows` another event; it waits to be handed over
            (`due`) or in the broker (`dispatched`), or it is `running`; it was `completed`, `discarded`, `edited` (what
            was corrected is another delivery), or replayed, completed and `purged`; or it is `dead`.
        number: The attempt that is running or comes next, or the dead letter.
        wait: Until it is due, is handed over again, or its lease ends; negative when that is past.
        kept_until: When what is completed may be purged.
        pause: What keeps it from being handed over.
        lane: Where it runs in order; of a dead letter, only if that blocks it.
        limit: What it may wait for before that.
        follows: The event whose consumers have to be done first.
    """

    kind: Literal[
        "delayed",
        "parked",
        "follows",
        "due",
        "dispatched",
        "running",
        "completed",
        "dead",
        "discarded",
        "edited",
        "purged",
    ]
    number: int = 0
    wait: timedelta = timedelta()
    kept_until: datetime | None = None
    pause: Pause | None = None
    lane: str | None = None
    limit: Limit | None = None
    follows: str | None = None


@dataclass(frozen=True, slots=True)
class DeliveryStory:
    """One consumer's part: how it stands, what happened, and what happens next."""

    delivery_id: UUID
    consumer: str
    queue: str
    state: str
    steps: list[Step]
    next: Next


@dataclass(frozen=True, slots=True)
class Story:
    """One event and all that is known of its deliveries."""

    event_id: UUID
    event_type: str
    version: int
    published_at: datetime
    payload: dict[str, Any] | None
    headers: dict[str, str]
    deliveries: list[DeliveryStory]


async def payload_of_event(connection: Connection, given: UUID) -> dict[str, Any] | None:
    """The payload of the event with this id, or of the delivery's event; `None` when nothing is known of it."""
    event_id = await connection.fetchval(_EVENT_ID, given) or event_of(given)
    found: dict[str, Any] | None = await connection.fetchval(_PAYLOAD, event_id, last_delivery_of(event_id))
    return found


async def tell(connection: Connection, given: UUID, keep: timedelta, *, masked: bool = False) -> Story | None:
    """The story of the event with this id, or of the delivery's event; `None` when nothing is known of it.

    Args:
        connection: One that reads JSON (`driver.read_json`).
        given: The id of an event or of a delivery.
        keep: How long completed deliveries are kept.
        masked: Whether the payload is left where it is, and `None` in the story.
    """
    event_id = await connection.fetchval(_EVENT_ID, given) or event_of(given)
    reach = event_id, last_delivery_of(event_id)
    find_rows = _ROWS.format(columns=_MASKED if masked else "*")
    find_dead = _DEAD.format(columns=dead_letters.MASKED if masked else "*")
    rows = {row["id"]: dict(row) for row in await connection.fetch(find_rows, *reach)}
    dead: dict[UUID, list[dict[str, Any]]] = {}
    for letter in await connection.fetch(find_dead, *reach):
        dead.setdefault(letter["message_id"], []).append(dict(letter))
    paused = {each.queue: each for each in await paused_queues(connection)}
    limited = {each.queue: each for each in await limited_queues(connection)}
    ids = sorted(rows.keys() | dead.keys())
    if not ids:
        return None
    first = rows.get(ids[0]) or dead[ids[0]][0]
    return Story(
        event_id=event_id,
        event_type=first["event_type"],
        version=first["version"],
        published_at=first["created_at"],
        payload=None if masked else first["payload"],
        headers=first["headers"],
        deliveries=[_delivery(each, rows.get(each), dead.get(each, []), paused, limited, keep) for each in ids],
    )


def _delivery(
    delivery_id: UUID,
    row: dict[str, Any] | None,
    dead: list[dict[str, Any]],
    paused: dict[str, Pause],
    limited: dict[str, Limit],
    keep: timedelta,
) -> DeliveryStory:
    latest = row or dead[-1]
    steps = [Step(latest["created_at"], "published")]
    for letter in dead:
        steps += _death(letter)
    if row is not None:
        steps += _life(row)
    return DeliveryStory(
        delivery_id=delivery_id,
        consumer=latest["consumer"],
        queue=latest["queue"],
        state=(row["ended_as"] or row["state"]) if row else (latest["resolution"] or "dead"),
        steps=sorted(steps, key=lambda step: step.at),
        next=_next(row, paused, limited, keep) if row else _after_death(latest),
    )


def _death(letter: dict[str, Any]) -> Iterator[Step]:
    yield from _errors(letter["errors"])
    yield Step(letter["died_at"], "died", letter["id"], why=letter["reason"])
    if letter["resolution"] is not None:
        yield Step(letter["resolved_at"], letter["resolution"], 0, letter["resolved_by"], letter["resolved_why"])


def _life(row: dict[str, Any]) -> Iterator[Step]:
    yield from _errors(row["errors"])
    if row["dispatched_at"] is not None:
        yield Step(row["dispatched_at"], "handed_over", row["dispatches"])
    failed_at = max((datetime.fromisoformat(each["at"]) for each in row["errors"] if "at" in each), default=None)
    if row["started_at"] is not None and (failed_at is None or row["started_at"] > failed_at):
        # A released attempt was refunded, so its number is used again.
        yield Step(row["started_at"], "begun", row["attempts"] + (row["state"] not in ("running", "completed")))
    if row["completed_at"] is not None:
        yield Step(row["completed_at"], row["ended_as"] or "completed")


def _errors(errors: list[dict[str, Any]]) -> Iterator[Step]:
    for error in errors:
        if "at" in error:
            why = f"{error.get('type')}: {error.get('message')}"
            yield Step(datetime.fromisoformat(error["at"]), "failed", int(error.get("attempt") or 0), why=why)


def _next(row: dict[str, Any], paused: dict[str, Pause], limited: dict[str, Limit], keep: timedelta) -> Next:
    state, wait = row["state"], row["due_in"]
    pause = paused.get(row["queue"]) or paused.get(EVERY_QUEUE)
    if state == "completed":
        return Next("completed", kept_until=row["completed_at"] + keep)
    if row["parked"]:
        if row["lane"] is None:
            return Next("follows", pause=pause, follows=row["headers"].get(AFTER))
        return Next("parked", pause=pause, lane=row["lane"])
    if state != "pending":
        return Next(state, row["attempts"], wait, pause=pause)
    fresh = row["attempts"] == 0 and not row["errors"]
    kind: Literal["delayed", "due"] = "delayed" if fresh and wait > timedelta(seconds=1) else "due"
    return Next(kind, row["attempts"] + 1, wait, pause=pause, limit=limited.get(row["queue"]))


def _after_death(letter: dict[str, Any]) -> Next:
    match letter["resolution"]:
        case None:
            return Next("dead", letter["id"], lane=letter["lane"] if letter["blocks"] else None)
        case "discarded" | "edited" as ended:
            return Next(ended)
    return Next("purged")

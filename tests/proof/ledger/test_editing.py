"""A dead letter is replayed with another payload, under an id of its own, and keeps what died."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

from service.database.driver import read_json
from service.errors import OutboxError, PublishError
from service.ledger import editing
from service.ledger.editing import Edited
from service.ledger.ids import MAX_CONSUMERS, delivery_id, new_event_id
from service.ledger.replaying import Resolved, StaysOpen, resolve
from service.outbox import Delivery, Event, consumer, corrections, upcaster
from tests.proof.ledger.conftest import Ledger
from tests.proof.ledger.looks import blocked
from tests.waiting import until

if TYPE_CHECKING:
    from service.outbox.running.runner import Runner
    from tests.proof.ledger.conftest import Connect

_COPY = """
INSERT INTO dead_letter (message_id, event_id, event_type, version, consumer, queue, payload, headers, attempts,
                         dispatches, created_at, errors, reason)
SELECT $1, event_id, event_type, version, consumer, queue, payload, headers, attempts, dispatches, created_at, errors,
       reason FROM dead_letter WHERE id = 1 RETURNING id
"""


@pytest.fixture
async def dead(ledger: Ledger, runner: Runner) -> UUID:
    """The id of a delivery whose event made its consumer give up: dead letter 1."""
    message_id = await ledger.happen("die")
    await runner.deliver(message_id)
    await read_json(ledger.connection)
    return message_id


async def _payload(ledger: Ledger) -> dict[str, Any]:
    payload: dict[str, Any] = await ledger.connection.fetchval("SELECT payload FROM dead_letter WHERE id = 1")
    return payload


async def _edit(ledger: Ledger, number: int = 1, **changes: Any) -> Edited:
    payload = await _payload(ledger) | {"how": ""} | changes
    edited = await corrections.edit(ledger.connection, number, payload, by="ann", why="a typing error")
    assert isinstance(edited, Edited)
    return edited


async def test_what_was_corrected_takes_effect_and_the_original_stays(
    ledger: Ledger, runner: Runner, dead: UUID
) -> None:
    edited = await _edit(ledger)
    await runner.deliver(dead)
    assert await ledger.effects(dead) == 0, "the old key has nothing to run any more"
    assert await ledger.state(edited.delivery_id) == "pending"
    await runner.deliver(edited.delivery_id)
    assert await ledger.effects(edited.delivery_id) == 1
    letter = await ledger.dead_letter(dead)
    assert letter is not None
    assert (letter["resolution"], letter["resolved_by"], letter["resolved_why"]) == ("edited", "ann", "a typing error")
    assert letter["payload"]["how"] == "die"
    row = await ledger.row(edited.delivery_id)
    assert row is not None
    assert (row["event_id"], row["consumer"], row["created_at"]) == (
        letter["event_id"], letter["consumer"], letter["created_at"]
    )  # fmt: skip


async def test_it_is_on_record_without_a_value(ledger: Ledger, dead: UUID) -> None:
    edited = await _edit(ledger)
    row = await ledger.connection.fetchrow("SELECT * FROM outbox_operation WHERE id = $1", edited.operation)
    assert row is not None
    assert (row["kind"], row["asked_by"], row["state"]) == ("edit", "ann", "finished")
    assert row["about"] == {"dead_letter": 1, "fields": ["how"], "delivery": str(edited.delivery_id)}


async def test_each_correction_of_an_event_has_an_id_that_no_delivery_had(ledger: Ledger, dead: UUID) -> None:
    first = await _edit(ledger)
    event_id = await ledger.connection.fetchval("SELECT event_id FROM dead_letter")
    assert first.delivery_id == delivery_id(event_id, MAX_CONSUMERS)
    await ledger.connection.execute("DELETE FROM outbox_message")  # it was completed, and purged
    other = await ledger.connection.fetchval(_COPY, delivery_id(event_id, 2))
    second = await _edit(ledger, other)
    assert second.delivery_id == delivery_id(event_id, MAX_CONSUMERS - 1)
    # What was corrected may die and be corrected again.
    again = await ledger.connection.fetchval(_COPY, second.delivery_id)
    await ledger.connection.execute("DELETE FROM outbox_message")
    assert (await _edit(ledger, again)).delivery_id == delivery_id(event_id, MAX_CONSUMERS - 2)


async def test_two_at_once_get_different_ids(ledger: Ledger, connect: Connect, dead: UUID) -> None:
    event_id = await ledger.connection.fetchval("SELECT event_id FROM dead_letter")
    other = await ledger.connection.fetchval(_COPY, delivery_id(event_id, 2))
    payload = await _payload(ledger) | {"how": ""}
    slow, onlooker = await connect(), Ledger(await connect(), ledger.sessions)
    async with slow.transaction():
        first = await editing.replace(slow, 1, payload, 1, fields=["how"], by="ann", why=None)
        waiting = asyncio.create_task(_edit(ledger, other))
        await until(lambda: blocked(onlooker))
    assert isinstance(first, Edited)
    assert (await waiting).delivery_id != first.delivery_id


async def test_an_event_without_a_number_left_is_refused(ledger: Ledger, dead: UUID) -> None:
    event_id = await ledger.connection.fetchval("SELECT event_id FROM dead_letter")
    for number in range(2, 256):
        await ledger.connection.execute(_COPY, delivery_id(event_id, number))
    with pytest.raises(OutboxError, match=f"{MAX_CONSUMERS} deliveries"):
        await _edit(ledger)
    assert await ledger.connection.fetchval("SELECT count(*) FROM dead_letter WHERE resolution IS NOT NULL") == 0


async def test_it_is_resolved_once(ledger: Ledger, dead: UUID) -> None:
    payload = await _payload(ledger) | {"how": ""}
    await _edit(ledger)
    again = await corrections.edit(ledger.connection, 1, payload, by="bob", why=None)
    assert isinstance(again, Resolved)
    assert (again.resolution, again.by) == ("edited", "ann")
    assert (await resolve(ledger.connection, "replay", [1], by="bob", why=None)).refused == [1]
    assert await corrections.edit(ledger.connection, 99, payload, by="bob", why=None) is None
    assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message") == 1


async def test_one_whose_delivery_is_there_is_left_alone(ledger: Ledger, dead: UUID) -> None:
    """Else its consumer would run twice."""
    payload = await _payload(ledger) | {"how": ""}
    await resolve(ledger.connection, "replay", [1], by="bob", why=None)
    other = await ledger.connection.fetchval(_COPY, dead)
    assert isinstance(await corrections.edit(ledger.connection, other, payload, by="ann", why=None), StaysOpen)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hwo": "", "how": "die"}, "Happened has no field hwo; it has subject_id, how"),
        ({"subject_id": "seven"}, "subject_id: Input should be a valid UUID"),
        ({"subject_id": None}, "subject_id"),
        ({"how": "x" * 9_000}, "over 8192"),
        ({"how": "a\x00"}, "NUL"),
        ({"how": "die"}, "nothing differs"),
    ],
)
async def test_what_its_consumer_could_not_read_is_refused(
    ledger: Ledger, dead: UUID, changes: dict[str, Any], says: str
) -> None:
    payload = await _payload(ledger) | changes
    with pytest.raises(PublishError, match=says):
        await corrections.edit(ledger.connection, 1, payload, by="ann", why=None)
    assert await ledger.connection.fetchval("SELECT resolution FROM dead_letter") is None
    assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message") == 0


async def test_what_the_class_has_dropped_since_is_in_nobodys_way(ledger: Ledger, dead: UUID) -> None:
    await ledger.connection.execute("""UPDATE dead_letter SET payload = payload || '{"gone": 1}'""")
    edited = await _edit(ledger)
    row = await ledger.row(edited.delivery_id)
    assert row is not None
    assert set(row["payload"]) == {"subject_id", "how", "raw"}
    await ledger.connection.execute(_COPY, delivery_id(new_event_id(), 1))
    with pytest.raises(PublishError, match="no field gone"):
        await _edit(ledger, 2, gone=2)


class Revised(Event, type="ledger.revised", version=3):
    subject_id: UUID
    cents: int
    currency: str


@upcaster(Revised, from_version=1)
def _count_cents(fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {"cents": 100 * fields.pop("euros")}


@upcaster(Revised, from_version=2)
def _add_currency(fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {"currency": "EUR"}


@consumer(Revised, queue="ledger", name="ledger.revise")
async def _revise(event: Revised, delivery: Delivery) -> None:
    """Nothing of it runs here."""


async def test_what_died_under_an_earlier_version_is_put_right_as_its_upcasters_make_it(
    ledger: Ledger, dead: UUID
) -> None:
    await ledger.connection.execute(
        "UPDATE dead_letter SET consumer = 'ledger.revise', event_type = 'ledger.revised', version = 1, "
        """payload = payload - 'how' || '{"euros": 5}'"""
    )
    row = await ledger.dead_letter(dead)
    assert row is not None
    letter = dict(row)
    payload, version = corrections.as_read_now(letter)
    assert (payload["cents"], payload["currency"], version) == (500, "EUR", 3)
    with pytest.raises(PublishError, match="Revised has no field euros"):
        await corrections.edit(ledger.connection, 1, letter["payload"] | {"euros": 6}, by="ann", why=None)
    edited = await corrections.edit(ledger.connection, 1, payload | {"cents": 600}, by="ann", why=None)
    assert isinstance(edited, Edited)
    row = await ledger.row(edited.delivery_id)
    assert row is not None
    assert (row["version"], row["payload"]["cents"], row["payload"]["currency"]) == (3, 600, "EUR")
    record = await ledger.connection.fetchval("SELECT about FROM outbox_operation WHERE id = $1", edited.operation)
    assert record["fields"] == ["cents"]


async def test_what_its_upcaster_cannot_read_is_refused(ledger: Ledger, dead: UUID) -> None:
    await ledger.connection.execute(
        "UPDATE dead_letter SET consumer = 'ledger.revise', event_type = 'ledger.revised', version = 1"
    )
    with pytest.raises(PublishError, match="an upcaster of Revised cannot read version 1 of it: KeyError"):
        await corrections.edit(ledger.connection, 1, {"cents": 1}, by="ann", why=None)


@pytest.mark.parametrize("column", ["consumer = 'ledger.gone'", "version = 2", "event_type = 'ledger.fanned_out'"])
async def test_only_code_that_knows_the_consumer_edits(ledger: Ledger, dead: UUID, column: str) -> None:
    await ledger.connection.execute(f"UPDATE dead_letter SET {column}")
    with pytest.raises(PublishError, match="this code has no consumer"):
        await _edit(ledger)

"""Events of earlier versions are read by today's consumers, and a version that could not be is found out at import."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

from service.errors import EventDefinitionError
from service.outbox import Delivery, Event, consumer, upcaster
from service.outbox.testing import published
from service.outbox.upcasting import check_upcasters, read
from tests.proof.ledger import domain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.outbox.running.runner import Runner
    from tests.proof.ledger.conftest import Ledger


class Priced(Event, type="ledger.priced", version=3):
    subject_id: UUID
    cents: int
    currency: str


@upcaster(Priced, from_version=2)
def add_currency(fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {"currency": "EUR"}


@upcaster(Priced, from_version=1)
def count_cents(fields: dict[str, Any]) -> dict[str, Any]:
    euros = fields.pop("euros")
    return fields | {"cents": 100 * euros}


class Gapped(Event, type="ledger.gapped", version=4):
    subject_id: UUID


SEEN: list[Priced] = []


@consumer(Priced, queue="ledger", name="ledger.charge")
async def charge(event: Priced, delivery: Delivery) -> None:
    SEEN.append(event)
    async with delivery.begin() as session:
        await domain.write_effect(session, delivery)


@pytest.fixture
def gap() -> Iterator[None]:
    """An event with upcasters from its versions 1 and 3."""
    from service.outbox import upcasting

    yield
    upcasting._BY_EVENT.pop("ledger.gapped", None)


@pytest.mark.parametrize(
    ("version", "stored"),
    [(1, {"euros": 5}), (2, {"cents": 500}), (3, {"cents": 500, "currency": "EUR"})],
)
async def test_a_consumer_knows_the_latest_version_alone(
    ledger: Ledger, runner: Runner, version: int, stored: dict[str, Any]
) -> None:
    event = Priced(subject_id=uuid4(), cents=500, currency="EUR")
    (message_id,) = await ledger.publish(event)
    await ledger.set(message_id, version=version, payload=json.dumps(stored | {"subject_id": str(event.subject_id)}))
    SEEN.clear()
    await runner.deliver(message_id)
    assert [event] == SEEN
    assert await ledger.effects(message_id) == 1
    async with ledger.sessions() as session:
        assert await published(session, Priced) == [event]


async def test_what_an_upcaster_raises_is_a_failure_like_any_other(ledger: Ledger, runner: Runner) -> None:
    (message_id,) = await ledger.publish(Priced(subject_id=uuid4(), cents=1, currency="EUR"))
    await ledger.set(message_id, version=1)
    await runner.deliver(message_id)
    row = await ledger.row(message_id)
    assert row is not None
    assert (row["state"], json.loads(row["errors"])[0]["type"]) == ("pending", "KeyError")


async def test_a_version_that_is_newer_than_the_code_is_left_to_others(ledger: Ledger, runner: Runner) -> None:
    (message_id,) = await ledger.publish(Priced(subject_id=uuid4(), cents=1, currency="EUR"))
    await ledger.set(message_id, version=4)
    await runner.deliver(message_id)
    row = await ledger.row(message_id)
    assert row is not None
    assert (row["state"], row["attempts"]) == ("pending", 0)


def test_an_event_without_upcasters_is_read_as_it_is() -> None:
    event = Gapped(subject_id=uuid4())
    assert read(Gapped, 1, event.model_dump_json()) == event


@pytest.mark.usefixtures("gap")
@pytest.mark.parametrize(("present", "missing"), [((1, 3), 2), ((2, 3), 1), ((1, 2), 3)])
def test_a_gap_is_found_when_the_events_are_there(present: tuple[int, ...], missing: int) -> None:
    for version in present:
        upcaster(Gapped, from_version=version)(lambda fields: fields)
    with pytest.raises(EventDefinitionError, match=f"Gapped has upcasters, but none from version {missing}"):
        check_upcasters()


@pytest.mark.parametrize("version", [0, 3, 4])
def test_one_from_a_version_that_is_not_before_the_latest_is_refused(version: int) -> None:
    with pytest.raises(EventDefinitionError, match="from_version must be from 1 to 2"):
        upcaster(Priced, from_version=version)


def test_two_from_one_version_are_refused() -> None:
    with pytest.raises(EventDefinitionError, match=r"from version 1 already: .*count_cents"):
        upcaster(Priced, from_version=1)(add_currency)

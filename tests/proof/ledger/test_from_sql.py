"""Events that SQL publishes reach their consumers as those of `publish` do, or become dead letters that say why."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from service.database.driver import read_json
from service.database.sessions import transaction
from service.ledger.editing import Edited
from service.ledger.ids import FAN_OUT, event_of
from service.outbox import cancel
from service.outbox.corrections import edit
from tests.proof.ledger.looks import all_completed
from tests.proof.ledger.working import working
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from service.dev.valkey import Valkey
    from service.outbox.running.runner import Runner
    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger


async def published(ledger: Ledger, type_: str = "ledger.fanned_out", **fields: Any) -> UUID:
    """The event's id."""
    found: UUID = await ledger.connection.fetchval(
        "SELECT outbox_publish($1, $2, 'ledger')", type_, json.dumps(fields or {"subject_id": str(uuid4())})
    )
    return found


async def delivery_of(ledger: Ledger, event_id: UUID, consumer: str = FAN_OUT) -> UUID:
    found: UUID = await ledger.connection.fetchval(
        "SELECT id FROM outbox_message WHERE event_id = $1 AND consumer = $2", event_id, consumer
    )
    return found


async def test_each_consumer_gets_the_event(ledger: Ledger, runner: Runner) -> None:
    subject_id = uuid4()
    event_id = await published(ledger, subject_id=str(subject_id))
    fan_out = await delivery_of(ledger, event_id)
    for _ in range(2):
        await runner.deliver(fan_out)
    rows = await ledger.connection.fetch(
        "SELECT * FROM outbox_message WHERE event_id = $1 AND consumer <> $2 ORDER BY id", event_id, FAN_OUT
    )
    assert [(row["consumer"], row["queue"]) for row in rows] == [("ledger.first", "ledger"), ("ledger.second", "other")]
    assert [row["id"].int - event_id.int for row in rows] == [1, 2]
    assert {row["payload"] for row in rows} == {json.dumps({"subject_id": str(subject_id)})}
    headers = json.loads(rows[0]["headers"])
    assert (headers["causation_id"], headers["correlation_id"]) == (str(fan_out), str(event_id))
    await runner.deliver(rows[0]["id"])
    assert await ledger.effects(rows[0]["id"]) == 1


async def test_its_id_is_in_the_order_of_time(ledger: Ledger) -> None:
    before = datetime.now(UTC).timestamp()
    ids = [await published(ledger) for _ in range(20)]
    after = datetime.now(UTC).timestamp()
    assert {(each.version, each.variant) for each in ids} == {(7, uuid4().variant)}
    assert all(event_of(each) == each for each in ids)
    assert all(int(before * 1000) - 1 <= each.int >> 80 <= int(after * 1000) + 1 for each in ids)
    assert len(set(ids)) == 20


async def test_it_is_there_with_its_transaction_or_not_at_all(ledger: Ledger) -> None:
    undone = ledger.connection.transaction()
    await undone.start()
    await published(ledger)
    await undone.rollback()
    assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message") == 0


@pytest.mark.parametrize(
    ("type_", "fields", "says"),
    [
        ("ledger.fanned_out", {"subject": 1}, "subject_id: Field required"),
        ("ledger.lonely", {"subject_id": str(uuid4())}, "nobody consumes"),
    ],
)
async def test_what_cannot_be_published_is_a_dead_letter_that_says_why(
    ledger: Ledger, runner: Runner, type_: str, fields: dict[str, Any], says: str
) -> None:
    message_id = await delivery_of(ledger, await published(ledger, type_, **fields))
    await runner.deliver(message_id)
    dead = await ledger.dead_letter(message_id)
    assert dead is not None
    assert says in json.loads(dead["errors"])[0]["message"]


async def test_a_dead_letter_of_it_is_corrected(ledger: Ledger, runner: Runner) -> None:
    event_id = await published(ledger, subject=str(uuid4()))
    message_id = await delivery_of(ledger, event_id)
    await runner.deliver(message_id)
    dead = await ledger.dead_letter(message_id)
    assert dead is not None
    await read_json(ledger.connection)
    done = await edit(ledger.connection, dead["id"], {"subject_id": str(uuid4())}, by="a test", why=None)
    assert isinstance(done, Edited)
    await runner.deliver(done.delivery_id)
    numbers = await ledger.connection.fetch("SELECT id FROM outbox_message WHERE event_id = $1 ORDER BY id", event_id)
    assert [row["id"].int - event_id.int for row in numbers] == [1, 2, 254]


async def test_a_field_that_only_newer_code_knows_is_passed_on(ledger: Ledger, runner: Runner) -> None:
    """A worker of the older release may take it over, and one of the newer run the consumer."""
    event_id = await published(ledger, subject_id=str(uuid4()), added_since="here")
    await runner.deliver(await delivery_of(ledger, event_id))
    first = await delivery_of(ledger, event_id, "ledger.first")
    assert await ledger.connection.fetchval("SELECT payload ->> 'added_since' FROM outbox_message WHERE id = $1", first)
    await runner.deliver(first)
    assert await ledger.effects(first) == 1


async def test_a_type_that_nobody_here_knows_is_left_to_others(ledger: Ledger, runner: Runner) -> None:
    message_id = await delivery_of(ledger, await published(ledger, "ledger.unheard"))
    await runner.deliver(message_id)
    row = await ledger.row(message_id)
    assert row is not None
    assert (row["state"], row["attempts"]) == ("pending", 0)
    assert "no event ledger.unheard of version 1 is deployed" in row["errors"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("'Placed', '{}', 'ledger'", "dotted type"),
        ("'a.b', '[]', 'ledger'", "JSON object"),
        ("'a.b', jsonb_build_object('a', repeat('x', 9000)), 'ledger'", "8192 bytes"),
        ("'a.b', '{}', 'no queue'", "name the queue"),
        ("'a.b', '{}', NULL", "name the queue"),
        ("'a.b', '{}', 'ledger', 0", "whole number"),
        ("'outbox.tick', '{}', 'ledger'", "template's own"),
        ("'a.b', '{}', 'ledger', order_key => ''", "1 to 255"),
        ("'a.b', '{}', 'ledger', order_key => repeat('x', 256)", "1 to 255"),
    ],
)
async def test_what_can_be_told_at_once_is_refused_at_once(ledger: Ledger, call: str, says: str) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError, match=says):
        await ledger.connection.execute(f"SELECT outbox_publish({call})")


async def test_it_is_cancelled_before_and_after_it_was_fanned_out(ledger: Ledger, runner: Runner) -> None:
    before, after = await published(ledger), await published(ledger)
    await runner.deliver(await delivery_of(ledger, after))
    for event_id in (before, after):
        async with transaction(ledger.sessions) as session:
            assert await cancel(session, event_id)
    await runner.deliver(await delivery_of(ledger, before))
    assert await all_completed(ledger)
    assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE event_id = $1", before) == 1


async def test_a_trigger_publishes_and_a_worker_of_that_queue_takes_it_over(
    ledger: Ledger, own_broker: Valkey, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    """As one that serves some queues only, and none of the template's own."""
    await ledger.connection.execute(
        """CREATE TABLE subject (id uuid PRIMARY KEY);
           CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
               PERFORM outbox_publish('ledger.happened', jsonb_build_object('subject_id', NEW.id), 'ledger');
               RETURN NULL;
           END $$;
           CREATE TRIGGER tell AFTER INSERT ON subject FOR EACH ROW EXECUTE FUNCTION tell()"""
    )
    async with working(environment, settings, tmp_path, "-p", "1", "-t", "4", "-Q", "ledger"):
        await ledger.connection.execute("INSERT INTO subject SELECT gen_random_uuid() FROM generate_series(1, 50)")
        await until(lambda: effects(ledger, 50))


async def effects(ledger: Ledger, count: int) -> bool:
    return bool(
        await ledger.connection.fetchval("SELECT count(*) FROM effect WHERE consumer = 'ledger.react'") == count
    )

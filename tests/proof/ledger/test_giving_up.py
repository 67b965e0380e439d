"""What a consumer knows of its attempts, and what is done about a delivery that is given up."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest

from service.errors import ConsumerDefinitionError
from service.ledger.replaying import resolve
from service.outbox import consumer
from service.outbox.consumers import consumer_named, consumers_of, registered_consumers
from tests.proof.ledger import domain
from tests.waiting import until

if TYPE_CHECKING:
    import asyncpg

    from service.outbox.running.runner import Runner
    from tests.proof.ledger.conftest import Ledger


async def abandoned(ledger: Ledger, how: str = "die", then: str = "") -> UUID:
    (message_id,) = await ledger.publish(domain.Abandoned(subject_id=uuid4(), how=how, then=then))
    return message_id


async def told(ledger: Ledger, message_id: UUID) -> list[asyncpg.Record]:
    """The deliveries that tell of this one's death, the oldest first."""
    return await ledger.connection.fetch(
        "SELECT * FROM outbox_message WHERE headers ->> 'causation_id' = $1 ORDER BY id", str(message_id)
    )


async def test_a_run_knows_whether_it_is_the_last_and_when_its_event_was_published(
    ledger: Ledger, runner: Runner
) -> None:
    message_id = await abandoned(ledger, "fail")
    row = await ledger.row(message_id)
    assert row is not None
    domain.seen.clear()
    for _ in range(2):
        await ledger.expire(message_id)
        await runner.deliver(message_id)
    assert domain.seen == [(1, False, row["created_at"]), (2, True, row["created_at"])]
    assert await ledger.state(message_id) == "dead"


async def test_what_dies_is_told_once(ledger: Ledger, runner: Runner) -> None:
    message_id = await abandoned(ledger)
    await runner.deliver(message_id)
    await runner.deliver(message_id)
    dead = await ledger.dead_letter(message_id)
    (row,) = await told(ledger, message_id)
    assert dead is not None
    assert (row["consumer"], row["queue"], row["event_type"]) == ("ledger.abandon.on_dead", "ledger", "delivery.died")
    for _ in range(2):
        await runner.deliver(row["id"])
    (note,) = await ledger.connection.fetch("SELECT note FROM effect WHERE message_id = $1", row["id"])
    assert note["note"] == f"{json.loads(dead['payload'])['subject_id']} {dead['id']}"
    assert await ledger.state(row["id"]) == "completed"


@pytest.mark.parametrize("how", ["fail", "commit"])
async def test_it_is_told_whatever_it_died_of(ledger: Ledger, runner: Runner, how: str) -> None:
    message_id = await abandoned(ledger, how)
    for _ in range(2):
        await ledger.expire(message_id)
        await runner.deliver(message_id)
    assert await ledger.state(message_id) == "dead"
    assert len(await told(ledger, message_id)) == 1


async def test_it_is_told_when_its_last_worker_was_lost(ledger: Ledger, runner: Runner) -> None:
    message_id = await abandoned(ledger)
    await ledger.set(message_id, state="dispatched", dispatches=2, attempts=2)
    await runner.deliver(message_id)
    dead = await ledger.dead_letter(message_id)
    assert dead is not None
    assert dead["reason"] == "worker lost"
    assert len(await told(ledger, message_id)) == 1


async def test_the_dead_letter_and_what_tells_of_it_are_there_together(ledger: Ledger, runner: Runner) -> None:
    """Where the one cannot be written, the other is not either; and the delivery is not lost."""
    message_id = await abandoned(ledger)
    await ledger.connection.execute(
        """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE insufficient_privilege; END $$;
           CREATE TRIGGER refuse BEFORE INSERT ON outbox_message FOR EACH ROW
           WHEN (NEW.event_type = 'delivery.died') EXECUTE FUNCTION refuse()"""
    )
    await runner.deliver(message_id)
    assert await ledger.state(message_id) == "running"
    assert await ledger.dead_letter(message_id) is None
    await ledger.connection.execute("DROP TRIGGER refuse ON outbox_message")
    await until(lambda: ledger.dead_letter(message_id))
    assert len(await told(ledger, message_id)) == 1


async def test_each_death_is_told(ledger: Ledger, runner: Runner) -> None:
    message_id = await abandoned(ledger)
    for _ in range(2):
        await runner.deliver(message_id)
        dead = await ledger.dead_letter(message_id)
        assert dead is not None
        await resolve(ledger.connection, "replay", [dead["id"]], by="a test", why=None)
    first, second = await told(ledger, message_id)
    assert json.loads(first["headers"])["dead_letter"] != json.loads(second["headers"])["dead_letter"]


async def test_what_is_told_fails_and_dies_like_any_other(ledger: Ledger, runner: Runner) -> None:
    message_id = await abandoned(ledger, then="fail")
    await runner.deliver(message_id)
    (row,) = await told(ledger, message_id)
    await runner.deliver(row["id"])
    assert await ledger.state(row["id"]) == "pending"
    await ledger.set(row["id"], attempts=10)
    await ledger.expire(row["id"])
    await runner.deliver(row["id"])
    assert await ledger.state(row["id"]) == "dead"
    assert await told(ledger, row["id"]) == []


async def test_what_nobody_here_knows_is_not_told(ledger: Ledger, runner: Runner) -> None:
    """Whoever could be told is not known either."""
    message_id = await abandoned(ledger)
    await ledger.set(message_id, version=2)
    await runner.deliver(message_id)
    await ledger.connection.execute(
        """UPDATE outbox_message SET due_at = clock_timestamp() - interval '1 s',
           errors = jsonb_set(errors, '{0,at}', to_jsonb(now() - interval '2 days')) WHERE id = $1""",
        message_id,
    )
    await runner.deliver(message_id)
    assert await ledger.state(message_id) == "dead"
    assert await told(ledger, message_id) == []


async def test_what_an_earlier_name_was_given_up_under_is_told_to_the_present_one(
    ledger: Ledger, runner: Runner
) -> None:
    message_id = await abandoned(ledger)
    await ledger.set(message_id, consumer="ledger.leave")
    await runner.deliver(message_id)
    (row,) = await told(ledger, message_id)
    assert row["consumer"] == "ledger.abandon.on_dead"
    await ledger.set(row["id"], consumer="ledger.leave.on_dead")
    await runner.deliver(row["id"])
    assert await ledger.effects(row["id"]) == 1


async def test_an_event_is_not_published_to_it(ledger: Ledger) -> None:
    assert [each.name for each in consumers_of(domain.Abandoned)] == ["ledger.abandon"]
    assert "ledger.abandon.on_dead" in [each.name for each in registered_consumers()]  # a worker has an actor for it


def test_it_must_be_like_a_consumer() -> None:
    async def nothing_taken() -> None: ...

    with pytest.raises(ConsumerDefinitionError, match="must take exactly"):
        consumer(domain.Abandoned, queue="ledger", name="ledger.other", on_dead=nothing_taken)(domain.abandon)
    assert consumer_named("ledger.other") is None

"""Publishers, workers, a person and a canceller at the same time, on the database: nothing is out of order, at the same
time as another, or stranded. Without any of the protections it is.
"""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import asyncpg
import pytest

from service.database.driver import bound_waits
from service.ledger import delivering, replaying
from service.ledger.ids import delivery_id, new_event_id
from service.ledger.lanes import standing
from tests.proof.lanes.planted import PROTECTIONS, SLOW, plant

if TYPE_CHECKING:
    from service.database.driver import Connection
    from tests.proof.ledger.conftest import Connect

LANES = ("a", "b")
EVENTS = 240
SCHEMA = """
CREATE TABLE counter (lane text PRIMARY KEY, n int NOT NULL);
INSERT INTO counter VALUES ('a', 0), ('b', 0);
CREATE TABLE ticket (id uuid PRIMARY KEY, number int NOT NULL);
CREATE TABLE ran (place bigint GENERATED ALWAYS AS IDENTITY, lane text NOT NULL, id uuid NOT NULL, beside int NOT NULL)
"""
INSERT = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers, lane, due_at)
VALUES ($1, $2, 'lanes.raced', 1, 'lanes.race', 'q', '{}', '{}', $3, outbox_parked())
"""
# Some publishers take a number that only a commit lets the next one have: theirs is an order that can be checked.
TICKET = """
WITH taken AS (UPDATE counter SET n = n + 1 WHERE lane = $2 RETURNING n)
INSERT INTO ticket SELECT $1, n FROM taken
"""
DUE = "SELECT id FROM outbox_message WHERE state = 'pending' AND due_at <= clock_timestamp() ORDER BY random() LIMIT 4"
RUN = """
INSERT INTO ran (lane, id, beside)
SELECT lane, id, (SELECT count(*) FROM outbox_message AS other
                  WHERE other.lane = mine.lane AND other.state <> 'completed' AND other.due_at < outbox_parked()) - 1
FROM outbox_message AS mine WHERE id = $1
"""
OPEN = "SELECT count(*) FROM outbox_message WHERE state <> 'completed'"
# The last one that waits: so that the newest row of the lane may be one that was cancelled.
CANCEL = """
UPDATE outbox_message SET state = 'completed', completed_at = now() WHERE id = (
    SELECT id FROM outbox_message WHERE lane = $1 AND state = 'pending' AND due_at = outbox_parked()
    ORDER BY position {} LIMIT 1)
"""
DISORDERED = """
SELECT count(*) FROM (
    SELECT number < max(number) OVER (PARTITION BY lane ORDER BY place ROWS UNBOUNDED PRECEDING) AS late
    FROM ran JOIN ticket USING (id)
) AS runs WHERE late
"""


class Race:
    """Everybody at once, for so many events."""

    def __init__(self, connect: Connect, seed: int, *, cancelling: bool) -> None:
        self._connect = connect
        self._cancelling = cancelling
        self._dice = random.Random(seed)
        self._left = EVENTS
        self._over = asyncio.Event()

    async def run(self) -> dict[str, int]:
        """What went wrong, by kind."""
        look = await self._opened()
        others = [*(self._work() for _ in range(3)), self._decide(), self._cancel()]
        tasks = [asyncio.create_task(each) for each in others]
        await asyncio.gather(*(self._publish(ticketed=number % 2 == 0) for number in range(6)))
        self._cancelling = False  # it would end by cancelling what is stranded
        with suppress(TimeoutError):
            async with asyncio.timeout(8):
                while await look.fetchval(OPEN):
                    await look.execute("SELECT pg_sleep(0.02)")
        self._over.set()
        await asyncio.gather(*tasks)
        stranded, _ = await standing(look, 1, only_stranded=True)
        return {
            "disordered": await look.fetchval(DISORDERED),
            "overlapping": await look.fetchval("SELECT count(*) FROM ran WHERE beside > 0"),
            "stranded": stranded + await look.fetchval(OPEN),
        }

    async def _opened(self) -> Connection:
        connection = await self._connect()
        await bound_waits(connection)
        return connection

    async def _publish(self, *, ticketed: bool) -> None:
        connection = await self._opened()
        while self._left > 0:
            self._left -= 1
            lane, event = self._dice.choice(LANES), new_event_id()
            async with connection.transaction():
                await connection.execute(INSERT, delivery_id(event, 1), event, lane)
                await asyncio.sleep(self._dice.random() * 0.01)
                if ticketed:
                    await connection.execute(TICKET, delivery_id(event, 1), lane)
            await asyncio.sleep(self._dice.random() * 0.15)  # or no lane would ever be empty

    async def _work(self) -> None:
        connection = await self._opened()
        while not self._over.is_set():
            for row in await connection.fetch(DUE):
                with suppress(asyncpg.DeadlockDetectedError):
                    await self._deliver(connection, row["id"])
            await asyncio.sleep(0.001)

    async def _deliver(self, connection: Connection, message_id: UUID) -> None:
        claim = await delivering.claim(connection, message_id, uuid4(), timedelta(seconds=60))
        while claim is not None:
            if self._dice.random() < 0.15:
                await delivering.die(connection, claim, {"type": "x", "message": "", "traceback": ""}, "poison")
                return
            async with connection.transaction():
                await connection.execute(RUN, claim.id)
                await asyncio.sleep(self._dice.random() * 0.005)
                await delivering.complete(connection, claim)
            if self._dice.random() < 0.5:
                return  # as a worker that dies before it has claimed the next one
            claim = await delivering.claim_next(connection, claim, uuid4(), timedelta(seconds=60), ["lanes.race"])

    async def _decide(self) -> None:
        """A person, who replays or discards whatever is dead."""
        connection = await self._opened()
        while not self._over.is_set():
            for row in await connection.fetch("SELECT id FROM dead_letter WHERE resolution IS NULL ORDER BY random()"):
                action: replaying.Action = "replay" if self._dice.random() < 0.6 else "discard"
                await replaying.resolve(connection, action, [row["id"]], by="ada", why=None)
            await asyncio.sleep(self._dice.random() * 0.06)

    async def _cancel(self) -> None:
        connection = await self._opened()
        while self._cancelling:
            order = self._dice.choice(("", "DESC"))
            with suppress(asyncpg.DeadlockDetectedError):
                async with connection.transaction():
                    await connection.execute(CANCEL.format(order), self._dice.choice(LANES))
                    await asyncio.sleep(0.02 if order == "" else 0)
            await asyncio.sleep(0.005)


async def raced(connection: Connection, connect: Connect, name: str | None, rounds: int = 1) -> dict[str, int]:
    """What went wrong in the first of so many rounds in which something did."""
    await connection.execute(SCHEMA)
    await plant(connection, SLOW)
    if name is not None:
        await plant(connection, PROTECTIONS[name])
    found: dict[str, int] = {}
    for seed in range(rounds):
        found = await Race(connect, seed, cancelling=name in (None, "cancelled_leaves", "passes_over")).run()
        if any(found.values()):
            break
    return found


@pytest.mark.slow
async def test_nothing_is_out_of_order(connection: Connection, connect: Connect) -> None:
    assert await raced(connection, connect, None) == {"disordered": 0, "overlapping": 0, "stranded": 0}
    assert await connection.fetchval("SELECT count(*) FROM ran") > EVENTS / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("publisher_locks", {"overlapping", "disordered", "stranded"}),
        ("ending_locks", {"stranded"}),
        ("looks_later", {"overlapping", "stranded"}),
        ("position_later", {"overlapping", "disordered", "stranded"}),
        ("resolving_locks", {"overlapping", "stranded"}),
        ("dead_letter_counts", {"overlapping", "disordered"}),
        ("cancelled_leaves", {"overlapping"}),
        ("passes_over", {"stranded"}),
    ],
)
async def test_without_a_protection_it_shows(
    connection: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch, name: str, kinds: set[str]
) -> None:
    if name == "ending_locks":
        monkeypatch.setattr(delivering, "_COMPLETED", "RETURNING true")
    if name == "resolving_locks":
        for statement in ("_REPLAY", "_DISCARD"):
            source = getattr(replaying, statement)
            without = source[: source.rindex(", outbox_lock_lanes(")] + "\n"
            monkeypatch.setattr(replaying, statement, without)
    found = await raced(connection, connect, name, rounds=40)
    assert any(found[kind] for kind in kinds), json.dumps(found)

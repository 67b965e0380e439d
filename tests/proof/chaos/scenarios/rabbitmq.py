"""The same system on RabbitMQ, where it is installed."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import aiormq

from tests.proof.chaos.gaps import RELAY_GAPS, WORKER_GAPS
from tests.proof.chaos.scenario import scenario
from tests.proof.chaos.scenarios.operators import SIX_HOURS_PASS
from tests.proof.chaos.world import REDISPATCHED, SHORT, Plan, World
from tests.proof.rabbitmq.server import Rabbitmq, programs

RABBITMQ = Plan(rabbitmq=True)


def installed() -> bool:
    """Whether this machine has it."""
    return programs() is not None


def _server(world: World) -> Rabbitmq:
    assert isinstance(world.broker_server, Rabbitmq)
    return world.broker_server


async def _control(world: World, *arguments: str) -> str:
    return await asyncio.to_thread(_server(world).control, *arguments)


@scenario(RABBITMQ, needs=installed, attempts=1)
async def rabbitmq_restarted(world: World) -> None:
    """Killed and started again, with its durable queues."""
    async with world.workers_away(("stock", "mail")):
        await asyncio.to_thread(_server(world).kill)
        await world.wait(2)
        await asyncio.to_thread(_server(world).start)
    await world.wait(1)


@scenario(RABBITMQ, needs=installed, attempts=1)
async def rabbitmq_queues_deleted(world: World) -> None:
    """Full queues are deleted while nobody consumes them, and then under load."""
    async with world.workers_away(("stock", "mail")):
        for queue in ("stock", "mail"):
            await _control(world, "delete_queue", queue)
    await world.until(REDISPATCHED, 10)
    for queue in ("stock", "mail"):
        await world.wait(1)
        await _control(world, "delete_queue", queue)
    await world.wait(2)


@scenario(Plan(rabbitmq=True, settings={**SHORT, "OUTBOX__HIGH_WATER_MARK": "30"}), needs=installed, attempts=1)
async def rabbitmq_full_queue_deleted(world: World) -> None:
    """A queue is deleted when it has reached its high-water mark, and the relay takes it for full."""
    async with world.workers_away(("stock",), least=30):
        # Each relay counts for itself what it hands over.
        assert world.held.most_waiting <= 2 * 30, f"{world.held.most_waiting} messages wait above the high-water mark"
        await _control(world, "delete_queue", "stock")
    await world.until(REDISPATCHED, 30)


async def _copies(world: World) -> Counter[str]:
    """How often each row is named in the queues."""
    connection = await aiormq.connect(world.broker_url)
    try:
        channel = await connection.channel()
        found: Counter[str] = Counter()
        for queue in ("stock", "mail"):
            while (message := await channel.basic_get(queue)).delivery_tag is not None:
                found[json.loads(message.body)["args"][0]] += 1
        return found
    finally:
        await connection.close()  # and all of it goes back


@scenario(
    Plan(rabbitmq=True, settings={**SHORT, "OUTBOX__HIGH_WATER_MARK": "50"}), rate=30, needs=installed, attempts=1
)
async def rabbitmq_workers_off_for_two_days(world: World) -> None:
    """No worker runs while requests come in and two days pass, by the rows' own times."""
    async with world.workers_away(("stock", "mail"), least=20):
        for _ in range(8):
            await world.wait(1)
            await world.sql(SIX_HOURS_PASS)
        copies = await _copies(world)
        assert copies
        assert max(copies.values()) <= 4, copies.most_common(3)
        assert world.held.most_waiting <= 2 * 50, f"{world.held.most_waiting} messages wait above the high-water mark"
        await world.ledger.stop_load()


@scenario(RABBITMQ, needs=installed, attempts=1)
async def rabbitmq_out_of_memory(world: World) -> None:
    """The memory alarm blocks whoever publishes."""
    await world.wait(1.5)
    await asyncio.to_thread(_server(world).fill_memory)
    await world.wait(5)
    await asyncio.to_thread(_server(world).free_memory)


@scenario(RABBITMQ, needs=installed, attempts=1)
async def rabbitmq_drops_clients(world: World) -> None:
    """Every connection is closed by the server, three times."""
    for _ in range(3):
        await world.wait(1.5)
        await _control(world, "close_all_connections", "by the suite")
    await world.wait(1)


@scenario(Plan(rabbitmq=True, gaps=",".join(f"{gap}=kill:1" for gap in (*WORKER_GAPS, *RELAY_GAPS))), needs=installed)
async def rabbitmq_kill_in_gaps(world: World) -> None:
    """Relays and workers die in every gap."""
    await world.strike_each((*WORKER_GAPS, *RELAY_GAPS), 0.5)


@scenario(Plan(rabbitmq=True, proxied=True), within=75, needs=installed)
async def rabbitmq_network(world: World) -> None:
    """Stalls, resets and a half-open connection between relays, workers and RabbitMQ."""
    for mode in ("reset", "stall", "reset"):
        await world.network.set("*:broker", mode)
        await world.wait(3)
        await world.network.set("*", "clear")
    await world.network.set("relay-1:broker", "half_open")
    await world.network.set("worker-1:broker", "half_open")
    await world.wait(3)


_ODD = ("", "{", "null", "[]", '{"queue_name": "stock"}', json.dumps({"queue_name": "mail", "actor_name": "chaos.book",
        "args": ["x"], "kwargs": {}, "options": {}, "message_id": "m", "message_timestamp": 1}))  # fmt: skip


@scenario(RABBITMQ, within=45, needs=installed)
async def rabbitmq_odd_messages(world: World) -> None:
    """Bodies that no relay would write."""
    connection = await aiormq.connect(world.broker_url)
    try:
        channel = await connection.channel()
        for body in _ODD * 3:
            await channel.basic_publish(body.encode(), routing_key="stock")
            await world.wait(0.2)
    finally:
        await connection.close()

"""The same system on RabbitMQ, where it is installed."""

from __future__ import annotations

import asyncio
import json

import aiormq

from tests.chaos.gaps import RELAY_GAPS, WORKER_GAPS
from tests.chaos.scenario import scenario
from tests.chaos.world import Plan, World
from tests.rabbitmq.server import Rabbitmq, programs

RABBITMQ = Plan(rabbitmq=True)


def _installed() -> bool:
    return programs() is not None


def _server(world: World) -> Rabbitmq:
    assert isinstance(world.broker_server, Rabbitmq)
    return world.broker_server


async def _control(world: World, *arguments: str) -> str:
    return await asyncio.to_thread(_server(world).control, *arguments)


@scenario(RABBITMQ, within=45, needs=_installed)
async def rabbitmq_restarted(world: World) -> None:
    """Killed and started again, with its durable queues."""
    await world.wait(2)
    await asyncio.to_thread(_server(world).kill)
    await world.wait(2)
    await asyncio.to_thread(_server(world).start)
    await world.wait(1)


@scenario(RABBITMQ, within=60, needs=_installed)
async def rabbitmq_queues_deleted(world: World) -> None:
    """Queues are deleted under load."""
    for queue in ("stock", "mail", "stock"):
        await world.wait(1)
        await _control(world, "delete_queue", queue)
    await world.wait(2)


@scenario(RABBITMQ, within=45, needs=_installed)
async def rabbitmq_out_of_memory(world: World) -> None:
    """The memory alarm blocks whoever publishes."""
    await world.wait(1.5)
    await asyncio.to_thread(_server(world).fill_memory)
    await world.wait(5)
    await asyncio.to_thread(_server(world).free_memory)


@scenario(RABBITMQ, within=45, needs=_installed)
async def rabbitmq_drops_clients(world: World) -> None:
    """Every connection is closed by the server, three times."""
    for _ in range(3):
        await world.wait(1.5)
        await _control(world, "close_all_connections", "by the suite")
    await world.wait(1)


@scenario(Plan(rabbitmq=True, gaps=",".join(f"{gap}=kill:0.05" for gap in (*WORKER_GAPS, *RELAY_GAPS))),
          within=45, needs=_installed)  # fmt: skip
async def rabbitmq_kill_in_gaps(world: World) -> None:
    """Relays and workers die in every gap."""
    world.arm()
    await world.wait(12)


@scenario(Plan(rabbitmq=True, proxied=True), within=75, needs=_installed)
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


@scenario(RABBITMQ, within=45, needs=_installed)
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

"""How quickly work goes on with the settings as shipped; run by `make chaos SLOW=1`.

What a killed worker was running runs again within 45 s; what it had only prefetched, or the broker lost, within
T + 15 s, where T is 60 s.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from tests.proof.chaos.scenario import scenario
from tests.proof.chaos.scenarios.rabbitmq import installed
from tests.proof.chaos.world import Plan, World
from tests.proof.rabbitmq.server import Rabbitmq

_AS_SHIPPED = Plan(settings={}, processes=1, forked=False)
_ON_RABBITMQ = replace(_AS_SHIPPED, rabbitmq=True)
_FEW = {"OUTBOX__CONCURRENCY": "4"}
"""Or there would be room for all, and nothing that waits for it."""
_RUNNING = "SELECT count(*) FROM outbox_message WHERE state = 'running' AND consumer = 'chaos.book'"
_COMPLETED = "SELECT count(*) FROM outbox_message WHERE state = 'completed'"
_WAITING = "SELECT count(*) FROM outbox_message WHERE state = 'dispatched'"


def _kill_workers(world: World) -> None:
    for name in world.fleet.names("worker"):
        world.fleet.kill(name)


async def _running(world: World) -> None:
    world.hold()
    for _ in range(4):
        await world.place_surely("held")
    await world.until(_RUNNING, 4)
    await world.until(_COMPLETED, 4)
    _kill_workers(world)
    world.hold(held=False)


async def _prefetched(world: World) -> None:
    world.hold()
    for _ in range(16):
        await world.place_surely("held")
    await world.until(_RUNNING, 8)
    for _ in range(10):
        await world.place_surely()
    await world.until(_WAITING, 18)
    _kill_workers(world)
    world.hold(held=False)


async def _lost(world: World) -> None:
    workers = world.fleet.names("worker")
    await world.fleet.stop(*workers)
    for _ in range(20):
        await world.place_surely()
    await world.until(_WAITING, 40)
    if isinstance(world.broker_server, Rabbitmq):
        for queue in ("stock", "mail"):
            await asyncio.to_thread(world.broker_server.control, "delete_queue", queue)
    else:
        async with world.broker() as broker:
            await broker.flushall()
    world.in_background(world.fleet.start(*workers))


@scenario(_AS_SHIPPED, rate=0, within=45, slow=True)
async def slow_running_work(world: World) -> None:
    """Workers are killed in mid-run, and hold nothing else."""
    await _running(world)


@scenario(replace(_AS_SHIPPED, settings=_FEW), rate=0, within=75, slow=True)
async def slow_prefetched_work(world: World) -> None:
    """Workers are killed while they hold messages that nobody has begun."""
    await _prefetched(world)


@scenario(_AS_SHIPPED, rate=0, within=75, slow=True, attempts=1)
async def slow_lost_by_the_broker(world: World) -> None:
    """The broker forgets everything while no worker is there to take it."""
    await _lost(world)


@scenario(_ON_RABBITMQ, rate=0, within=45, slow=True, needs=installed)
async def slow_running_work_rabbitmq(world: World) -> None:
    """Workers are killed in mid-run, and hold nothing else."""
    await _running(world)


@scenario(replace(_ON_RABBITMQ, settings=_FEW), rate=0, within=75, slow=True, needs=installed)
async def slow_prefetched_work_rabbitmq(world: World) -> None:
    """Workers are killed while they hold messages that nobody has begun."""
    await _prefetched(world)


@scenario(_ON_RABBITMQ, rate=0, within=75, slow=True, attempts=1, needs=installed)
async def slow_lost_by_rabbitmq(world: World) -> None:
    """The queues are deleted while no worker is there to take what waits in them."""
    await _lost(world)


@scenario(_AS_SHIPPED, rate=5, within=75, slow=True)
async def slow_half_open(world: World) -> None:
    """A relay and a worker stand still for longer than a lease, under load."""
    world.fleet.freeze("relay-1")
    world.fleet.freeze("worker-1")
    await world.wait(40)

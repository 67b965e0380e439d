"""Numbers that must be taken in the order in which requests committed: under attack, and without what protects it."""

from __future__ import annotations

import json
from dataclasses import replace

from tests.proof.chaos.gaps import WORKER_GAPS
from tests.proof.chaos.scenario import scenario
from tests.proof.chaos.scenarios.operators import outbox
from tests.proof.chaos.world import LONGER_THAN_A_LEASE, Plan, World
from tests.proof.lanes.planted import PROTECTIONS, SLOW, Change, plant

_ORDERED = Plan(ordered=4)
_END_BACKENDS = """
SELECT pg_terminate_backend(pid) FROM (
    SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
    ORDER BY random() LIMIT 3) AS victims
"""


@scenario(_ORDERED, within=60)
async def order_among_crashes(world: World) -> None:
    """Processes are killed, sessions end, the broker forgets all it has."""
    for turn in range(9):
        match turn % 3:
            case 0:
                name = world.dice.choice(world.fleet.names())
                world.fleet.kill(name)
            case 1:
                await world.sql(_END_BACKENDS)
            case 2:
                async with world.broker() as broker:
                    await broker.flushall()
        await world.wait(world.dice.uniform(0.5, 1.5))


@scenario(replace(_ORDERED, gaps=",".join(f"{gap}=stop:1" for gap in WORKER_GAPS), struck="worker-1"), within=60)
async def order_among_zombies(world: World) -> None:
    """Workers stand still for longer than a lease in each gap, and go on when another has the number."""
    await world.strike_each(("worker.after_claim", "worker.mid_effect", "worker.after_complete"), LONGER_THAN_A_LEASE)


@scenario(_ORDERED, within=60)
async def order_among_dead_letters(world: World) -> None:
    """One in ten dies, its key stands, and two people replay all there is, again and again."""
    world.hold()
    for _ in range(4):
        await world.wait(1)
        await _replay(world)
    world.hold(held=False)
    for _ in range(100):
        await world.wait(0.5)
        if not await _replay(world):
            break


async def _replay(world: World) -> int:
    answer = json.loads(await outbox(world, "dead-letters", "replay", "--all", "--yes", "--json", expected=(0, 4)))
    return len(answer.get("done", []))


async def _crowd(world: World, *changes: Change) -> None:
    """Time between a look and what follows from it; but not so much that a key would always have something waiting."""
    connection = await world.connect()
    world.keep_open(connection)
    slow = tuple((function, old, new.replace("0.01", "0.05")) for function, old, new in SLOW)
    await plant(connection, (*slow, *changes))
    await world.wait(10)


@scenario(_ORDERED, within=60)
async def order_in_a_crowd(world: World) -> None:
    """Nothing is wrong."""
    await _crowd(world)


@scenario(_ORDERED, accuses="stranded", within=60)
async def bug_publisher_without_lock(world: World) -> None:
    """Who comes sees somebody before, and who leaves sees nobody behind."""
    await _crowd(world, *PROTECTIONS["publisher_locks"])


@scenario(_ORDERED, accuses="stranded", within=60)
async def bug_look_before_the_lock(world: World) -> None:
    """What was seen is no longer so when it is acted on."""
    await _crowd(world, *PROTECTIONS["looks_later"])


@scenario(replace(_ORDERED, bug="completion_without_lock"), accuses="stranded", within=60)
async def bug_completion_without_lock(world: World) -> None:
    """The same, where it is the one who leaves that does not wait for the other."""
    await _crowd(world, *PROTECTIONS["ending_locks"])


@scenario(_ORDERED, accuses="out of order", within=60)
async def bug_publish_past_a_dead_letter(world: World) -> None:
    """What comes does not look whether something has died before it."""
    connection = await world.connect()
    world.keep_open(connection)
    await plant(connection, PROTECTIONS["dead_letter_counts"])
    world.hold()
    await world.wait(8)
    world.hold(held=False)
    await _replay(world)

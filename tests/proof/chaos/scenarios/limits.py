"""A queue is limited, while relays and workers die and the broker forgets; and systems that do not keep to it."""

from __future__ import annotations

from dataclasses import replace

from tests.proof.chaos.gaps import RELAY_GAPS
from tests.proof.chaos.limited import Limited
from tests.proof.chaos.scenario import scenario
from tests.proof.chaos.scenarios.operators import outbox
from tests.proof.chaos.world import LONGER_THAN_A_LEASE, SHORT, Plan, World

_AT_ONCE = Limited("mail", concurrency=3)
_RATE = Limited("mail", rate=6)
_BOTH = Limited("mail", concurrency=3, rate=30, burst=3)

_LOAD = 8
_LITTLE = 4
_HARDLY_ANY = 2
_WITHIN = 60
# Runs that last, so that those which should not be there at once are.
_LONG = {**SHORT, "CHAOS_PAUSE": "0.8"}
_LONG_RUNS = Plan(settings=_LONG)
_RELAYS_DIE = Plan(settings=_LONG, gaps=f"{RELAY_GAPS[1]}=kill:0.3")
_SLOW_RELAYS = Plan(settings=_LONG, gaps=f"{RELAY_GAPS[1]}=sleep:0.5")


async def _limit(world: World, limit: Limited) -> None:
    """Set it, and judge by it from now on."""
    await outbox(world, "queues", "limit", *limit.options)
    world.limit(limit)


@scenario(rate=_LOAD, within=_WITHIN)
async def limited_while_all_dies(world: World) -> None:
    """At once and in a second; workers and relays are killed, and the broker forgets everything."""
    await _limit(world, _BOTH)
    for _ in range(5):
        await world.wait(world.dice.uniform(0.5, 1.5))
        world.fleet.kill(world.dice.choice([*world.fleet.names("worker"), *world.fleet.names("relay")]))
        async with world.broker() as broker:
            await broker.flushall()


_IN_FLIGHT = "SELECT coalesce(-cardinality(waiting || running), -1000) FROM limited_queue"


@scenario(rate=_LOAD, within=_WITHIN)
async def limit_changed_and_removed(world: World) -> None:
    """It is set while much is in flight, narrowed and taken away; what was handed over before is waited for."""
    async with world.workers_away(("mail",), least=20):
        await outbox(world, "queues", "limit", *_AT_ONCE.options)
    for limit in (_AT_ONCE, Limited("mail", concurrency=1)):
        await outbox(world, "queues", "limit", *limit.options)
        await world.until(_IN_FLIGHT, -(limit.concurrency or 0))
        world.limit(limit)
        await world.wait(2)
    world.limit(None)
    await outbox(world, "queues", "unlimit", "mail")


async def _away(world: World, limit: Limited) -> None:
    """No worker is there for longer than what was handed over waits for one, twice; then all are back at once."""
    await _limit(world, limit)
    await world.wait(1)
    await world.fleet.stop(*world.fleet.names("worker"))
    await world.wait(3 * LONGER_THAN_A_LEASE)
    await world.fleet.start(*world.fleet.names("worker"))
    await world.wait(3)


async def _deaths(world: World) -> None:
    await _limit(world, _AT_ONCE)
    world.arm()
    await world.wait(12)
    world.disarm()
    await world.wait(4)  # a relay that has just been started again is not to be told to end


@scenario(_LONG_RUNS, rate=_LITTLE, within=_WITHIN)
async def limited_at_once_without_workers(world: World) -> None:
    """What was handed over comes due again, with its message still in the broker."""
    await _away(world, _AT_ONCE)


@scenario(replace(_LONG_RUNS, bug="slots_end_when_due"), rate=_LITTLE, accuses="at once", within=_WITHIN)
async def bug_slots_end_when_due(world: World) -> None:
    """The same where that gives its slot to another."""
    await _away(world, _AT_ONCE)


@scenario(rate=_HARDLY_ANY, within=_WITHIN)
async def limited_rate_without_workers(world: World) -> None:
    """Nothing starts for a while, and then no more than at any other time."""
    await _away(world, _RATE)


@scenario(Plan(bug="rate_of_hand_overs"), rate=_HARDLY_ANY, accuses="started in", within=_WITHIN)
async def bug_rate_of_hand_overs(world: World) -> None:
    """The same where the rate is that of the hand-overs."""
    await _away(world, _RATE)


@scenario(_RELAYS_DIE, rate=_LITTLE, within=_WITHIN)
async def limited_while_relays_die(world: World) -> None:
    """They die between the broker and their commit: messages are there that nobody knows of."""
    await _deaths(world)


@scenario(replace(_RELAYS_DIE, bug="claim_without_slot"), rate=_LITTLE, accuses="at once", within=_WITHIN)
async def bug_claim_without_slot(world: World) -> None:
    """The same where a worker claims whatever is due."""
    await _deaths(world)


@scenario(_SLOW_RELAYS, rate=_LITTLE, within=_WITHIN)
async def limited_by_slow_relays(world: World) -> None:
    """One relay takes half a second to commit, while the other looks for room."""
    await _deaths(world)


@scenario(replace(_SLOW_RELAYS, bug="limit_without_lock"), rate=_LITTLE, accuses="at once", within=_WITHIN)
async def bug_limit_without_lock(world: World) -> None:
    """The same where the queue's row is not locked."""
    await _deaths(world)

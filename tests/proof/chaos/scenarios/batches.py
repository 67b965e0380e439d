"""Bookings are made many at once, while everything dies that may."""

from __future__ import annotations

from tests.proof.chaos.gaps import WORKER_GAPS
from tests.proof.chaos.scenario import scenario
from tests.proof.chaos.world import LONGER_THAN_A_LEASE, SHORT, Plan, World

_BATCHES = {**SHORT, "CHAOS_BATCH": "20"}
_LOAD = 40


@scenario(Plan(settings=_BATCHES), rate=_LOAD)
async def batches_while_all_dies(world: World) -> None:
    """Workers and relays are killed, or stand still past a batch's leases, and the broker forgets everything."""
    for _ in range(6):
        await world.wait(world.dice.uniform(0.5, 1.5))
        name = world.dice.choice([*world.fleet.names("worker"), *world.fleet.names("relay")])
        if world.dice.random() < 0.7:
            world.fleet.kill(name)
        else:
            world.fleet.freeze(name)
            await world.wait(LONGER_THAN_A_LEASE)
            world.resume()
        async with world.broker() as broker:
            await broker.flushall()


@scenario(Plan(settings=_BATCHES, gaps=",".join(f"{gap}=kill:1" for gap in WORKER_GAPS)), rate=_LOAD)
async def batches_killed_in_gaps(world: World) -> None:
    """SIGKILL around the claim, in mid-effect, around the completion, after COMMIT, before the acknowledgements."""
    await world.strike_each(WORKER_GAPS, 0.5)

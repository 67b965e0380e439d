"""Processes that die or stand still, at random moments and at each gap between two steps."""

from __future__ import annotations

from tests.chaos.gaps import API_GAPS, RELAY_GAPS, WORKER_GAPS
from tests.chaos.scenario import scenario
from tests.chaos.world import Plan, World

LONGER_THAN_A_LEASE = 4.5


@scenario()
async def kill_anything(world: World) -> None:
    """SIGKILL of the API, relays, worker masters and their children, at random."""
    for _ in range(14):
        name = world.dice.choice(world.fleet.names())
        part = world.dice.choice((world.fleet.pids, world.fleet.leader, world.fleet.children))
        world.fleet.kill(name, part(name))
        await world.wait(world.dice.uniform(0.3, 1.2))


@scenario()
async def kill_all_workers(world: World) -> None:
    """Every worker at once, three times, in mid-run."""
    for _ in range(3):
        await world.wait(2.5)
        for name in world.fleet.names("worker"):
            world.fleet.kill(name)


@scenario(Plan(gaps=",".join(f"{gap}=kill:0.04" for gap in WORKER_GAPS)))
async def kill_workers_in_gaps(world: World) -> None:
    """SIGKILL around the claim, in mid-effect, after sending, around the completion, after COMMIT, before the ack."""
    world.arm()
    await world.wait(14)


@scenario(Plan(gaps=",".join(f"{gap}=kill:0.12" for gap in (*RELAY_GAPS, *API_GAPS))))
async def kill_relays_and_api_in_gaps(world: World) -> None:
    """SIGKILL before and after publishing, after the dispatch committed, and around a request's commit."""
    world.arm()
    await world.wait(12)


@scenario(Plan(gaps=",".join(f"{gap}=stop:0.03" for gap in WORKER_GAPS), struck="worker-1"))
async def zombies_in_gaps(world: World) -> None:
    """Workers that stand still in each gap for longer than their lease, and then go on as if nothing had happened."""
    world.arm()
    for _ in range(3):
        await world.wait(LONGER_THAN_A_LEASE)
        world.fleet.resume()


@scenario()
async def freeze_anything(world: World) -> None:
    """SIGSTOP of whole processes for less and for more than a lease."""
    for seconds in (1.0, LONGER_THAN_A_LEASE, LONGER_THAN_A_LEASE):
        for name in world.dice.sample(world.fleet.names(), 3):
            world.fleet.freeze(name)
        await world.wait(seconds)
        world.fleet.resume()
        await world.wait(1)


@scenario(Plan(gaps=",".join(f"{gap}=stop:0.08" for gap in RELAY_GAPS), struck="relay-1"))
async def freeze_relays_in_gaps(world: World) -> None:
    """Relays that stand still with a transaction open, before and after they published."""
    world.arm()
    for _ in range(3):
        await world.wait(LONGER_THAN_A_LEASE)
        world.fleet.resume()

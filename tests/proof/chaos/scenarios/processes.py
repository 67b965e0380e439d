"""Processes that die or stand still, at random moments and at each gap between two steps."""

from __future__ import annotations

from functools import partial

from tests.proof.chaos.gaps import API_GAPS, RELAY_GAPS, WORKER_GAPS
from tests.proof.chaos.scenario import scenario
from tests.proof.chaos.world import LONGER_THAN_A_LEASE, Plan, World
from tests.waiting import until

LONGER_THAN_A_TRANSACTION = 12.0
"""Seconds after which PostgreSQL ends the session of a relay that stands still with a transaction open."""


def _gaps(action: str, *gaps: str) -> str:
    return ",".join(f"{gap}={action}:1" for gap in gaps)


@scenario()
async def kill_anything(world: World) -> None:
    """SIGKILL of APIs, relays, worker masters, and one or all of their children, at random."""
    for _ in range(12):
        name = world.dice.choice(world.fleet.names())
        parts = (world.fleet.pids, world.fleet.leader)
        world.fleet.kill(name, world.dice.choice(parts)(name))
        await world.wait(world.dice.uniform(0.3, 1.2))


@scenario()
async def kill_children(world: World) -> None:
    """SIGKILL of one of a worker's processes, again and again; its siblings end in good order."""
    for _ in range(6):
        name = world.dice.choice(world.fleet.names("worker"))
        children = await until(partial(world.fleet.children, name), what=f"a process of {name}")
        world.fleet.kill(name, frozenset([world.dice.choice(sorted(children))]))
        await world.wait(world.dice.uniform(0.5, 2))


@scenario()
async def kill_all_workers(world: World) -> None:
    """Every worker at once, three times, in mid-run."""
    for _ in range(3):
        await world.wait(2.5)
        for name in world.fleet.names("worker"):
            world.fleet.kill(name)


@scenario(Plan(gaps=_gaps("kill", *WORKER_GAPS)))
async def kill_workers_in_gaps(world: World) -> None:
    """SIGKILL around the claim, in mid-effect, after sending, around the completion, after COMMIT, before the ack."""
    await world.strike_each(WORKER_GAPS, 0.5)


@scenario(Plan(gaps=_gaps("kill", *RELAY_GAPS, *API_GAPS)), attempts=1)
async def kill_relays_and_api_in_gaps(world: World) -> None:
    """SIGKILL before and after publishing, after the dispatch committed, and around a request's commit, twice."""
    await world.strike_each((*RELAY_GAPS, *API_GAPS) * 2, 0.5)


@scenario(Plan(gaps=_gaps("drop", *WORKER_GAPS)))
async def drop_workers_connections_in_gaps(world: World) -> None:
    """The connections of a worker's process break in each gap; nothing excuses a repeated effect."""
    await world.strike_each(WORKER_GAPS * 2, 0.3)


@scenario(Plan(gaps=_gaps("drop", *RELAY_GAPS, *API_GAPS)), attempts=1)
async def drop_relays_and_apis_connections_in_gaps(world: World) -> None:
    """The same of relays and of the APIs."""
    await world.strike_each((*RELAY_GAPS, *API_GAPS) * 2, 0.3)


@scenario(Plan(gaps=_gaps("stop", *WORKER_GAPS), struck="worker-1"))
async def zombies_in_gaps(world: World) -> None:
    """Workers that stand still in each gap for longer than their lease, and then go on as if nothing had happened."""
    await world.strike_each(WORKER_GAPS, LONGER_THAN_A_LEASE)


@scenario()
async def freeze_anything(world: World) -> None:
    """SIGSTOP of whole processes for less and for more than a lease."""
    for seconds in (1.0, LONGER_THAN_A_LEASE, LONGER_THAN_A_LEASE):
        for name in world.dice.sample(world.fleet.names(), 3):
            world.fleet.freeze(name)
        await world.wait(seconds)
        world.resume()
        await world.wait(1)


@scenario(Plan(gaps=_gaps("stop", *RELAY_GAPS, *API_GAPS), struck="*-1"), attempts=1)
async def freeze_relays_and_api_in_gaps(world: World) -> None:
    """Relays and an API stand still with a transaction open, before and after they published or committed."""
    await world.strike_each((*RELAY_GAPS, *API_GAPS), LONGER_THAN_A_LEASE)


@scenario(Plan(gaps=_gaps("stop", "relay.after_publish"), struck="relay-1"), attempts=1)
async def relay_frozen_in_its_transaction(world: World) -> None:
    """A relay stands still with rows handed over and locked, until PostgreSQL gives them to the other."""
    await world.strike_each(("relay.after_publish",), LONGER_THAN_A_TRANSACTION)

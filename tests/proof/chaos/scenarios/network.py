"""Latency, stalls, resets, half-open connections and lost messages between every two processes.

Nothing is said of faults at the database's link: a run that cannot reach it tries again until its lease ends, so only
what lasts longer than a lease explains a repeated effect.
"""

from __future__ import annotations

import time

from tests.proof.chaos.scenario import scenario
from tests.proof.chaos.world import LONGER_THAN_A_LEASE, Plan, World

PROXIED = Plan(proxied=True)
LINKS = ("client:*", "api-*:database", "relay-*:database", "worker-*:database", "relay-*:broker", "worker-*:broker",
         "worker-*:sink")  # fmt: skip


async def _each(world: World, mode: str, seconds: float, value: float = 0.0) -> None:
    for link in LINKS:
        began = time.time()
        await world.network.set(link, mode, value)
        await world.wait(seconds)
        await world.network.set("*", "clear")
        # A run does not know whether the sink has its message, and a lease ends that cannot be extended.
        if link == "worker-*:sink" or (link == "worker-*:database" and mode == "stall"):
            world.excuse(link, began)


@scenario(PROXIED)
async def network_latency(world: World) -> None:
    """Each way between each two takes 80 ms more."""
    await _each(world, "latency", 2, 0.08)


@scenario(PROXIED)
async def network_stalls(world: World) -> None:
    """Nothing gets through for longer than a lease, between each two in turn."""
    await _each(world, "stall", LONGER_THAN_A_LEASE)


@scenario(PROXIED)
async def network_resets(world: World) -> None:
    """Connections between each two are reset, several times."""
    for _ in range(3):
        await _each(world, "reset", 0.5)


@scenario(PROXIED)
async def network_half_open(world: World) -> None:
    """One relay's, one worker's and an API's connections are dead, and nobody is told."""
    for link in ("api-1:database", "relay-1:*", "worker-1:database", "worker-1:sink"):
        began = time.time()
        await world.network.set(link, "half_open")
        await world.wait(3)
        if link.startswith("worker"):
            world.excuse(link, began, world.fleet.pids("worker-1"))


@scenario(PROXIED, within=45)
async def network_half_open_database(world: World) -> None:
    """Every worker's connections to the database are dead, and none is told."""
    began = time.time()
    await world.network.set("worker-*:database", "half_open")
    await world.wait(LONGER_THAN_A_LEASE)
    world.excuse("worker-*:database", began)


# A consumer waits 60 s for an answer, and then what it was to be given is given out again.
@scenario(PROXIED, holds=75)
async def network_half_open_broker(world: World) -> None:
    """One worker's connections to the broker are dead, and it is not told."""
    await world.wait(1)
    await world.network.set("worker-1:broker", "half_open")
    await world.wait(3)


@scenario(PROXIED, within=75, holds=75, attempts=1)
async def network_half_open_broker_of_all(world: World) -> None:
    """Every worker's connections to the broker are dead, and none is told."""
    await world.wait(1)
    await world.network.set("worker-*:broker", "half_open")
    await world.wait(3)


@scenario(PROXIED)
async def network_loses_requests(world: World) -> None:
    """One message in twelve breaks its connection before it arrives, everywhere at once."""
    await world.network.set("*", "cut_before", 0.08)
    await world.wait(12)
    await world.network.set("*", "clear")
    assert world.network.cuts > 20


@scenario(PROXIED)
async def network_loses_replies(world: World) -> None:
    """One message in twelve arrives, also COMMITs and claims, and breaks its connection before the reply."""
    began = time.time()
    await world.network.set("*", "cut_after", 0.08)
    await world.wait(12)
    world.excuse("the sink's answers", began)


@scenario(PROXIED, attempts=1)
async def network_loses_relays_replies(world: World) -> None:
    """The same for relays alone, where nothing excuses a repeated effect."""
    await world.network.set("relay-*", "cut_after", 0.15)
    await world.wait(10)
    await world.network.set("*", "clear")
    assert world.network.cuts > 5


@scenario(PROXIED)
async def commits_lose_their_replies(world: World) -> None:
    """One COMMIT in four takes place and nobody hears of it: of requests, hand-overs and effects."""
    await world.network.set("*:database", "cut_commit", 0.25)
    await world.wait(10)
    await world.network.set("*", "clear")
    assert world.network.cuts > 20, f"only {world.network.cuts} COMMITs were cut"

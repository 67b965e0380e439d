"""Latency, stalls, resets, half-open connections and lost messages between every two processes."""

from __future__ import annotations

import time

from tests.chaos.scenario import scenario
from tests.chaos.world import Plan, World

PROXIED = Plan(proxied=True)
LINKS = ("client:*", "api-*:database", "relay-*:database", "worker-*:database", "relay-*:broker", "worker-*:broker",
         "worker-*:sink")  # fmt: skip


async def _each(world: World, mode: str, seconds: float, value: float = 0.0) -> None:
    for link in LINKS:
        began = time.time()
        await world.network.set(link, mode, value)
        await world.wait(seconds)
        await world.network.set("*", "clear")
        _excuse(world, link, began)


def _excuse(world: World, link: str, began: float) -> None:
    # Between a worker and its database or the sink a lost message is a crash between send and completion.
    if link in ("worker-*:database", "worker-*:sink", "*"):
        world.excuse(link, began)


@scenario(PROXIED)
async def network_latency(world: World) -> None:
    """Each way between each two takes 80 ms more."""
    await _each(world, "latency", 2, 0.08)


@scenario(PROXIED)
async def network_stalls(world: World) -> None:
    """Nothing gets through for longer than a lease, between each two in turn."""
    await _each(world, "stall", 4)


@scenario(PROXIED)
async def network_resets(world: World) -> None:
    """Connections between each two are reset, several times."""
    for _ in range(3):
        await _each(world, "reset", 0.5)


@scenario(PROXIED)
async def network_half_open(world: World) -> None:
    """One relay's, one worker's and the API's connections are dead, and nobody is told."""
    for link in ("api-1:database", "relay-1:*", "worker-1:database", "worker-1:sink"):
        began = time.time()
        await world.network.set(link, "half_open")
        await world.wait(3)
        if link.startswith("worker"):
            world.excuse(link, began)


@scenario(PROXIED)
async def network_half_open_broker(world: World) -> None:
    """One worker's connections to the broker are dead, and it is not told."""
    await world.wait(1)
    await world.network.set("worker-1:broker", "half_open")
    await world.wait(3)


@scenario(PROXIED)
async def network_loses_requests(world: World) -> None:
    """One message in twelve breaks its connection before it arrives, everywhere at once."""
    began = time.time()
    await world.network.set("*", "cut_before", 0.08)
    await world.wait(12)
    _excuse(world, "*", began)


@scenario(PROXIED)
async def network_loses_replies(world: World) -> None:
    """One message in twelve arrives, also COMMITs and claims, and breaks its connection before the reply."""
    began = time.time()
    await world.network.set("*", "cut_after", 0.08)
    await world.wait(12)
    _excuse(world, "*", began)


@scenario(PROXIED)
async def network_loses_relays_replies(world: World) -> None:
    """The same for relays alone, where nothing excuses a repeated effect."""
    await world.network.set("relay-*", "cut_after", 0.15)
    await world.wait(10)

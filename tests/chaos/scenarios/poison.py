"""Events that never succeed, each in its own way: they end as dead letters, and their neighbours are not harmed."""

from __future__ import annotations

from tests.chaos.domain import POISON
from tests.chaos.scenario import scenario
from tests.chaos.world import SHORT, Plan, World


async def _poisoned(world: World, *kinds: str) -> None:
    for kind in kinds:
        await world.place_surely(kind)
        await world.wait(0.5)
    await world.wait(3)


@scenario(within=45)
async def poison_fails(world: World) -> None:
    """Always raises."""
    await _poisoned(world, *["fail"] * 4)


@scenario(within=45)
async def poison_kills_its_process(world: World) -> None:
    """Sends SIGKILL to its process, and so to its neighbours' runs."""
    await _poisoned(world, "kill", "kill")
    for name in world.fleet.names("worker"):
        # Which processes it took with it, only they could tell.
        world.excuse(f"{name} killed by poison", world.began)


@scenario(within=45)
async def poison_kills_its_backend(world: World) -> None:
    """Ends its own database session, which looks like an outage."""
    await _poisoned(world, "kill_backend", "kill_backend")


@scenario(within=45)
async def poison_never_returns(world: World) -> None:
    """Waits for ever."""
    await _poisoned(world, "hang", "hang", "hang")


@scenario(within=60)
async def poison_swallows_cancellation(world: World) -> None:
    """Goes on when it is cancelled, and is abandoned while it still runs."""
    await _poisoned(world, "swallow", "swallow")


# While the loop stands still, so do its neighbours' runs: both of their time limits must be longer than that, up to six
# times four seconds, or a neighbour fails after it has sent.
@scenario(Plan(settings={**SHORT, "OUTBOX__TIME_LIMIT": "40000", "CHAOS_SINK_TIMEOUT": "40"}), within=60)
async def poison_blocks_the_loop(world: World) -> None:
    """Blocks the loop of its process for longer than a lease; its neighbours stand still and keep their leases."""
    await _poisoned(world, "block", "block")


@scenario(within=90)
async def poison_of_every_kind(world: World) -> None:
    """All of it at once."""
    await _poisoned(world, *POISON)
    world.excuse("workers killed by poison", world.began)

"""Events that never succeed, each in its own way: they end as dead letters, and their neighbours are not harmed."""

from __future__ import annotations

from tests.proof.chaos.domain import PLAIN_POISON, POISON
from tests.proof.chaos.scenario import scenario
from tests.proof.chaos.world import SHORT, Plan, World

_BLOCKED = 70
"""Exit status of a worker's process that finds its own event loop standing still."""


async def _poisoned(world: World, *kinds: str) -> None:
    for kind in kinds:
        await world.place_surely(kind)
        await world.wait(0.5)
    await world.wait(3)


@scenario(attempts=1)
async def poison_fails(world: World) -> None:
    """Always raises."""
    await _poisoned(world, *["fail", "plain_fail"] * 2)


@scenario(within=30)
async def poison_kills_its_process(world: World) -> None:
    """Sends SIGKILL to its process, and so to its neighbours' runs."""
    await _poisoned(world, "kill", "kill", "plain_kill")


@scenario(attempts=1)
async def poison_kills_its_backend(world: World) -> None:
    """Ends its own database session, which looks like an outage."""
    await _poisoned(world, "kill_backend", "kill_backend")


@scenario(attempts=1)
async def poison_never_returns(world: World) -> None:
    """Waits for ever, on the loop or in a thread."""
    await _poisoned(world, "hang", "hang", "plain_hang", "plain_hang")


@scenario(within=30, attempts=1)
async def poison_swallows_cancellation(world: World) -> None:
    """Goes on when it is cancelled, and is abandoned while it still runs."""
    await _poisoned(world, "swallow", "swallow")


# While the loop stands still, so do its neighbours' runs: both of their time limits must be longer than that, up to six
# times four seconds, or a neighbour fails after it has sent.
@scenario(Plan(settings={**SHORT, "OUTBOX__TIME_LIMIT": "40000", "CHAOS_SINK_TIMEOUT": "40"}), within=60)
async def poison_blocks_the_loop(world: World) -> None:
    """Blocks the loop of its process for longer than a lease; its neighbours stand still and keep their leases."""
    await _poisoned(world, "block", "block")


@scenario(Plan(may_exit=_BLOCKED), within=60)
async def poison_blocks_for_ever(world: World) -> None:
    """Blocks the loop and never stops; its process ends itself, and everything else goes on."""
    await _poisoned(world, "block_for_ever")


@scenario(within=60)
async def poison_of_every_kind(world: World) -> None:
    """All of it at once, but for what ends the whole process."""
    await _poisoned(world, *(each for each in (*POISON, *PLAIN_POISON) if each != "block_for_ever"))

"""The checker's own test: attacks that a healthy system survives, on healthy ones and on ones with a planted bug.

Each bug has a healthy twin under the same attack, with the same time to recover, that must come out clean; and the bug
must be accused of what it does, not of being late: by the state that its row is in while the broker holds nothing.
"""

from __future__ import annotations

from dataclasses import replace

from tests.proof.chaos.gaps import RELAY_GAPS
from tests.proof.chaos.scenario import scenario
from tests.proof.chaos.world import LONGER_THAN_A_LEASE, SHORT, Plan, World

WITHIN = 15
_LONG_T = {**SHORT, "OUTBOX__REDISPATCH_AFTER": "60"}  # longer than the time to recover, however busy the machine
_TIME_TO_LINGER = {**SHORT, "OUTBOX__TIME_LIMIT": "120000", "CHAOS_LINGER": "25"}
_FOR_EVER = {**_TIME_TO_LINGER, "CHAOS_LINGER": "100"}  # longer than is waited for, however busy the machine
_ZOMBIES = Plan(gaps="worker.mid_effect=stop:1", struck="worker-1")
_DEATHS = Plan(gaps="worker.mid_effect=kill:0.15")
_DEAD_RELAYS = Plan(gaps=f"{RELAY_GAPS[0]}=kill:0.2")
_EARLY_WORKERS = Plan(gaps="relay.after_publish=sleep:1", settings=_LONG_T)
_LINGERING = Plan(settings=_TIME_TO_LINGER, processes=1)


async def _zombies(world: World) -> None:
    for _ in range(2):
        await world.strike_each(("worker.mid_effect",), LONGER_THAN_A_LEASE)


@scenario(_ZOMBIES, within=WITHIN)
async def zombies_in_mid_effect(world: World) -> None:
    """Workers go on in mid-effect after their row has been run by another."""
    await _zombies(world)


@scenario(replace(_ZOMBIES, bug="no_fence"), accuses=": 2 bookings", within=WITHIN)
async def bug_no_fence(world: World) -> None:
    """The same without a fence."""
    await _zombies(world)


async def _deaths(world: World) -> None:
    world.arm()
    await world.wait(5)


@scenario(_DEATHS, within=WITHIN)
async def deaths_in_mid_effect(world: World) -> None:
    """Workers die in mid-effect."""
    await _deaths(world)


@scenario(replace(_DEATHS, bug="complete_before_effect"), accuses="no booking (completed)", within=WITHIN)
async def bug_complete_before_effect(world: World) -> None:
    """The same where the completion comes first."""
    await _deaths(world)


@scenario(_DEAD_RELAYS, within=WITHIN, attempts=1)
async def relays_die_before_they_publish(world: World) -> None:
    """Relays die with rows marked and nothing handed over."""
    await _deaths(world)


@scenario(replace(_DEAD_RELAYS, bug="commit_before_publish"), accuses="(dispatched)", within=WITHIN)
async def bug_commit_before_publish(world: World) -> None:
    """The same where a relay commits first, and looks back at nothing."""
    await _deaths(world)


@scenario(_EARLY_WORKERS, within=WITHIN, attempts=1)
async def workers_faster_than_the_relay(world: World) -> None:
    """Each message reaches a worker half a second before the relay's commit; nothing may wait for T."""
    await _deaths(world)


@scenario(replace(_EARLY_WORKERS, bug="narrow_claim"), accuses="(dispatched)", within=WITHIN)
async def bug_narrow_claim(world: World) -> None:
    """The same where a claim matches only what is visibly dispatched."""
    await _deaths(world)


async def _linger(world: World) -> None:
    """A first worker freezes and comes back, a second one dies with the row: a third must get it at once."""
    query = "SELECT attempts FROM outbox_message WHERE consumer = 'chaos.book'"
    await world.fleet.stop("worker-2")
    await world.place_surely("linger")
    await world.until(query, 1)
    world.fleet.freeze("worker-1")
    await world.fleet.start("worker-2")
    await world.until(query, 2)
    world.resume()


@scenario(_LINGERING, rate=0, within=WITHIN)
async def zombie_lingers(world: World) -> None:
    """A zombie whose consumer goes on does not keep the row from the others."""
    await _linger(world)


@scenario(
    replace(_LINGERING, settings=_FOR_EVER, bug="heartbeat_without_token"),
    rate=0,
    accuses="no booking (running)",
    within=WITHIN,
)
async def bug_heartbeat_without_token(world: World) -> None:
    """The same where heartbeats match the id alone."""
    await _linger(world)

"""The checker's own test: attacks that a healthy system survives, on healthy ones and on ones with a planted bug."""

from __future__ import annotations

from tests.chaos.gaps import RELAY_GAPS
from tests.chaos.scenario import scenario
from tests.chaos.world import SHORT, Plan, World

_T_OF_A_MINUTE = {**SHORT, "OUTBOX__REDISPATCH_AFTER": "60"}
_MID_EFFECT = "worker.mid_effect={}:0.15"
_FASTER_THAN_THE_RELAY = "relay.after_publish=sleep:1"
_TIME_TO_LINGER = {**SHORT, "OUTBOX__TIME_LIMIT": "30000"}


async def _zombies(world: World) -> None:
    world.arm()
    for _ in range(2):
        await world.wait(4.5)
        world.fleet.resume()


@scenario(Plan(gaps=_MID_EFFECT.format("stop"), struck="worker-1"))
async def zombies_in_mid_effect(world: World) -> None:
    """Workers go on in mid-effect after their row has been run by another."""
    await _zombies(world)


@scenario(Plan(gaps=_MID_EFFECT.format("stop"), struck="worker-1", bug="no_fence"), accuses=True, within=10)
async def bug_no_fence(world: World) -> None:
    """The same without a fence."""
    await _zombies(world)


async def _deaths(world: World) -> None:
    world.arm()
    await world.wait(5)


@scenario(Plan(gaps=_MID_EFFECT.format("kill")))
async def deaths_in_mid_effect(world: World) -> None:
    """Workers die in mid-effect."""
    await _deaths(world)


@scenario(Plan(gaps=_MID_EFFECT.format("kill"), bug="complete_before_effect"), accuses=True, within=5)
async def bug_complete_before_effect(world: World) -> None:
    """The same where the completion comes first."""
    await _deaths(world)


@scenario(Plan(gaps=f"{RELAY_GAPS[0]}=kill:0.2", bug="commit_before_publish"), accuses=True, within=10)
async def bug_commit_before_publish(world: World) -> None:
    """A relay that looks back at nothing dies between commit and publish."""
    await _deaths(world)


@scenario(Plan(gaps=_FASTER_THAN_THE_RELAY, settings=_T_OF_A_MINUTE), within=15)
async def workers_faster_than_the_relay(world: World) -> None:
    """Each message reaches a worker half a second before the relay's commit; nothing may wait for T."""
    await _deaths(world)


@scenario(Plan(gaps=_FASTER_THAN_THE_RELAY, settings=_T_OF_A_MINUTE, bug="narrow_claim"), accuses=True, within=8)
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
    world.fleet.resume()


@scenario(Plan(settings=_TIME_TO_LINGER), rate=0, within=14)
async def zombie_lingers(world: World) -> None:
    """A zombie whose consumer goes on does not keep the row from the others."""
    await _linger(world)


@scenario(Plan(settings=_TIME_TO_LINGER, bug="heartbeat_without_token"), rate=0, accuses=True, within=14)
async def bug_heartbeat_without_token(world: World) -> None:
    """The same where heartbeats match the id alone."""
    await _linger(world)

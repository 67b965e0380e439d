"""Schedules: no tick is missed and none is doubled, whoever dies; and a bug for each of what protects them.

They are ended when the attack is over, and every tick that was due until then must have had its effect once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.proof.chaos.beats import Beats
from tests.proof.chaos.scenario import scenario
from tests.proof.chaos.world import LONGER_THAN_A_LEASE, Plan, World

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_NAMES = ("first", "second", "third")
_DEATHS = Plan(gaps="worker.before_complete=kill:0.1,worker.after_complete=kill:0.1,worker.after_commit=kill:0.1")


async def _beating(world: World, attack: Callable[[Beats], Awaitable[None]]) -> None:
    beats = Beats(world, _NAMES)
    await beats.begin()
    await world.until("SELECT count(*) FROM beat", 2 * len(_NAMES))
    await attack(beats)
    world.disarm()
    world.resume()
    await world.wait(2)
    await beats.end()


@scenario(rate=5)
async def schedules_survive_kills(world: World) -> None:
    """SIGKILL of relays and workers, all sessions ended, and the broker flushed, while three schedules fire."""

    async def attack(_: Beats) -> None:
        for number in range(9):
            match number % 3:
                case 0:
                    for name in world.dice.sample(world.fleet.names("worker") + world.fleet.names("relay"), 2):
                        world.fleet.kill(name)
                case 1:
                    await world.sql(
                        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                        "WHERE application_name LIKE 'outbox%' AND pid <> pg_backend_pid()"
                    )
                    world.expected.append("terminating connection due to administrator command")
                case 2:
                    async with world.broker() as broker:
                        await broker.flushall()
            await world.wait(world.dice.uniform(0.5, 1.5))

    await _beating(world, attack)


@scenario(_DEATHS, rate=0)
async def schedules_deaths_around_the_commit(world: World) -> None:
    """Workers die around the commit that publishes, writes the next tick and completes this one."""

    async def attack(_: Beats) -> None:
        world.arm()
        await world.wait(6)

    await _beating(world, attack)


async def _changed(world: World) -> None:
    async def attack(beats: Beats) -> None:
        workers = world.fleet.names("worker")
        for number in range(1, 6):
            for name in workers:
                world.fleet.freeze(name)
            await world.until("SELECT count(*) FROM outbox_message WHERE consumer = 'outbox.tick' "
                              "AND state = 'dispatched'", len(_NAMES))  # fmt: skip
            await beats.change(number)
            world.resume()
            await world.wait(1)

    await _beating(world, attack)


@scenario(rate=0)
async def schedules_changed_while_they_fire(world: World) -> None:
    """Schedules are changed again and again, while their ticks are in the broker."""
    await _changed(world)


@scenario(Plan(bug="any_tick"), rate=0, accuses=" before its time")
async def bug_any_tick(world: World) -> None:
    """The same where a tick does not have to be its schedule's next one."""
    await _changed(world)


async def _outage(world: World) -> None:
    async def attack(_: Beats) -> None:
        for name in world.fleet.names("worker"):
            world.fleet.freeze(name)
        await world.wait(LONGER_THAN_A_LEASE)
        world.resume()
        await world.wait(2)

    await _beating(world, attack)


@scenario(rate=0)
async def schedules_catch_up(world: World) -> None:
    """All workers stand still for some seconds; each tick of that time fires."""
    await _outage(world)


@scenario(Plan(bug="next_from_now"), rate=0, accuses=": no beat of")
async def bug_next_from_now(world: World) -> None:
    """The same where the next tick follows from the time of the run."""
    await _outage(world)

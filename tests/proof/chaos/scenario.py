"""What a scenario is, and how one is run from the first request to the verdict."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.proof.chaos.checker import Verdict
from tests.proof.chaos.world import Ground, Plan, World
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    Attack = Callable[[World], Awaitable[None]]

__all__ = ["SCENARIOS", "Result", "Scenario", "run", "scenario"]


@dataclass(frozen=True)
class Scenario:
    """An attack on a system; what its parts mean, `scenario` says."""

    name: str
    attack: Attack
    plan: Plan
    rate: float
    within: float
    slow: bool
    accuses: str
    attempts: int | None
    lasts: float
    holds: float
    needs: Callable[[], bool]


@dataclass
class Result:
    """How a scenario ended."""

    scenario: Scenario
    seed: int
    verdict: Verdict = field(default_factory=Verdict)
    recovered: float = 0.0
    took: float = 0.0
    copies: int = 0
    found: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the promises held; for a planted bug, whether it was accused."""
        if self.scenario.accuses:
            return not self.wrong and any(self.scenario.accuses in each for each in self.verdict.accusations)
        return self.verdict.clean and not self.wrong


_TO_START_AND_STOP = 300.0
"""Seconds, on a machine with much else to do."""

_MOST_PATIENCE = 3.0

SCENARIOS: dict[str, Scenario] = {}


def scenario(
    plan: Plan | None = None,
    *,
    rate: float = 15,
    within: float = 18,
    slow: bool = False,
    accuses: str = "",
    attempts: int | None = None,
    lasts: float = 180,
    holds: float = 30,
    needs: Callable[[], bool] = lambda: True,
) -> Callable[[Attack], Attack]:
    """Register an attack under its function's name.

    Args:
        plan: The system.
        rate: Requests a second while it runs.
        within: Seconds after it by which everything must have happened; by default T + 15 of a short T. On a machine
            with much else to do it is up to three times that, and the same goes for `holds`.
        slow: Run by `make chaos SLOW=1` alone.
        accuses: The system has a planted bug, and the checker must find this of it.
        attempts: How many a row may have used up at most, where no fault was its own.
        lasts: A third of the seconds that the attack may take; one that hangs has failed.
        holds: Seconds for which the broker may then hold copies that nobody needs any more.
        needs: Whether this machine has what the scenario needs.
    """

    def register(attack: Attack) -> Attack:
        name = attack.__name__
        assert name not in SCENARIOS, f"there are two scenarios {name}"
        SCENARIOS[name] = Scenario(
            name, attack, plan or Plan(), rate, within, slow, accuses, attempts, lasts, holds, needs
        )
        return attack

    return register


async def run(which: Scenario, seed: int, folder: Path, ground: Ground) -> Result:
    """Start a system, attack it under load, let it recover, settle, and judge it."""
    result = Result(which, seed)
    began = time.monotonic()
    world = World(folder, ground, which.plan, seed)
    try:
        async with (
            asyncio.timeout(
                _TO_START_AND_STOP + _MOST_PATIENCE * (which.lasts + which.within + which.holds) + world.settling
            ),
            world,
        ):
            if which.rate:
                world.ledger.start_load(which.rate)
            async with asyncio.timeout(_MOST_PATIENCE * which.lasts):
                await which.attack(world)
            await _recover(world, which, result)
        result.wrong += world.wrong()
    except Exception as error:  # noqa: BLE001  one broken scenario must not hide the others
        result.wrong.append(f"{type(error).__name__}: {error}")
    result.took = time.monotonic() - began
    return result


def _patience() -> float:
    """How many times longer than on an idle machine things may take now: as many as wait for each processor."""
    return min(max(os.getloadavg()[0] / (os.cpu_count() or 1), 1.0), _MOST_PATIENCE)


async def _recover(world: World, which: Scenario, result: Result) -> None:
    world.disarm()
    world.resume()
    if world.plan.proxied:
        await world.network.set("*", "clear")
    healed, patience = time.monotonic(), _patience()
    await world.ledger.stop_load()
    left = await world.ledger.find_unanswered(healed + which.within * patience)
    if left:
        result.wrong.append(f"{left} requests were never answered")
    while True:
        result.verdict = await world.verdict()
        # A repeated effect stays repeated, as does what was out of order or over a limit: only the rest is waited for.
        stays = result.verdict.duplicated or result.verdict.disordered or result.verdict.exceeded
        done = result.verdict.clean or (stays and (which.accuses or result.verdict.complete))
        if done or time.monotonic() > healed + which.within * patience:
            break
        world.resume()  # a gap may have struck while it was disarmed
        await asyncio.sleep(0.25)
    result.recovered = time.monotonic() - healed
    if which.accuses:
        await _let_the_broker_empty(world, which.holds * patience)
        result.verdict = await world.verdict()
    elif result.verdict.clean:
        await asyncio.sleep(max(0.0, healed + world.settling - time.monotonic()))
        await _let_the_broker_empty(world, which.holds * patience)
        result.verdict = await world.verdict()
    result.copies, result.found = world.held.most_copies, world.ledger.found
    result.wrong += [f"refused: {each}" for each in world.ledger.refused[:3]]
    if which.attempts is not None and result.verdict.attempts > which.attempts:
        result.wrong.append(f"a row used up {result.verdict.attempts} attempts for what was not its fault")


async def _let_the_broker_empty(world: World, seconds: float) -> None:
    """Whatever happens later, no copy of a message that is held now can be its cause."""

    async def empty() -> bool:
        return not sum((await world.held.waiting()).values()) + await world.held.in_flight()

    await until(empty, timeout=seconds, every=0.25, what="the broker to hold nothing")

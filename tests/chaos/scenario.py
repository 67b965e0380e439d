"""What a scenario is, and how one is run from the first request to the verdict."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.chaos.checker import Verdict
from tests.chaos.world import Ground, Plan, World

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    Attack = Callable[[World], Awaitable[None]]

__all__ = ["SCENARIOS", "Result", "Scenario", "run", "scenario"]


@dataclass(frozen=True)
class Scenario:
    """An attack on a system. `within`: seconds after the attack by which everything must have happened."""

    name: str
    attack: Attack
    plan: Plan
    rate: float
    within: float
    slow: bool
    accuses: bool
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
        accused = bool(self.verdict.lost or self.verdict.duplicated)
        return accused if self.scenario.accuses else self.verdict.clean and not self.wrong


SCENARIOS: dict[str, Scenario] = {}


def scenario(
    plan: Plan | None = None,
    *,
    rate: float = 15,
    within: float = 25,
    slow: bool = False,
    accuses: bool = False,
    needs: Callable[[], bool] = lambda: True,
) -> Callable[[Attack], Attack]:
    """Register an attack under its function's name.

    Args:
        plan: The system.
        rate: Requests a second while it runs.
        within: Seconds after it by which everything must have happened.
        slow: Run by `make chaos SLOW=1` alone.
        accuses: The system has a planted bug, and the checker must find something.
        needs: Whether this machine has what the scenario needs.
    """

    def register(attack: Attack) -> Attack:
        name = attack.__name__
        assert name not in SCENARIOS, f"there are two scenarios {name}"
        SCENARIOS[name] = Scenario(name, attack, plan or Plan(), rate, within, slow, accuses, needs)
        return attack

    return register


async def run(which: Scenario, seed: int, folder: Path, ground: Ground) -> Result:
    """Start a system, attack it under load, let it recover and judge it."""
    result = Result(which, seed)
    began = time.monotonic()
    try:
        async with World(folder, ground, which.plan, seed) as world:
            if which.rate:
                world.ledger.start_load(which.rate)
            await which.attack(world)
            await _recover(world, which, result)
    except Exception as error:  # noqa: BLE001  one broken scenario must not hide the others
        result.wrong.append(f"{type(error).__name__}: {error}")
    result.took = time.monotonic() - began
    return result


async def _recover(world: World, which: Scenario, result: Result) -> None:
    world.disarm()
    world.fleet.resume()
    if world.plan.proxied:
        await world.network.set("*", "clear")
    healed = time.monotonic()
    await world.ledger.stop_load()
    left = await world.ledger.find_unanswered(healed + which.within)
    if left:
        result.wrong.append(f"{left} requests were never answered")
    while True:
        result.verdict = await world.verdict()
        # A repeated effect stays repeated, so there is nothing more to wait for than the rest.
        done = result.verdict.clean or (result.verdict.duplicated and (which.accuses or result.verdict.complete))
        if done or time.monotonic() > healed + which.within:
            break
        world.fleet.resume()  # gaps may stop processes at any time
        await asyncio.sleep(0.25)
    result.recovered = time.monotonic() - healed
    result.copies, result.found = world.most_copies, world.ledger.found
    result.wrong += [f"refused: {each}" for each in world.ledger.refused[:3]]

"""What the suite changes in the service is still where it changes it; otherwise it would attack and accuse nothing."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from relay.process.loop import Relay
from tests.proof.chaos.bugs import BUGS
from tests.proof.chaos.gaps import API_GAPS, RELAY_GAPS, WORKER_GAPS
from tests.proof.chaos.patching import replace, when_imported
from tests.proof.chaos.world import Plan, World
from tests.proof.rabbitmq.server import programs
from tests.waiting import until

if TYPE_CHECKING:
    from collections import Counter
    from pathlib import Path

    from tests.proof.chaos.world import Ground

pytestmark = pytest.mark.slow

GAPS = (*API_GAPS, *RELAY_GAPS, *WORKER_GAPS)

_PLANTED = """
import hashlib
import relay.process.loop, service.outbox.delivery
from service.ledger import delivering, dispatching, limited_dispatching, scheduling
from service.outbox.schedules import ticking

def parts(holder, module):
    for value in list(vars(holder).values()):
        if isinstance(value, str):
            yield value
        elif getattr(value, "__module__", module) == module and isinstance(value, type) and value is not holder:
            yield from parts(value, module)
        elif callable(value):
            yield getattr(value, "__qualname__", "")

ledger = (delivering, dispatching, limited_dispatching, scheduling)
modules = (relay.process.loop, service.outbox.delivery, *ledger, ticking)
found = [part for module in modules for part in parts(module, module.__name__)]
print(hashlib.sha256("".join(found).encode()).hexdigest())
"""


def _fingerprint(bug: str) -> str:
    program = f"import tests.proof.chaos.bugs\n{_PLANTED}"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"CHAOS_BUG": bug}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("bug", BUGS)
def test_every_bug_can_be_planted(bug: str) -> None:
    assert _fingerprint(bug) != _fingerprint("")


def test_a_patch_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"no module relay\.gone"):
        when_imported("relay.gone")
    with pytest.raises(SystemExit, match="Relay has no gone"):
        replace(Relay, "gone", None)


def test_every_gap_is_on_the_way_of_ordinary_work(server_folder: Path, ground: Ground) -> None:
    found = asyncio.run(_noted(server_folder, ground, rabbitmq=False))
    assert set(found) == set(GAPS)
    # Nobody contends for a row here, so these are the claims of the ordinary path.
    assert found["worker.before_claim"] >= 5
    assert found["worker.after_claim"] >= 5


@pytest.mark.skipif(programs() is None, reason="RabbitMQ is not installed")
def test_every_gap_is_on_the_way_with_rabbitmq(server_folder: Path, ground: Ground) -> None:
    assert set(asyncio.run(_noted(server_folder, ground, rabbitmq=True))) == set(GAPS)


async def _noted(folder: Path, ground: Ground, *, rabbitmq: bool) -> Counter[str]:
    """How often each gap was passed while twenty requests were worked off, each by one claim."""
    plan = Plan(gaps=",".join(f"{gap}=note:1" for gap in GAPS), rabbitmq=rabbitmq)
    async with World(folder, ground, plan, seed=1) as world:
        world.arm()
        for _ in range(20):
            await world.place_surely()

        async def done() -> bool:
            return (await world.verdict()).complete

        await until(done)
        return world.struck()

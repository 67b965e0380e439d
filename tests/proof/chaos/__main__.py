"""`make chaos`: run scenarios, a line each, and the totals."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import tests.proof.chaos.scenarios  # noqa: F401  registers them
from service.dev.places import scratch
from tests.proof.chaos.launch import Forge
from tests.proof.chaos.scenario import SCENARIOS, Result, Scenario, run
from tests.proof.chaos.world import Ground
from tests.servers.leftovers import ended
from tests.servers.real_servers import RealServers

if TYPE_CHECKING:
    from collections.abc import Sequence

_LONGEST_SWEEP = 20 * 60.0
"""Seconds that a sweep of everything may take on two processors."""

_HEAD = f"{'SCENARIO':<32} {'SEED':>5} {'TOOK':>5} {'ACCEPTED':>8} {'FOUND':>5} {'EFFECTS':>7} {'LOST':>4} {'DUPL.':>5}"
_HEAD += f" {'EXCUSED':>7} {'DEAD':>4} {'COPIES':>6} {'RECOVERED':>9}"


def _line(result: Result) -> str:
    verdict = result.verdict
    name = f"{result.scenario.name:<32} {result.seed:>5} {result.took:>4.0f}s {verdict.accepted:>8} {result.found:>5}"
    counts = f"{verdict.effects:>7} {len(verdict.lost):>4} {len(verdict.duplicated):>5} {verdict.excused:>7}"
    rest = f"{verdict.dead:>4} {result.copies:>6} {result.recovered:>8.1f}s"
    outcome = ("accused" if result.scenario.accuses else "ok") if result.passed else "FAILED"
    return f"{name} {counts} {rest}  {outcome}"


def _why(result: Result) -> str:
    """In a few words."""
    verdict = result.verdict
    counts = {"lost": len(verdict.lost), "duplicated": len(verdict.duplicated), "still open": verdict.unfinished}
    counts["over a limit"] = len(verdict.exceeded)
    counts["out of order"] = len(verdict.disordered)
    counts["dead without reason"] = len(verdict.wrongly_dead)
    reasons = [f"{count} {kind}" for kind, count in counts.items() if count] if not result.scenario.accuses else []
    reasons += [" ".join(each.split())[:120] for each in result.wrong[:1]]
    return ", ".join(reasons) or "its bug was not accused"


def _details(result: Result) -> list[str]:
    verdict = result.verdict
    kinds = {"wrong": result.wrong, "lost": verdict.lost, "duplicated": verdict.duplicated}
    kinds |= {"out of order": verdict.disordered, "limit": verdict.exceeded}
    kinds |= {"dead without reason": verdict.wrongly_dead}
    lines = [f"    {kind}: {each}" for kind, found in kinds.items() for each in found[:5]]
    return lines + ([f"    {verdict.unfinished} rows are still open"] if verdict.unfinished else [])


async def _sweep(chosen: Sequence[Scenario], seed: int, jobs: int, folder: Path, keep: Path | None) -> list[Result]:
    with Forge() as forge:
        ground = Ground(await asyncio.to_thread(RealServers._make_seed, folder / "seed"), forge)
        return await _run_all(chosen, seed, jobs, folder, ground, keep)


async def _run_all(
    chosen: Sequence[Scenario], seed: int, jobs: int, folder: Path, ground: Ground, keep: Path | None
) -> list[Result]:
    places = asyncio.Semaphore(jobs)

    async def one(which: Scenario) -> Result:
        async with places:
            own = folder / which.name
            own.mkdir()
            own.chmod(0o711)
            result = await run(which, seed, own, ground)
            print(_line(result), flush=True)
            if not result.passed:
                print("\n".join(_details(result)), flush=True)
                print(f"    again: make chaos SCENARIO={which.name} SEED={seed}", flush=True)
            if keep is not None:
                (keep / which.name).mkdir(parents=True, exist_ok=True)
                for log in (*own.glob("*.log"), *own.glob("*.jsonl")):
                    shutil.copy(log, keep / which.name)
            await asyncio.to_thread(shutil.rmtree, own, ignore_errors=True)
            return result

    return list(await asyncio.gather(*(one(which) for which in chosen)))


def _chosen(names: str, *, slow: bool) -> list[Scenario]:
    if not names:
        chosen = [each for each in SCENARIOS.values() if each.slow == slow]
        for each in chosen:
            if not each.needs():
                print(f"{each.name:<32} skipped: what it needs is not there")
        return [each for each in chosen if each.needs()]
    wanted = names.split(",")
    if unknown := [name for name in wanted if name not in SCENARIOS]:
        raise SystemExit(f"no scenario named {unknown[0]!r}; there are: {', '.join(SCENARIOS)}")
    return [SCENARIOS[name] for name in wanted]


def main() -> int:
    """Run what is asked for; 0 if every promise was kept."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--scenario", default="", help="names, separated by commas; all by default")
    parser.add_argument("--seed", default="")
    parser.add_argument("--slow", action="store_true", help="the recovery scenarios, with the settings as shipped")
    parser.add_argument("--jobs", type=int, default=0, help="scenarios at once; by default processors and one more")
    parser.add_argument("--keep", type=Path, help="where to copy the processes' logs")
    options = parser.parse_args()
    logging.getLogger("aiormq").addHandler(logging.NullHandler())  # it tells of a broker that the suite has killed
    seed = int(options.seed) if options.seed else random.SystemRandom().randrange(100_000)
    jobs = options.jobs or (os.cpu_count() or 2) + 1
    began = time.monotonic()
    print(_HEAD, flush=True)
    with ended(), scratch() as folder:
        results = asyncio.run(_sweep(_chosen(options.scenario, slow=options.slow), seed, jobs, folder, options.keep))
    whole = not options.scenario and not options.slow
    return _summary(results, time.monotonic() - began, _LONGEST_SWEEP if whole else float("inf"))


def _summary(results: Sequence[Result], took: float, allowed: float) -> int:
    honest = [result for result in results if not result.scenario.accuses]
    accused = sum(result.passed for result in results if result.scenario.accuses)
    lost = sum(len(result.verdict.lost) for result in honest)
    duplicated = sum(len(result.verdict.duplicated) for result in honest)
    disordered = sum(len(result.verdict.disordered) for result in honest)
    failed = [result for result in results if not result.passed]
    print(
        f"{len(honest)} scenarios, {sum(result.verdict.accepted for result in honest):,} requests accepted, "
        f"{sum(result.verdict.effects for result in honest):,} effects in {took:.0f} s, "
        f"{sum(result.verdict.excused for result in honest)} repeated outside after a crash; "
        f"planted bugs accused: {accused} of {len(results) - len(honest)}"
    )
    over = sum(len(each.verdict.exceeded) for each in honest)
    print(f"lost={lost} duplicated={duplicated} disordered={disordered} over_limit={over}")
    if took > allowed:
        print(f"it took longer than {allowed / 60:.0f} minutes: the machine had much else to do, or something is slow")
    for result in failed:
        print(f"FAILED: {result.scenario.name}: {_why(result)}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; everything that was started has been ended", file=sys.stderr)
        sys.exit(130)

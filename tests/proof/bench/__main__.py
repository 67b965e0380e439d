"""`make bench`: measure the whole path beside what a user would pick instead, check it, and write it down.

Both sides of a ratio run in turns within one run. A figure whose rows, messages or effects do not add up is an error.
What fell short stands in the last lines: what does not add up, what could not be measured on this machine just now (a
process did not come up, a wait was in vain, or the runs differ too much), and what is slower than the claim.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tests.proof.bench import sections
from tests.proof.bench.figures import as_document, summary, table
from tests.proof.bench.stage import open_stage
from tests.servers.leftovers import ended
from tests.waiting import InVainError

if TYPE_CHECKING:
    from tests.proof.bench.stage import Stage

__all__ = ["main"]

_MUCH = 25.0
"""Percent of the machine that others may use before it is mentioned."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller and fewer repetitions: under 4 minutes")
    parser.add_argument("--only", default="", metavar="A,B", help=f"some of {', '.join(sections.SECTIONS)}")
    parser.add_argument("--out", type=Path, default=Path(".data/bench"), help="folder for the JSON and the pictures")
    arguments = parser.parse_args()
    arguments.only = [each for each in arguments.only.split(",") if each]
    if unknown := set(arguments.only) - set(sections.SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}; there are {', '.join(sections.SECTIONS)}")
    return arguments


async def _measure(stage: Stage, name: str, result: sections.Result, *, quick: bool) -> None:
    began, known = time.monotonic(), len(result.figures)
    print(f"{name} ...", file=sys.stderr, flush=True)
    try:
        await sections.SECTIONS[name](stage, result, quick=quick)
    except Exception as error:  # noqa: BLE001  one section that fails must not hide the others
        _give_up(result, name, error)
    print(f"{table(result.figures[known:])}\n{time.monotonic() - began:.0f} s\n", file=sys.stderr, flush=True)


def _give_up(result: sections.Result, name: str, error: Exception) -> None:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    counted_wrong = isinstance(error, AssertionError) and not isinstance(error, InVainError)
    reason = f"{name} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    (result.wrong if counted_wrong else result.unmeasured).append(reason)


def _machine(stage: Stage) -> dict[str, Any]:
    version = stage.redis.info("server")
    assert isinstance(version, dict)
    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "postgresql": stage.postgres.sql("SHOW server_version"),
        "valkey": version.get("valkey_version", version["redis_version"]),
        "at": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    """Run it; 1 when a target was missed or something does not add up, 3 when only something could not be measured."""
    arguments = _arguments()
    names = arguments.only or list(sections.SECTIONS)
    began = time.monotonic()
    result = sections.Result()
    arguments.out.mkdir(parents=True, exist_ok=True)
    others = psutil.cpu_percent(interval=1)
    with ended(), open_stage() as stage:
        for name in names:
            asyncio.run(_measure(stage, name, result, quick=arguments.quick))
            document = {
                "machine": _machine(stage),
                "quick": arguments.quick,
                "seconds": round(time.monotonic() - began),
            }
            document |= {"figures": as_document(result.figures), "texts": result.texts, "plots": result.plots}
            document |= {"unmeasured": result.unmeasured, "wrong": result.wrong}
            (arguments.out / "bench.json").write_text(json.dumps(document, indent=1) + "\n")
    print(table(result.figures))
    for text in result.texts:
        print(f"\n{text}")
    _draw(document, arguments.out)
    print(f"\n{len(result.figures)} figures in {time.monotonic() - began:.0f} s")
    if others > _MUCH:
        print(
            f"the machine was {others:.0f} % busy with other work when this began: its speed is not what was measured"
        )
    print("\n".join(summary(result.figures, result.unmeasured, result.wrong)))
    return _status(result)


def _status(result: sections.Result) -> int:
    verdicts = {each.verdict for each in result.figures}
    if result.wrong or "MISSED" in verdicts:
        return 1
    return 3 if result.unmeasured or "NOISY" in verdicts else 0


def _draw(document: dict[str, Any], folder: Path) -> None:
    try:
        from tests.proof.bench.plots import draw
    except ImportError:
        print("no pictures: `make bench` installs what draws them", file=sys.stderr)
        return
    draw(document, folder)
    print(f"written to {folder}")


if __name__ == "__main__":
    sys.exit(main())

"""`make bench`: measure the whole path beside what a user would pick instead, check it, and write it down.

Both sides of a ratio run in turns within one run. A figure whose rows, messages or effects do not add up is an error.
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

from tests.bench import sections
from tests.bench.figures import as_document, table
from tests.bench.stage import open_stage

if TYPE_CHECKING:
    from tests.bench.stage import Stage

__all__ = ["main"]


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
    await sections.SECTIONS[name](stage, result, quick=quick)
    print(f"{table(result.figures[known:])}\n{time.monotonic() - began:.0f} s\n", file=sys.stderr, flush=True)


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
    """Run it; 1 when a target was missed."""
    arguments = _arguments()
    names = arguments.only or list(sections.SECTIONS)
    began = time.monotonic()
    result = sections.Result()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open_stage() as stage:
        for name in names:
            asyncio.run(_measure(stage, name, result, quick=arguments.quick))
            document = {
                "machine": _machine(stage),
                "quick": arguments.quick,
                "seconds": round(time.monotonic() - began),
            }
            document |= {"figures": as_document(result.figures), "texts": result.texts, "plots": result.plots}
            (arguments.out / "bench.json").write_text(json.dumps(document, indent=1) + "\n")
    print(table(result.figures))
    for text in result.texts:
        print(f"\n{text}")
    missed = [each.name for each in result.figures if each.met is False]
    took = time.monotonic() - began
    print(f"\n{len(result.figures)} figures in {took:.0f} s, {len(missed)} of them short of what they have to reach")
    _draw(document, arguments.out)
    return 1 if missed else 0


def _draw(document: dict[str, Any], folder: Path) -> None:
    try:
        from tests.bench.plots import draw
    except ImportError:
        print("no pictures: install requirements-bench.lock (`make bench` does)", file=sys.stderr)
        return
    draw(document, folder)
    print(f"written to {folder}")


if __name__ == "__main__":
    sys.exit(main())

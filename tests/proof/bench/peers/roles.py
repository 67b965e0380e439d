"""How a peer is called: `python -m tests.proof.bench.peers.<name> <role> [options]`.

The servers are named in the environment: BENCH_POSTGRES, an empty database, and BENCH_VALKEY.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import uvloop

__all__ = ["LIST", "Options", "Role", "ready", "run"]

LIST = "bench"
"""The list in Valkey that relays deliver to."""


@dataclass(frozen=True)
class Options:
    """What a role is told."""

    postgres: str
    valkey: str
    count: int = 0
    writers: int = 1
    tuned: bool = False
    concurrency: int = 8


Role = Callable[[Options], Coroutine[Any, Any, None]]

_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "prepare": (),
    "load": ("count",),
    "relay": ("--tuned",),
    "enqueue": ("count", "--writers"),
    "worker": ("--tuned", "--concurrency"),
}


def run(**roles: Role) -> None:
    """Run the role that the command line names, on uvloop if it is to be as fast as it can be."""
    name, options = _parse(roles)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if options.tuned else None) as runner:
        runner.run(roles[name](options))


def ready() -> None:
    """Tell the benchmark that this process is at work."""
    print("ready", flush=True)


def _parse(roles: dict[str, Role]) -> tuple[str, Options]:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="role", required=True)
    for name in roles:
        command = commands.add_parser(name)
        for argument in _ARGUMENTS[name]:
            if argument == "--tuned":
                command.add_argument(argument, action="store_true")
            elif argument == "count":
                command.add_argument(argument, type=int)
            else:
                command.add_argument(argument, type=int, default=argparse.SUPPRESS)
    arguments = vars(parser.parse_args())
    name = arguments.pop("role")
    return name, Options(os.environ["BENCH_POSTGRES"], os.environ.get("BENCH_VALKEY", ""), **arguments)

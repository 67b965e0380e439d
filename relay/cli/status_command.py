"""`outbox status`."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.command import Exit
from relay.cli.output import error, line, print_json
from relay.cli.status import Status, gather
from relay.cli.status_text import METRICS, as_json, as_lines, check_conditions, failing
from service.settings import load_settings

if TYPE_CHECKING:
    from service.settings import Settings

_CLEAR = "\x1b[H\x1b[2J"


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, max=3_600, help="Seconds between two looks of --watch.")] = 2,
    fail_if: Annotated[
        str | None,
        typer.Option(help=f"Exit with 1 if one is true: 'dead>0,oldest>300s'. Of {', '.join(METRICS)}."),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Count what is completed even in a large table.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON; with --watch one line each time.")] = False,
) -> int:
    """Show what is open and what is down. Per queue and consumer.

    A queue is marked if it is paused, at its high-water mark (full), refused by
    the broker or missing in it.

    \b
    PENDING     wait for a relay, for their delay or for a retry
    DISPATCHED  are in the broker and wait for a worker
    RUNNING     are being worked on
    FAILED      are those of PENDING that failed at least once
    DEAD        failed for good and wait for a person
    DONE        are completed and not yet purged; `-` where that is only estimated
    OLDEST      how long the first of them has been due
    """
    settings = load_settings()
    conditions = check_conditions(fail_if) if fail_if is not None else []
    return asyncio.run(_look(settings, conditions, exact=exact, every=interval if watch else None, json_=json_))


async def _look(
    settings: Settings, conditions: list[tuple[str, str, float]], *, exact: bool, every: float | None, json_: bool
) -> int:
    """Once, or every so many seconds until a condition is true."""
    while True:
        found = await gather(settings, exact=exact)
        _show(found, watch=every is not None, json_=json_)
        problems = [] if found.database_problem else failing(found, conditions)
        for problem in problems:
            error(problem)
        if problems:
            return Exit.FAILED
        if every is None:
            return Exit.UNREACHABLE if found.database_problem or found.broker_problem else Exit.OK
        await asyncio.sleep(every)


def _show(found: Status, *, watch: bool, json_: bool) -> None:
    if json_ and watch:
        line(json.dumps(as_json(found), default=str))
    elif json_:
        print_json(as_json(found))
    else:
        if watch and sys.stdout.isatty():
            sys.stdout.write(_CLEAR)
        line("\n".join(as_lines(found)))

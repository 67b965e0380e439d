"""`outbox queues limit | unlimit`, and how a limit is said."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import asyncpg
import typer

from relay.cli.command import By, CommandError, Exit, Json, Why, ask, queue_name, whoami
from relay.cli.output import line, print_json
from service.ledger import limiting

if TYPE_CHECKING:
    from service.database.driver import Connection
    from service.ledger.limiting import Limit

_Queue = Annotated[str, typer.Argument(metavar="QUEUE")]
_Concurrency = Annotated[int | None, typer.Option(metavar="N", help="Deliveries that run at once, at most.")]
_Rate = Annotated[str | None, typer.Option(metavar="N/s", help="Deliveries that start, as 10/s, 600/m or 5000/h.")]
_Burst = Annotated[
    int | None,
    typer.Option(metavar="N", help="Of the rate at a time; by default what it allows in a tenth of a second."),
]

_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_RATE = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)/([smhd])")
_MOST = 10_000
_SLOWEST = 1 / 86_400


def limit(
    queue: _Queue,
    concurrency: _Concurrency = None,
    rate: _Rate = None,
    burst: _Burst = None,
    why: Why = None,
    by: By = None,
    as_json: Json = False,
) -> None:
    """Limit a queue, over all relays and workers. What it was limited to before is replaced."""
    name = queue_name(queue)
    if concurrency is None and rate is None:
        raise CommandError("limit it to what? Give --concurrency, --rate or both")
    if rate is None and burst is not None:
        raise CommandError("--burst is how many of a --rate may start at a time, so it needs one")
    per_second = None if rate is None else _parse_rate(rate)
    if per_second is not None and burst is None:
        burst = max(int(per_second / 10), 1)
    for option, number in (("--concurrency", concurrency), ("--burst", burst)):
        if number is not None and not 1 <= number <= _MOST:
            raise CommandError(f"{option}: {number} is not between 1 and {_MOST:,}")

    async def change(connection: Connection) -> None:
        try:
            await limiting.limit(connection, name, concurrency, per_second, burst, by=by or whoami(), why=why)
        except asyncpg.LockNotAvailableError:
            raise CommandError("a hand-over goes on for seconds; nothing was changed, try again", Exit.FAILED) from None

    ask(change)
    if as_json:
        print_json({"queue": name, "concurrency": concurrency, "per_second": per_second, "burst": burst})
    else:
        line(
            f"Limited queue {name} to {_said(concurrency, per_second, burst)}. To undo it: outbox queues unlimit {name}"
        )


def unlimit(queue: _Queue, why: Why = None, by: By = None, as_json: Json = False) -> None:
    """Remove a queue's limit."""
    name = queue_name(queue)
    if not ask(lambda connection: limiting.unlimit(connection, name, by=by or whoami(), why=why)):
        raise CommandError(f"queue {name} has no limit: see `outbox queues list`", Exit.NOT_FOUND)
    if as_json:
        print_json({"queue": name, "limited": False})
    else:
        line(f"Queue {name} has no limit any more.")


def _parse_rate(text: str) -> float:
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise CommandError(f"--rate: {text!r} is no rate; expected something like 10/s, 600/m or 5000/h")
    per_second = float(match[1]) / _SECONDS[match[2]]
    if not _SLOWEST <= per_second <= _MOST:
        raise CommandError(f"--rate: {text} is not between 1/d and {_MOST:,}/s")
    return per_second


def said(limit: Limit) -> str:
    """What a queue is limited to, as a person says it."""
    return _said(limit.concurrency, limit.per_second, limit.burst)


def _said(concurrency: int | None, per_second: float | None, burst: int | None) -> str:
    parts = [] if concurrency is None else [f"{concurrency:,} at once"]
    if per_second is not None:
        parts.append(f"{_rate(per_second)}, {burst:,} at a time")
    return " and ".join(parts)


def _rate(per_second: float) -> str:
    """In the unit in which it is a whole number, if there is one."""
    for unit, seconds in _SECONDS.items():
        number = per_second * seconds
        if number >= 1 and abs(number - round(number)) < 1e-6 * number:
            return f"{round(number):,}/{unit}"
    return f"{per_second:g}/s"

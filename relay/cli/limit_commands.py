"""`outbox queues limit | unlimit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import asyncpg
import typer

from relay.cli.command import By, CommandError, Exit, Json, Why, ask, queue_name, whoami
from relay.cli.output import line, print_json
from service.ledger import limiting
from service.ledger.limit_text import read_limit, say_limit

if TYPE_CHECKING:
    from service.database.driver import Connection

_Queue = Annotated[str, typer.Argument(metavar="QUEUE")]
_Concurrency = Annotated[int | None, typer.Option(metavar="N", help="Deliveries that run at once, at most.")]
_Rate = Annotated[str | None, typer.Option(metavar="N/s", help="Deliveries that start, as 10/s, 600/m or 5000/h.")]
_Burst = Annotated[
    int | None,
    typer.Option(metavar="N", help="Of the rate at a time; by default what it allows in a tenth of a second."),
]


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
    try:
        wanted = read_limit(concurrency, rate, burst)
    except ValueError as error:
        raise CommandError(f"--{error}") from None

    async def change(connection: Connection) -> None:
        try:
            await limiting.limit(connection, name, *wanted, by=by or whoami(), why=why)
        except asyncpg.LockNotAvailableError:
            raise CommandError("a hand-over goes on for seconds; nothing was changed, try again", Exit.FAILED) from None

    ask(change)
    if as_json:
        print_json({"queue": name} | dict(zip(("concurrency", "per_second", "burst"), wanted, strict=True)))
    else:
        line(f"Limited queue {name} to {say_limit(*wanted)}. To undo it: outbox queues unlimit {name}")


def unlimit(queue: _Queue, why: Why = None, by: By = None, as_json: Json = False) -> None:
    """Remove a queue's limit."""
    name = queue_name(queue)
    if not ask(lambda connection: limiting.unlimit(connection, name, by=by or whoami(), why=why)):
        raise CommandError(f"queue {name} has no limit: see `outbox queues list`", Exit.NOT_FOUND)
    if as_json:
        print_json({"queue": name, "limited": False})
    else:
        line(f"Queue {name} has no limit any more.")

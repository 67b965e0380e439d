"""`outbox queues list | pause | resume`, and the limits beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from relay.cli import limit_commands
from relay.cli.command import By, CommandError, Exit, Json, Why, ask, queue_name, whoami
from relay.cli.output import Column, age, compact, line, note, plain, print_json, table
from service.ledger import pausing
from service.ledger.counting import count_queues
from service.ledger.limit_text import said
from service.ledger.pausing import EVERY_QUEUE

if TYPE_CHECKING:
    from datetime import timedelta

    from service.database.driver import Connection
    from service.ledger.counting import QueueCounts

app = typer.Typer(help="Pause, resume and limit queues.", no_args_is_help=True, rich_markup_mode=None)
app.command()(limit_commands.limit)
app.command()(limit_commands.unlimit)

_Queue = Annotated[str | None, typer.Argument(metavar="QUEUE")]
_Everything = Annotated[bool, typer.Option("--all", help="All queues at once.")]


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the queues. Those with open deliveries, dead letters, a limit or a pause."""
    queues = ask(count_queues)
    if as_json:
        print_json({"queues": [_document(name, each) for name, each in queues.items()]})
        return
    if not queues:
        line("No queue has anything open.")
        return
    columns = [
        Column("QUEUE", least=10),
        Column("OPEN", right=True),
        Column("DUE", right=True),
        Column("DEAD", right=True),
        Column("LIMIT", least=12),
        Column("PAUSED", least=20),
    ]
    line(table(columns, [[_title(name), *_counts(name, each), *_kept_back(each)] for name, each in queues.items()]))


def _document(name: str, queue: QueueCounts) -> dict[str, Any]:
    paused = queue.pause and {
        "at": queue.pause.paused_at, "age": queue.pause.age, "by": queue.pause.paused_by, "why": queue.pause.why,
    }  # fmt: skip
    limit = queue.limit and {
        "concurrency": queue.limit.concurrency, "per_second": queue.limit.per_second, "burst": queue.limit.burst,
        "at": queue.limit.limited_at, "age": queue.limit.age, "by": queue.limit.limited_by, "why": queue.limit.why,
    }  # fmt: skip
    return {"queue": name, "open": queue.open, "due": queue.due, "dead": queue.dead, "limit": limit, "paused": paused}


def _title(queue: str) -> str:
    return "* (all)" if queue == EVERY_QUEUE else queue


def _counts(name: str, queue: QueueCounts) -> list[str]:
    return ["" if name == EVERY_QUEUE else compact(number) for number in (queue.open, queue.due, queue.dead)]


def _kept_back(queue: QueueCounts) -> tuple[str, str]:
    limit, pause = queue.limit, queue.pause
    return (
        "-" if limit is None else f"{said(limit)}, {_set(limit.age, limit.limited_by, limit.why)}",
        "-" if pause is None else _set(pause.age, pause.paused_by, pause.why),
    )


def _set(since: timedelta, by: str, why: str | None) -> str:
    return f"{age(since)} ago by {by}" + (f": {why}" if why else "")


@app.command()
def pause(
    queue: _Queue = None, everything: _Everything = False, why: Why = None, by: By = None, as_json: Json = False
) -> None:
    """Pause a queue. Its deliveries wait in PostgreSQL until it is resumed."""
    name = _name(queue, everything)
    changed = ask(lambda connection: pausing.pause(connection, name, by=by or whoami(), why=why))
    if as_json:
        print_json({"queue": name, "paused": True, "changed": changed})
    elif changed:
        line(f"Paused {_spoken(name)}. To go on: outbox queues resume {'--all' if name == EVERY_QUEUE else name}")
    else:
        line(f"{_spoken(name).capitalize()} was paused already: see `outbox queues list`.")


@app.command()
def resume(
    queue: _Queue = None, everything: _Everything = False, why: Why = None, by: By = None, as_json: Json = False
) -> int:
    """Resume a queue. `--all` undoes `pause --all`; queues paused by name stay paused."""
    name = _name(queue, everything)
    changed, left = ask(lambda connection: _end_pause(connection, name, by or whoami(), why))
    if as_json:
        print_json({"queue": name, "paused": name in left or EVERY_QUEUE in left, "changed": changed})
    elif changed:
        line(f"Resumed {_spoken(name)}.")
    if name != EVERY_QUEUE and EVERY_QUEUE in left:
        note("All queues are still paused: outbox queues resume --all")
    elif name == EVERY_QUEUE and left:
        note(f"Still paused by name: {plain(', '.join(left))}")
    if not changed:
        raise CommandError(f"{_spoken(name)} was not paused: see `outbox queues list`", Exit.NOT_FOUND)
    return Exit.OK


async def _end_pause(connection: Connection, name: str, by: str, why: str | None) -> tuple[bool, list[str]]:
    """Whether it was paused, and what still is."""
    changed = await pausing.resume(connection, name, by=by, why=why)
    return changed, [each.queue for each in await pausing.paused_queues(connection)]


def _name(queue: str | None, everything: bool) -> str:
    if (queue is None) != everything:
        raise CommandError("which queue? Give one name, or --all")
    return EVERY_QUEUE if queue is None else queue_name(queue)


def _spoken(name: str) -> str:
    return "all queues" if name == EVERY_QUEUE else f"queue {name}"

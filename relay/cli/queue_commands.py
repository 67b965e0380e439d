"""Pausing queues: a row in `paused_queue`, which every relay honours within a second."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any

import typer

from relay.cli.command import CommandError, Exit, connect, whoami
from relay.cli.output import Column, age, compact, line, note, plain, print_json, table
from service.settings import load_settings
from service.text import storable

__all__ = ["EVERY_QUEUE", "app"]

EVERY_QUEUE = "*"
"""The name under which all queues are paused at once."""

_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_-]{0,99}")

_PAUSE = "INSERT INTO paused_queue (queue, paused_by, why) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING RETURNING queue"
_RESUME = "DELETE FROM paused_queue WHERE queue = $1 RETURNING queue"
_PAUSED = "SELECT *, clock_timestamp() - paused_at AS age FROM paused_queue ORDER BY queue"
_QUEUES = """
SELECT queue, count(*) AS open, count(*) FILTER (WHERE due_at <= now()) AS due, 0 AS dead
FROM outbox_message WHERE state <> 'completed' GROUP BY queue
UNION ALL
SELECT queue, 0, 0, count(*) FROM dead_letter WHERE resolution IS NULL GROUP BY queue
"""

app = typer.Typer(help="Pause and resume queues.", no_args_is_help=True, rich_markup_mode=None)

Queue = Annotated[str | None, typer.Argument(metavar="QUEUE")]
Everything = Annotated[bool, typer.Option("--all", help="All queues at once.")]
By = Annotated[str | None, typer.Option(help="Who does it, for the record; by default your user and host.")]
Why = Annotated[str | None, typer.Option(help="Why, for the record.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the queues. Those with open deliveries, dead letters, or a pause."""
    queues = asyncio.run(_list())
    if as_json:
        print_json({"queues": queues})
        return
    if not queues:
        line("No queue has anything open.")
        return
    columns = [
        Column("QUEUE", least=10),
        Column("OPEN", right=True),
        Column("DUE", right=True),
        Column("DEAD", right=True),
        Column("PAUSED", least=20),
    ]
    line(table(columns, [[_title(each["queue"]), *_counts(each), _pause(each["paused"])] for each in queues]))


def _title(queue: str) -> str:
    return "* (all)" if queue == EVERY_QUEUE else queue


def _counts(queue: dict[str, Any]) -> list[str]:
    return ["" if queue["queue"] == EVERY_QUEUE else compact(queue[name]) for name in ("open", "due", "dead")]


def _pause(paused: dict[str, Any] | None) -> str:
    if paused is None:
        return "-"
    return f"{age(paused['age'])} ago by {paused['by']}" + (f": {paused['why']}" if paused["why"] else "")


async def _list() -> list[dict[str, Any]]:
    async with connect(load_settings().database) as connection:
        counted = await connection.fetch(_QUEUES)
        paused = {
            row["queue"]: {"at": row["paused_at"], "age": row["age"], "by": row["paused_by"], "why": row["why"]}
            for row in await connection.fetch(_PAUSED)
        }
    names = sorted({row["queue"] for row in counted} | paused.keys())
    return [
        {"queue": name}
        | {count: sum(row[count] for row in counted if row["queue"] == name) for count in ("open", "due", "dead")}
        | {"paused": paused.get(name)}
        for name in names
    ]


@app.command()
def pause(
    queue: Queue = None, everything: Everything = False, why: Why = None, by: By = None, as_json: Json = False
) -> None:
    """Pause a queue. Its events wait in PostgreSQL until it is resumed."""
    name = _name(queue, everything)
    words = storable(by or whoami()), None if why is None else storable(why)
    changed, _ = asyncio.run(_change(_PAUSE, name, *words))
    if as_json:
        print_json({"queue": name, "paused": True, "changed": changed})
    elif changed:
        line(f"Paused {_spoken(name)}. To go on: outbox queues resume {'--all' if name == EVERY_QUEUE else name}")
    else:
        line(f"{_spoken(name).capitalize()} was paused already: see `outbox queues list`.")


@app.command()
def resume(queue: Queue = None, everything: Everything = False, as_json: Json = False) -> int:
    """Resume a queue. `--all` undoes `pause --all`; queues paused by name stay paused."""
    name = _name(queue, everything)
    changed, left = asyncio.run(_change(_RESUME, name))
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


def _name(queue: str | None, everything: bool) -> str:
    if (queue is None) != everything:
        raise CommandError("which queue? Give one name, or --all")
    if queue is None:
        return EVERY_QUEUE
    if not _NAME.fullmatch(queue):
        raise CommandError(f"{queue!r} is no queue name: letters, digits, _ and -, at most 100")
    return queue


def _spoken(name: str) -> str:
    return "all queues" if name == EVERY_QUEUE else f"queue {name}"


async def _change(statement: str, *arguments: str | None) -> tuple[bool, list[str]]:
    """Whether the statement changed anything, and what is paused now. A sleeping relay is woken to see it."""
    async with connect(load_settings().database) as connection, connection.transaction():
        changed = await connection.fetchval(statement, *arguments) is not None
        await connection.execute("SELECT outbox_wake()")
        return changed, [row["queue"] for row in await connection.fetch(_PAUSED)]

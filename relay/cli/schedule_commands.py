"""`outbox schedules list | pause | resume | run`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.command import By, CommandError, Exit, Json, Why, ask, whoami
from relay.cli.output import Column, age, line, print_json, rounded, table, timestamp
from service.ledger import scheduling

if TYPE_CHECKING:
    from service.database.driver import Connection
    from service.ledger.scheduling import Listed

app = typer.Typer(help="What is published again and again.", no_args_is_help=True, rich_markup_mode=None)

_Name = Annotated[str, typer.Argument(metavar="NAME")]


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the schedules: when each fires next, and what keeps it from that."""
    schedules = ask(lambda connection: scheduling.list_all(connection))
    if as_json:
        print_json({"schedules": [asdict(each) | {"state": each.state} for each in schedules]})
        return
    if not schedules:
        line("There is no schedule.")
        return
    columns = [
        Column("SCHEDULE", least=16),
        Column("WHEN", least=11),
        Column("NEXT (UTC)"),
        Column("IN", right=True),
        Column("STATE", least=24),
    ]
    line(table(columns, [_cells(each) for each in schedules]))


def _cells(schedule: Listed) -> list[str]:
    waits = schedule.due_in >= timedelta()
    return [
        schedule.name,
        schedule.timing,
        timestamp(schedule.next_at).removesuffix("Z"),
        age(schedule.due_in) if waits else f"-{age(schedule.due_in)}",
        _spoken(schedule),
    ]


def _spoken(schedule: Listed) -> str:
    match schedule.state:
        case "paused":
            why = f": {schedule.why}" if schedule.why else ""
            return f"paused {age(schedule.paused_for)} ago by {schedule.paused_by}{why}"
        case "dead":
            return f"stopped by dead letter {schedule.dead_letter}"
        case "lost":
            return "its tick is lost: resume it"
        case "late":
            return f"late: no worker of queue {schedule.queue} has run it"
    return "on" if schedule.last_at is None else f"on, fired for {timestamp(schedule.last_at)}"


@app.command()
def pause(name: _Name, why: Why = None, by: By = None, as_json: Json = False) -> None:
    """Pause a schedule. What it would have published meanwhile, its catch_up decides when it is resumed."""
    changed, _ = ask(lambda connection: _pause(connection, name, by or whoami(), why))
    if as_json:
        print_json({"schedule": name, "paused": True, "changed": changed})
    elif changed:
        line(f"Paused {name}. To go on: outbox schedules resume {name}")
    else:
        line(f"{name} was paused already: see `outbox schedules list`.")


async def _pause(connection: Connection, name: str, by: str, why: str | None) -> tuple[bool, Listed]:
    changed = await scheduling.pause(connection, name, by=by, why=why)
    return changed, await _look_up(connection, name)


@app.command()
def resume(name: _Name, why: Why = None, by: By = None, as_json: Json = False) -> None:
    """Resume a schedule; also one whose tick was lost."""
    changed, schedule = ask(lambda connection: _resume(connection, name, by or whoami(), why))
    if as_json:
        print_json({"schedule": name, "paused": False, "changed": changed, "next_at": schedule.next_at})
    if not changed:
        raise CommandError(f"{name} was not paused: see `outbox schedules list`", Exit.NOT_FOUND)
    if as_json:
        return
    if schedule.dead_letter is not None:
        line(
            f"Resumed {name}; it is stopped by dead letter {schedule.dead_letter}: "
            f"outbox dead-letters replay {schedule.dead_letter}"
        )
        return
    span = rounded(schedule.due_in, " s", " min", " h", " days")
    line(f"Resumed {name}. It fires {f'in {span}' if schedule.due_in > timedelta() else 'now'}.")


async def _resume(connection: Connection, name: str, by: str, why: str | None) -> tuple[bool, Listed]:
    changed = await scheduling.resume(connection, name, by=by, why=why)
    return changed, await _look_up(connection, name)


@app.command()
def run(name: _Name, why: Why = None, by: By = None, as_json: Json = False) -> None:
    """Publish a schedule's event once more, now. When it fires next stays as it is, and so does a pause."""
    event_id = ask(lambda connection: scheduling.run(connection, name, by=by or whoami(), why=why))
    if event_id is None:
        raise _unknown(name)
    if as_json:
        print_json({"schedule": name, "event_id": event_id})
    else:
        line(f"{name} fires once. What became of it: outbox events show {event_id}")


async def _look_up(connection: Connection, name: str) -> Listed:
    found = await scheduling.look_up(connection, name)
    if found is None:
        raise _unknown(name)
    return found


def _unknown(name: str) -> CommandError:
    return CommandError(f"there is no schedule {name!r}: see `outbox schedules list`", Exit.NOT_FOUND)

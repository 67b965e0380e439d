"""`outbox operations list | show | resume | stop`, and `outbox audit`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.command import By, CommandError, Exit, Json, Why, ask, parse_span, whoami
from relay.cli.operation_text import audit_table, description, did, exit_code, progress, report, summary
from relay.cli.output import line, note, print_json
from service.ledger import audit, operations
from service.ledger.replaying import carry_out, refusals

if TYPE_CHECKING:
    from service.database.driver import Connection
    from service.ledger.operations import Operation
    from service.ledger.replaying import Headway, Refusal

app = typer.Typer(help="See, stop and resume replays and discards.", no_args_is_help=True, rich_markup_mode=None)

_Number = Annotated[int, typer.Argument(metavar="ID", min=1, help="Its number.")]
_Limit = Annotated[int, typer.Option(min=1, max=10_000, help="At most this many, the latest first.")]


@app.command("list")
def list_(
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Only what is not finished.")] = False,
    limit: _Limit = 50,
    as_json: Json = False,
) -> None:
    """List replays and discards. The latest come first, with how far they came."""
    found = ask(lambda connection: operations.latest(connection, limit, unfinished=unfinished))
    if as_json:
        print_json({"operations": [asdict(each) for each in found]})
    else:
        line(summary(found) if found else "There are none.")


@app.command()
def show(number: _Number, as_json: Json = False) -> None:
    """Show one. Who asked for it, how far it came, and what was left alone."""
    operation, refused = ask(lambda connection: _show(connection, number))
    if as_json:
        print_json(asdict(operation))
    else:
        line("\n".join(description(operation, refused)))


async def _show(connection: Connection, number: int) -> tuple[Operation, dict[int, Refusal]]:
    operation = await _existing(connection, number)
    return operation, await refusals(connection, operation.refused_ids)


async def _existing(connection: Connection, number: int) -> Operation:
    operation = await operations.load(connection, number)
    if operation is None:
        raise CommandError(f"there is no operation {number}: see `outbox operations list`", Exit.NOT_FOUND)
    return operation


@app.command()
def resume(
    number: _Number,
    rate: Annotated[float | None, typer.Option(min=0.1, max=100_000, help="From now on, at most per second.")] = None,
    by: By = None,
    why: Why = None,
    as_json: Json = False,
) -> int:
    """Go on with one that was stopped, or whose process is gone. With the dead letters that were meant then."""
    operation, headway, refused = ask(lambda connection: _resume(connection, number, rate, by or whoami(), why))
    report(operation.kind, headway, refused, as_json=as_json)
    return exit_code(headway, refused, named=False)


async def _resume(
    connection: Connection, number: int, rate: float | None, by: str, why: str | None
) -> tuple[Operation, Headway, dict[int, Refusal]]:
    operation = await _existing(connection, number)
    runner = await operations.take(connection, number, by=by, why=why, rate=rate)
    if runner is None:
        raise await _not_to_be_had(connection, number)
    headway = await carry_out(connection, number, runner, progress=progress(operation.kind, operation.total))
    return operation, headway, await refusals(connection, headway.refused)


async def _not_to_be_had(connection: Connection, number: int) -> CommandError:
    operation = await _existing(connection, number)
    if operation.state == "finished":
        return CommandError(f"operation {number} is finished: see `outbox operations show {number}`", Exit.NOT_FOUND)
    return CommandError(f"operation {number} is running: `outbox operations stop {number}` stops it", Exit.FAILED)


@app.command()
def stop(number: _Number, by: By = None, why: Why = None, as_json: Json = False) -> int:
    """Stop one before its next batch. What is done is done; `resume` goes on with the rest."""
    operation, stopped = ask(lambda connection: _stop(connection, number, by or whoami(), why))
    if as_json:
        print_json(asdict(operation) | {"changed": stopped})
    elif stopped:
        line(f"Stopped operation {number}.")
    if not stopped:
        raise CommandError(f"operation {number} was not running: it is {operation.state}", Exit.NOT_FOUND)
    return Exit.OK


async def _stop(connection: Connection, number: int, by: str, why: str | None) -> tuple[Operation, bool]:
    await _existing(connection, number)
    stopped = await operations.stop(connection, number, by=by, why=why)
    return await _existing(connection, number), stopped


def show_audit(
    kind: Annotated[str | None, typer.Option(help="Only this: replay, discard, edit, pause, erase ...")] = None,
    by: Annotated[str | None, typer.Option(help="Only by somebody whose name has this in it.")] = None,
    since: Annotated[str | None, typer.Option(help="Since: 2h (ago), or an ISO time (UTC unless it says so).")] = None,
    until: Annotated[str | None, typer.Option(help="Before: 30m (ago), or an ISO time.")] = None,
    limit: _Limit = 50,
    as_json: Json = False,
) -> None:
    """Say who did what, when and why. Pauses, replays, discards, edits, reveals, erasures; the latest first."""
    acts = ask(lambda connection: _acts(connection, audit.AuditFilter(kind, by), since, until, limit))
    if as_json:
        print_json({"acts": [asdict(each) | {"did": did(each)} for each in acts]})
        return
    line(audit_table(acts) if acts else "Nobody did anything.")
    if len(acts) == limit:
        note(f"The latest {limit:,}; --limit shows more.")


async def _acts(
    connection: Connection, wanted: audit.AuditFilter, since: str | None, until: str | None, limit: int
) -> list[audit.Act]:
    first, end = await parse_span(connection, since, until)
    return await audit.acts(connection, replace(wanted, since=first, until=end), limit)

"""`outbox lanes list | repair`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.command import By, CommandError, Exit, Json, Why, ask, whoami
from relay.cli.output import Column, age, compact, line, plain, print_json, table
from service.ledger import lanes

if TYPE_CHECKING:
    from service.database.driver import Connection
    from service.ledger.lanes import StandingLane

app = typer.Typer(help="See what waits in order, and why.", no_args_is_help=True, rich_markup_mode=None)

_MOST = 100_000

_WHY = {
    "dead": "dead letter {number}, {span} ago: {why}",
    "failed": "attempt {number} in {span}, after {why}",
    "paused": "queue {queue} is paused",
    "running": "a worker is at attempt {number}",
    "dispatched": "waits in the broker for a worker",
    "due": "waits for a relay",
    "stranded": "nothing: outbox lanes repair",
}


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=_MOST, help="How many to show.")] = 20,
    only_stranded: Annotated[bool, typer.Option("--stranded", help="Those that wait for nothing.")] = False,
    as_json: Json = False,
) -> None:
    """List lanes that stand. How many wait in each, and for what; the worst first."""
    total, found = ask(lambda connection: lanes.standing(connection, limit, only_stranded=only_stranded))
    if as_json:
        print_json({"total": total, "lanes": [asdict(each) for each in found]})
        return
    if not found:
        line("No lane is stranded." if only_stranded else "Nothing waits in a lane.")
        return
    columns = [Column("LANE", least=20), Column("WAITING", right=True), Column("FOR", least=30)]
    line(table(columns, [[each.lane, compact(each.waiting), why(each)] for each in found]))
    if total > len(found):
        line(f"and {total - len(found):,} more: --limit shows them")


def why(lane: StandingLane) -> str:
    """What a lane waits for."""
    span = age(abs(lane.span))
    return plain(_WHY[lane.kind].format(number=lane.number, span=span, why=lane.why, queue=lane.queue))


@app.command()
def repair(
    names: Annotated[list[str] | None, typer.Argument(metavar="[LANE]...", help="Only these.")] = None,
    why: Why = None,
    by: By = None,
    as_json: Json = False,
) -> int:
    """Let stranded lanes go on. A lane is stranded if something waits in it, and nothing runs or blocks."""
    repaired, refused = ask(lambda connection: _repair(connection, names, by or whoami(), why))
    if as_json:
        print_json({"repaired": repaired, "refused": refused})
    else:
        line(f"Repaired {len(repaired):,} lane{'s' * (len(repaired) != 1)}.")
    if refused:
        raise CommandError(f"not stranded: {plain(', '.join(refused))}; see `outbox lanes list`", Exit.NOT_FOUND)
    return Exit.OK


async def _repair(
    connection: Connection, names: list[str] | None, by: str, why: str | None
) -> tuple[list[str], list[str]]:
    """Those that go on, and those that were named and are not stranded."""
    wanted = names
    if wanted is None:
        _, found = await lanes.standing(connection, _MOST, only_stranded=True)
        wanted = [each.lane for each in found]
    done = {lane: await lanes.repair(connection, lane, by=by, why=why) for lane in wanted}
    return [lane for lane, so in done.items() if so], [lane for lane, so in done.items() if not so and names]

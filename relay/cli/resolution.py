"""What a person asks for with `replay` or `discard`: which dead letters, and whether they are sure."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from relay.cli.command import CommandError, Exit, ask, parse_span
from relay.cli.operation_text import PAST, counted, exit_code, progress, report
from relay.cli.output import cut, line, note, plain, print_json
from service.ledger import dead_letters, operations
from service.ledger.replaying import Action, Headway, Refusal, refusals, resolve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from service.database.driver import Connection

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for."""

    action: Action
    references: Sequence[str]
    wanted: dead_letters.LetterFilter
    since: str | None
    until: str | None
    everything: bool
    dry_run: bool
    yes: bool
    rate: float | None
    by: str
    why: str | None
    as_json: bool

    @property
    def narrows(self) -> bool:
        wanted = self.wanted
        return any((wanted.consumer, wanted.event_type, wanted.queue, wanted.error, self.since, self.until))


def carry_out(order: Order) -> int:
    """Do it, after asking where that is due; the exit code."""
    given = [bool(order.references), order.narrows, order.everything]
    if not any(given):
        raise CommandError(f"{order.action} what? Give ids, a filter such as --consumer, or --all")
    if order.references and any(given[1:]):
        raise CommandError("give either ids or filters, not both")
    # Nobody's transaction or connection stays open while a person thinks.
    found = ask(lambda connection: _select(connection, order))
    if order.dry_run:
        return _rehearse(order, found)
    if not found.ids:
        report(order.action, Headway(0), {}, as_json=order.as_json)
        return Exit.OK
    if len(found.ids) > 1 and not order.yes and not _confirmed(order, found):
        note("Nothing was done.")
        return Exit.FAILED
    headway, refused = ask(lambda connection: _resolve(connection, order, found))
    report(order.action, headway, refused, as_json=order.as_json)
    if found.more and not headway.interrupted:
        note(f"More match than the {operations.MOST:,} of one operation: the same command goes on with them.")
        return Exit.FAILED
    return exit_code(headway, refused, named=bool(order.references))


@dataclass(frozen=True, slots=True)
class _Selection:
    """Which ones are meant, as of now; `more` says that there are more than fit into one operation."""

    ids: Sequence[int]
    groups: Sequence[dict[str, Any]]
    about: Mapping[str, Any]
    more: bool


async def _select(connection: Connection, order: Order) -> _Selection:
    about: dict[str, Any] = {}
    if order.references:
        rows = [await look_up(connection, each) for each in order.references]
        ids = list(dict.fromkeys(row["id"] for row in rows))
    else:
        since, until = await parse_span(connection, order.since, order.until)
        wanted = replace(order.wanted, since=since, until=until)
        ids, about = await dead_letters.find_ids(connection, wanted, operations.MOST + 1), wanted.about
    more, ids = len(ids) > operations.MOST, ids[: operations.MOST]
    return _Selection(ids, await dead_letters.overview(connection, ids), about, more)


async def look_up(connection: Connection, reference: str) -> dict[str, Any]:
    """The dead letter a person named by its number or its delivery's id; of several the open or latest one."""
    try:
        given = int(reference) if reference.isascii() and reference.isdigit() else UUID(reference)
    except ValueError:
        raise CommandError(
            f"{reference!r} is no dead letter's id: expected its number, such as 17, or its delivery's UUID"
        ) from None
    row = await dead_letters.look_up(connection, given)
    if row is None:
        raise CommandError(
            f"there is no dead letter {reference}: `outbox dead-letters list` shows the open ones", Exit.NOT_FOUND
        )
    return row


async def _resolve(connection: Connection, order: Order, found: _Selection) -> tuple[Headway, dict[int, Refusal]]:
    headway = await resolve(
        connection, order.action, found.ids, by=order.by, why=order.why, about=found.about, rate=order.rate,
        progress=progress(order.action, len(found.ids)),
    )  # fmt: skip
    return headway, await refusals(connection, headway.refused)


def _rehearse(order: Order, found: _Selection) -> int:
    if order.as_json:
        print_json({"action": order.action, "dry_run": True, "count": len(found.ids), "ids": found.ids,
                    "groups": found.groups, "more": found.more})  # fmt: skip
        return Exit.OK
    line(f"{counted(len(found.ids))} would be {PAST[order.action]}; nothing was done.")
    if found.more:
        note(f"More match than the {operations.MOST:,} of one operation.")
    for text in _group_lines(found.groups):
        line(text)
    return Exit.OK


def _confirmed(order: Order, found: _Selection) -> bool:
    for text in _group_lines(found.groups):
        note(text)
    sys.stderr.write(f"{order.action.capitalize()} {counted(len(found.ids))}? [y/N] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        note("\nNobody answered; --yes does it without asking.")
    return answer.strip().lower() in ("y", "yes")


def _group_lines(groups: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        cut(plain(f"{each['count']:>7,} x {each['consumer']}: {each['reason']} ({each['error']})"), 79)
        for each in groups[:_SHOWN]
    ]
    if len(groups) > _SHOWN:
        lines.append(f"  and {sum(each['count'] for each in groups[_SHOWN:]):,} for other reasons")
    return lines

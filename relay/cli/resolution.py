"""What a person asks for with `replay` or `discard`: which dead letters, whether they are sure, and how it went."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from relay.cli.command import CommandError, Exit, ask, parse_span
from relay.cli.output import cut, line, note, plain, print_json, timestamp
from service.ledger import dead_letters
from service.ledger.replaying import Action, Headway, Refusal, Resolved, StaysOpen, refusals, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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

    @property
    def past(self) -> str:
        return "replayed" if self.action == "replay" else "discarded"


def carry_out(order: Order) -> int:
    """Do it, after asking where that is due; the exit code."""
    given = [bool(order.references), order.narrows, order.everything]
    if not any(given):
        raise CommandError(f"{order.action} what? Give ids, a filter such as --consumer, or --all")
    if order.references and any(given[1:]):
        raise CommandError("give either ids or filters, not both")
    # Nobody's transaction or connection stays open while a person thinks.
    ids, groups = ask(lambda connection: _select(connection, order))
    if order.dry_run:
        return _rehearse(order, ids, groups)
    if not ids:
        _report(order, Headway(), {})
        return Exit.OK
    if len(ids) > 1 and not order.yes and not _confirmed(order, len(ids), groups):
        note("Nothing was done.")
        return Exit.FAILED
    headway, refused = ask(lambda connection: _resolve(connection, order, ids))
    _report(order, headway, refused)
    return _exit_code(order, headway, refused)


async def _select(connection: Connection, order: Order) -> tuple[list[int], list[dict[str, Any]]]:
    if order.references:
        rows = [await look_up(connection, each) for each in order.references]
        ids = list(dict.fromkeys(row["id"] for row in rows))
    else:
        since, until = await parse_span(connection, order.since, order.until)
        ids = await dead_letters.find_ids(connection, replace(order.wanted, since=since, until=until))
    return ids, await dead_letters.overview(connection, ids)


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


async def _resolve(connection: Connection, order: Order, ids: Sequence[int]) -> tuple[Headway, dict[int, Refusal]]:
    progress = _progress(order.past, len(ids))
    headway = await resolve(
        connection, order.action, ids, by=order.by, why=order.why, rate=order.rate, progress=progress
    )
    return headway, await refusals(connection, headway.refused)


def _rehearse(order: Order, ids: Sequence[int], groups: Sequence[dict[str, Any]]) -> int:
    if order.as_json:
        print_json({"action": order.action, "dry_run": True, "count": len(ids), "ids": ids, "groups": groups})
        return Exit.OK
    line(f"{_count(len(ids))} would be {order.past}; nothing was done.")
    for text in _group_lines(groups):
        line(text)
    return Exit.OK


def _confirmed(order: Order, count: int, groups: Sequence[dict[str, Any]]) -> bool:
    for text in _group_lines(groups):
        note(text)
    sys.stderr.write(f"{order.action.capitalize()} {_count(count)}? [y/N] ")
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


def _progress(past: str, total: int) -> Callable[[int], None]:
    """Reports on stderr: in place on a terminal, a line a second elsewhere; nothing for what is over at once."""
    began = last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total and last == began:
            return
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{past} {done:,} of {total:,}" + ("\n" if done == total else ""))
            sys.stderr.flush()
        elif now - last >= 1 or done == total:
            note(f"{past} {done:,} of {total:,}")
        else:
            return
        last = now

    return report


def _report(order: Order, headway: Headway, refused: Mapping[int, Refusal]) -> None:
    reasons = {number: _reason(number, refusal) for number, refusal in refused.items()}
    if order.as_json:
        print_json({"action": order.action, "dry_run": False, "done": headway.done, "refused": reasons,
                    "interrupted": headway.interrupted})  # fmt: skip
        return
    for reason in list(reasons.values())[:_SHOWN]:
        note(plain(reason))
    if len(refused) > _SHOWN:
        note(f"and {len(refused) - _SHOWN:,} more were left alone")
    if headway.interrupted:
        note("Interrupted: what is done is done, the rest is untouched; the same command goes on with it.")
    which = f"dead letter {headway.done[0]}" if len(headway.done) == 1 else _count(len(headway.done))
    line(f"{order.past.capitalize()} {which}." if headway.done or refused else "No open dead letter matches.")


def _reason(number: int, refusal: Refusal) -> str:
    match refusal:
        case Resolved():
            return f"dead letter {number} was {refusal.resolution} by {refusal.by} at {timestamp(refusal.at)}"
        case StaysOpen():
            return (
                f"dead letter {number} stays open: its delivery {refusal.delivery_id} is in the outbox already; see "
                f"`outbox events show {refusal.event_id}`"
            )
    return f"there is no dead letter {number}"


def _exit_code(order: Order, headway: Headway, refused: Mapping[int, Refusal]) -> int:
    if headway.interrupted:
        return Exit.INTERRUPTED
    if any(isinstance(refusal, StaysOpen) for refusal in refused.values()):
        return Exit.FAILED
    # With a filter somebody else was faster; with an id somebody is mistaken.
    return Exit.NOT_FOUND if refused and order.references else Exit.OK


def _count(number: int) -> str:
    return f"{number:,} dead letter{'' if number == 1 else 's'}"

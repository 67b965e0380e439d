"""How an operation goes and went, on a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from relay.cli.command import Exit
from relay.cli.output import Column, line, note, plain, print_json, table, timestamp
from service.ledger.pausing import EVERY_QUEUE
from service.ledger.replaying import Headway, Refusal, Resolved, StaysOpen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from service.ledger.audit import Act
    from service.ledger.operations import Operation

_SHOWN = 10

PAST = {"replay": "replayed", "discard": "discarded", "edit": "edited", "pause": "paused", "reveal": "revealed",
        "repair": "repaired", "resume": "resumed", "run": "ran", "search": "searched", "stop": "stopped",
        "erase": "erased", "limit": "limited", "unlimit": "no longer limited"}  # fmt: skip
"""What was done, by kind of act."""


def counted(number: int) -> str:
    """So many dead letters."""
    return f"{number:,} dead letter{'' if number == 1 else 's'}"


def progress(action: str, total: int) -> Callable[[int], None]:
    """Reports on stderr: in place on a terminal, a line a second elsewhere; nothing for what is over at once."""
    began = last = time.monotonic()
    past = PAST[action]

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


def report(action: str, headway: Headway, refused: Mapping[int, Refusal], *, as_json: bool) -> None:
    """How it went, in the hands of this command."""
    reasons = {number: reason(number, refusal) for number, refusal in refused.items()}
    if as_json:
        print_json({"action": action, "dry_run": False, "operation": headway.operation or None, "done": headway.done,
                    "refused": reasons, "interrupted": headway.interrupted or headway.stopped})  # fmt: skip
        return
    for text in list(reasons.values())[:_SHOWN]:
        note(plain(text))
    if len(refused) > _SHOWN:
        note(f"and {len(refused) - _SHOWN:,} more were left alone")
    if headway.interrupted or headway.stopped:
        how = "Interrupted" if headway.interrupted else "Somebody else stopped it, or goes on with it"
        note(f"{how}: what is done is done, the rest is untouched.")
        note(f"To go on with it: outbox operations resume {headway.operation}")
    which = f"dead letter {headway.done[0]}" if len(headway.done) == 1 else counted(len(headway.done))
    line(f"{PAST[action].capitalize()} {which}." if headway.operation else "No open dead letter matches.")


def reason(number: int, refusal: Refusal) -> str:
    """Why it was left alone."""
    match refusal:
        case Resolved():
            return f"dead letter {number} was {refusal.resolution} by {refusal.by} at {timestamp(refusal.at)}"
        case StaysOpen():
            return (
                f"dead letter {number} stays open: its delivery {refusal.delivery_id} is in the outbox already; see "
                f"`outbox events show {refusal.event_id}`"
            )
    return f"there is no dead letter {number}"


def exit_code(headway: Headway, refused: Mapping[int, Refusal], *, named: bool) -> int:
    """What the command ends with; `named` says that a person gave the ids."""
    if headway.interrupted or headway.stopped:
        return Exit.INTERRUPTED
    if any(isinstance(refusal, StaysOpen) for refusal in refused.values()):
        return Exit.FAILED
    # With a filter somebody else was faster; with an id somebody is mistaken.
    return Exit.NOT_FOUND if refused and named else Exit.OK


def summary(operations: Sequence[Operation]) -> str:
    """One line for each."""
    columns = [
        Column("ID", right=True),
        Column("WHEN"),
        Column("BY", least=10),
        Column("DOES", least=10),
        Column("OF", least=12),
        Column("DONE", right=True),
        Column("STATE"),
    ]
    rows = [
        [
            str(each.id),
            timestamp(each.asked_at),
            each.asked_by,
            each.kind,
            narrowed(each.about) or counted(each.total),
            f"{each.done + each.refused:,} of {each.total:,}",
            each.state,
        ]
        for each in operations
    ]
    return table(columns, rows)


def description(operation: Operation, refused: Mapping[int, Refusal]) -> Iterator[str]:
    """Everything that is known of one, and what can be done about it."""
    what = f"{_counted(operation)}, {operation.state}" if operation.total else _at_once(operation)
    yield plain(f"Operation {operation.id}: {what}")
    yield ""
    fields = {
        "asked for": f"{timestamp(operation.asked_at)} by {operation.asked_by} (database role {operation.asked_role})",
        "why": operation.why or "-",
        **({"of": narrowed(operation.about)} if operation.total and operation.about else {}),
        **({"rate": f"{operation.rate:g} per second at most"} if operation.rate else {}),
        **({"ended": timestamp(operation.ended_at)} if operation.total and operation.ended_at else {}),
    }
    for name, value in fields.items():
        yield f"  {name:9}  {plain(value)}"
    if refused:
        yield ""
        yield f"{operation.refused:,} were left alone" + (", the first of them:" if operation.refused > 1 else ":")
        yield from (f"  {plain(reason(number, refusal))}" for number, refusal in list(refused.items())[:_SHOWN])
    if operation.can_resume:
        yield ""
        yield "To go on with it:"
        yield f"  outbox operations resume {operation.id}"
    elif operation.state == "running":
        yield ""
        yield "To stop it before its next batch:"
        yield f"  outbox operations stop {operation.id}"


def audit_table(acts: Sequence[Act]) -> str:
    """One line for each act."""
    columns = [Column("WHEN"), Column("WHO", least=12), Column("DID", least=26), Column("WHY", least=8)]
    return table(columns, [[timestamp(each.at), each.by, did(each), each.why or "-"] for each in acts])


def did(act: Act) -> str:
    """What somebody did, in a few words."""
    if not act.total:
        return _at_once(act)
    of = narrowed(act.about)
    return f"{_counted(act)} (operation {act.operation}, {act.state})" + (f": {of}" if of else "")


def _counted(act: Act | Operation) -> str:
    done = f"{act.done:,} of {counted(act.total)}" if act.done < act.total else counted(act.total)
    return f"{PAST.get(act.kind, act.kind)} {done}"


def _at_once(act: Act | Operation) -> str:
    past = PAST.get(act.kind, act.kind)
    if act.kind == "erase":
        counts = [f"{number:,} {name.replace('_', ' ')}" for name, number in sorted(act.about.items()) if number]
        return f"{past} {', '.join(counts) or 'nothing'}"
    if act.kind == "edit":
        return f"{past} dead letter {act.about['dead_letter']}: {', '.join(act.about['fields'])}"
    if act.about.get("queue") == EVERY_QUEUE:
        return f"{past} all queues"
    return f"{past} {narrowed(act.about)}"


def narrowed(about: Mapping[str, Any]) -> str:
    """A filter, or whatever else it was about: `consumer orders.send_confirmation, error 451`."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items())

"""The functions of the database with one protection taken out: systems in which what is promised must be seen to break.

Each change refuses to be made where the code that it changes is another by now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.database.driver import Connection

__all__ = ["PROTECTIONS", "SLOW", "Change", "plant"]

Change = tuple[str, str, str]
"""A function, what stands in it, and what stands there instead."""

_LOCKS = "    PERFORM outbox_lock_all_lanes(NEW.lane);\n"
_LOOKS = "    SELECT state INTO newest FROM outbox_message\n"
_WRITES = "    UPDATE outbox_message\n    SET position"

SLOW: tuple[Change, ...] = (
    ("outbox_enter_lane", _WRITES, f"    PERFORM pg_sleep(0.01);\n{_WRITES}"),
    (
        "outbox_advance_lane",
        "    IF FOUND THEN\n        UPDATE",
        "    PERFORM pg_sleep(0.01);\n    IF next IS NOT NULL THEN\n        UPDATE",
    ),
)
"""Time between a look and what follows from it, in which others may do something: also for the healthy twin."""

PROTECTIONS: dict[str, tuple[Change, ...]] = {
    "publisher_locks": (("outbox_enter_lane", _LOCKS, ""),),
    "ending_locks": (("outbox_leave_lane", "        PERFORM outbox_lock_all_lanes(OLD.lane);\n", ""),),
    "resolving_locks": (
        ("outbox_unblock_lane", "    PERFORM outbox_lock_all_lanes(OLD.lane);\n", ""),
        ("outbox_enter_lane", _LOCKS, f"    IF NEW.position IS NULL THEN\n{_LOCKS}    END IF;\n"),
    ),
    "looks_later": (
        ("outbox_enter_lane", _LOCKS, ""),
        ("outbox_enter_lane", _WRITES, f"{_LOCKS}{_WRITES}"),
    ),
    "position_later": (
        ("outbox_enter_lane", "nextval('outbox_position')", "(extract(epoch FROM NEW.created_at) * 1000000)::bigint"),
    ),
    "dead_letter_counts": (("outbox_enter_lane", " AND NOT outbox_lane_blocked(NEW.lane)", ""),),
    "cancelled_leaves": (("outbox_leave_lane", "SET position = NULL WHERE", "SET position = position WHERE"),),
    "passes_over": (("outbox_advance_lane", "LIMIT 1 FOR UPDATE", "LIMIT 1"),),
}


async def plant(connection: Connection, changes: tuple[Change, ...]) -> None:
    """Change the functions of this database."""
    for function, old, new in changes:
        source: str = await connection.fetchval("SELECT pg_get_functiondef($1::text::regproc)", function)
        if old not in source:
            raise AssertionError(f"cannot plant the bug: {function} is another function by now")
        await connection.execute(source.replace(old, new))

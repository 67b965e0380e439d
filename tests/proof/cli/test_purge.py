"""`outbox purge` says what it removes, and what it would."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg
import pytest

if TYPE_CHECKING:
    from tests.proof.cli.conftest import Outbox, Rows

_COUNT = "SELECT count(*) FROM outbox_message"
_OLD: dict[str, Any] = {"state": "'completed'", "completed_at": "now() - interval '8 days'"}


def _age(rows: Rows, ids: list[UUID], days: int) -> None:
    """Let ids look as if they had been made so long ago."""
    for each in ids:
        older = UUID(int=each.int - (days * 86_400_000 << 80))
        rows.sql(f"UPDATE outbox_message SET id = '{older}' WHERE id = '{each}'")


def test_purge_removes_what_was_completed_before_the_setting(outbox: Outbox, rows: Rows) -> None:
    _age(rows, rows.message(3, **_OLD), 8)
    _age(rows, rows.message(1, state="'completed'", completed_at="now() - interval '6 days'"), 8)
    _age(rows, [*rows.message(), *rows.message(state="'running'"), *rows.message(state="'dispatched'")], 400)
    rows.message(1, state="'completed'", completed_at="now()")
    assert outbox("purge", "--dry-run").out == "3 completed deliveries would be removed; nothing was done.\n"
    assert rows.sql(_COUNT) == "8"
    ran = outbox("purge")
    assert (ran.code, ran.out) == (0, "Removed 3 completed deliveries and 0 HTTP idempotency keys.\n")
    assert rows.sql(_COUNT) == "5"
    assert outbox("purge", "--older-than", "5d", "--json").json["messages"] == 1
    assert outbox("purge", "--older-than", "0s").out.startswith("Removed 1 ")
    assert rows.sql("SELECT string_agg(state, ' ' ORDER BY state) FROM outbox_message") == "dispatched pending running"


@pytest.mark.parametrize("duration", ["7", "week", "-1d", "1e9d", "999999999d"])
def test_a_duration_that_makes_no_sense_is_refused(outbox: Outbox, rows: Rows, duration: str) -> None:
    ran = outbox("purge", f"--older-than={duration}")
    assert (ran.code, "is no duration" in ran.err) == (2, True)


def test_the_command_says_that_another_is_at_work(outbox: Outbox, rows: Rows, database_url: str) -> None:
    async def while_held() -> tuple[int, str]:
        holder = await asyncpg.connect(database_url)
        await holder.execute(
            "SELECT pg_advisory_lock((x'6f757470'::bigint << 32) | 'outbox_message'::regclass::oid::bigint)"
        )
        ran = await asyncio.to_thread(outbox, "purge")
        await holder.close()
        return ran.code, ran.out

    assert asyncio.run(while_held()) == (0, "Another purge is at work; nothing to do here.\n")

"""The table's own settings, without which VACUUM comes too seldom for rows that are rewritten at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.proof.ledger.conftest import Ledger


async def test_vacuum_comes_often_and_never_takes_the_table_away(ledger: Ledger) -> None:
    options = await ledger.connection.fetchval("SELECT reloptions FROM pg_class WHERE oid = 'outbox_message'::regclass")
    found = dict(each.split("=") for each in options)
    assert found.pop("vacuum_truncate") == "off"
    assert {name: float(value) for name, value in found.items()} == {
        "autovacuum_vacuum_scale_factor": 0.02,
        "autovacuum_vacuum_threshold": 5_000,
        "autovacuum_vacuum_insert_scale_factor": 0.1,
        "autovacuum_analyze_scale_factor": 0.05,
        "autovacuum_vacuum_cost_delay": 1,
    }

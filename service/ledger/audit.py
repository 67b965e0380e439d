"""Who did what, when and why: what people did (`operations.py`) and what was erased, as one list."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.ledger.operations import STATE
from service.text import storable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from service.database.driver import Connection

_FILTER = """
    ($2::text IS NULL OR kind = $2) AND ($3::text IS NULL OR strpos(lower(by), lower($3)) > 0)
    AND ($4::timestamptz IS NULL OR at >= $4) AND ($5::timestamptz IS NULL OR at < $5)
"""
_ACTS = f"""
WITH operations AS NOT MATERIALIZED (
    SELECT id AS operation, asked_at AS at, asked_by AS by, asked_role AS role, kind, about, why, {STATE} AS state,
           total, done, refused
    FROM outbox_operation WHERE state <> 'planned'
), erasures AS NOT MATERIALIZED (
    SELECT NULL::bigint AS operation, began_at AS at, erased_by AS by, erased_role AS role, 'erase' AS kind,
           jsonb_build_object('deliveries', deliveries, 'dead_letters', dead_letters, 'responses', responses,
                              'operations', operations) AS about,
           why, 'finished' AS state, 0 AS total, 0 AS done, 0 AS refused
    FROM outbox_erasure
), acts AS (
    (SELECT * FROM operations WHERE {_FILTER} ORDER BY operation DESC LIMIT $1)
    UNION ALL
    (SELECT * FROM erasures WHERE {_FILTER} ORDER BY at DESC LIMIT $1)
)
SELECT operation, at, by, role, kind, about::text AS about, why, state, total, done, refused
FROM acts ORDER BY at DESC, operation DESC LIMIT $1
"""  # noqa: S608  from above alone


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which acts are meant; what is `None` does not narrow it. `by` is a part of a name."""

    kind: str | None = None
    by: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Act:
    """What somebody did. The counts are those of a replay or discard; `operation` is `None` of an erasure."""

    operation: int | None
    at: datetime
    by: str
    role: str
    kind: str
    about: Mapping[str, Any]
    why: str | None
    state: str
    total: int
    done: int
    refused: int


async def acts(connection: Connection, wanted: AuditFilter, limit: int) -> list[Act]:
    """The latest of them, the latest first."""
    names = (None if each is None else storable(each) for each in (wanted.kind, wanted.by))
    rows = await connection.fetch(_ACTS, limit, *names, wanted.since, wanted.until)
    return [Act(**{**row, "about": json.loads(row["about"])}) for row in rows]

"""Erasing what is stored of somebody, who is known by values: an id, an e-mail address.

The rows stay, with their ids, times and states, so that every story can still be told; what they say goes. A value is
found in a payload where it is all of a string or a number there, at any depth, and in an error, a reason, the filter of
an operation or a stored response wherever it stands. Upper and lower case are one, in a response those of ASCII.

What must stay true: a delivery that is open is left alone, since its consumer could not run without its payload; a dead
letter that is open is closed, since a replay of it could not either. All tables are walked along their keys, a page and
a short transaction at a time, and that transaction also counts in `outbox_erasure` what it erased: an erasure that is
interrupted has its record too. The record never holds what was erased.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from service.ledger.delivering import SHARE
from service.ledger.event_search import HOLDS
from service.text import storable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.database.driver import Connection

PAGE = 1_000
"""Rows looked at in one transaction."""

# What a request under an `Idempotency-Key` is answered from then on; see `service/http/problems.py`.
_GONE = json.dumps(
    {
        "type": "urn:problem-type:response_erased",
        "title": "The response was erased; the request was carried out",
        "status": 410,
        "code": "response_erased",
        "correlation_id": "erased",
    }
).encode()
_GONE_HEADERS = [["content-length", f"{len(_GONE)}"], ["content-type", "application/problem+json"]]

# $1: the values.
_IN_PAYLOAD = HOLDS.format(values="$1")
_IN_TEXT = "EXISTS (SELECT FROM unnest($1::text[]) AS sought WHERE strpos(lower({text}), sought) > 0)"
# $7: the values as they were given, since bytes have no case but that of ASCII.
_IN_BYTES = """
EXISTS (SELECT FROM unnest($7::text[]) AS value
        WHERE strpos(lower(encode(body, 'escape')), lower(encode(convert_to(value, 'UTF8'), 'escape'))) > 0)
"""

_NOTHING = "jsonb_build_object('erased', clock_timestamp())"
_ERRORS = """
(SELECT coalesce(jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
     'at', error -> 'at', 'attempt', error -> 'attempt', 'type', error -> 'type', 'message', 'erased'))), '[]')
 FROM jsonb_array_elements(errors) AS error)
"""

_MESSAGES = f"""
WITH page AS MATERIALIZED (
    SELECT id, state = 'completed' AS closed, {_IN_PAYLOAD} OR {_IN_TEXT.format(text="errors::text")} AS found
    FROM outbox_message WHERE id > $2 ORDER BY id LIMIT $3
), chosen AS (
    SELECT message.id FROM outbox_message AS message JOIN page ON page.id = message.id
    WHERE page.found AND page.closed AND $4 ORDER BY message.id FOR UPDATE OF message
), erased AS (
    UPDATE outbox_message SET payload = {_NOTHING}, errors = {_ERRORS}, lane = NULL, position = NULL,
        headers = headers - '{SHARE}'
    FROM chosen WHERE outbox_message.id = chosen.id RETURNING 1
)
SELECT (SELECT id FROM page ORDER BY id DESC LIMIT 1) AS last, (SELECT count(*) FROM erased) AS erased,
       (SELECT count(*) FROM page WHERE found AND closed) AS found,
       (SELECT count(*) FROM page WHERE found AND NOT closed) AS open
"""  # noqa: S608  from above alone
_REPLACED = f"CASE WHEN {_IN_TEXT} THEN 'erased' ELSE {{text}} END"
_DEAD_LETTERS = f"""
WITH page AS MATERIALIZED (
    SELECT id, {_IN_PAYLOAD} OR {_IN_TEXT.format(text="concat_ws(' ', errors::text, reason, resolved_why)")} AS found
    FROM dead_letter WHERE id > $2 ORDER BY id LIMIT $3
), chosen AS (
    SELECT dead_letter.id, dead_letter.lane FROM dead_letter JOIN page ON page.id = dead_letter.id
    WHERE page.found AND $4 ORDER BY dead_letter.id FOR UPDATE OF dead_letter
), erased AS (
    UPDATE dead_letter SET payload = {_NOTHING}, errors = {_ERRORS}, reason = {_REPLACED.format(text="reason")},
        lane = NULL, position = NULL, blocks = false, headers = headers - '{SHARE}',
        resolution = coalesce(resolution, 'discarded'), resolved_at = coalesce(resolved_at, clock_timestamp()),
        resolved_by = CASE WHEN resolution IS NULL THEN $5 ELSE resolved_by END,
        resolved_why = CASE WHEN resolution IS NULL THEN $6 ELSE {_REPLACED.format(text="resolved_why")} END
    FROM chosen WHERE dead_letter.id = chosen.id
    RETURNING outbox_lock_lanes(ARRAY(SELECT lane FROM chosen WHERE lane IS NOT NULL))
)
SELECT (SELECT id FROM page ORDER BY id DESC LIMIT 1) AS last, (SELECT count(*) FROM erased) AS erased,
       (SELECT count(*) FROM page WHERE found) AS found
"""  # noqa: S608
_OPERATIONS = f"""
WITH page AS MATERIALIZED (
    SELECT id, {_IN_TEXT.format(text="concat_ws(' ', about::text, why)")} AS found
    FROM outbox_operation WHERE id > $2 ORDER BY id LIMIT $3
), erased AS (
    UPDATE outbox_operation SET why = {_REPLACED.format(text="why")}, about = (
        SELECT coalesce(jsonb_object_agg(key, CASE WHEN {_IN_TEXT.format(text="value::text")}
                                              THEN to_jsonb('erased'::text) ELSE value END), '{{}}')
        FROM jsonb_each(about) AS part (key, value))
    FROM page WHERE outbox_operation.id = page.id AND page.found AND $4 RETURNING 1
)
SELECT (SELECT id FROM page ORDER BY id DESC LIMIT 1) AS last, (SELECT count(*) FROM erased) AS erased,
       (SELECT count(*) FROM page WHERE found) AS found
"""  # noqa: S608
_RESPONSES = f"""
WITH page AS MATERIALIZED (
    SELECT scope, key, body <> $5 AND ({_IN_BYTES}
           OR {_IN_TEXT.format(text="concat_ws(' ', scope, key, headers::text)")}) AS found
    FROM idempotency_key WHERE (scope, key) > (($2::text[])[1], ($2::text[])[2]) ORDER BY scope, key LIMIT $3
), erased AS (
    UPDATE idempotency_key AS stored SET status = 410, headers = $6, body = $5
    FROM page WHERE stored.scope = page.scope AND stored.key = page.key AND page.found AND $4 RETURNING 1
)
SELECT (SELECT ARRAY[scope, key] FROM page ORDER BY scope DESC, key DESC LIMIT 1) AS last,
       (SELECT count(*) FROM erased) AS erased, (SELECT count(*) FROM page WHERE found) AS found
"""  # noqa: S608

_RECORD = "INSERT INTO outbox_erasure (erased_by, why) VALUES ($1, $2) RETURNING id"
_COUNT = "UPDATE outbox_erasure SET {column} = {column} + $2 WHERE id = $1"


@dataclass(frozen=True, slots=True)
class Erased:
    """What was erased, or would be; and the open deliveries that were left alone."""

    deliveries: int = 0
    dead_letters: int = 0
    responses: int = 0
    operations: int = 0
    open: int = 0


@dataclass(frozen=True, slots=True)
class _Walk:
    """A table, as it is looked through."""

    column: str
    statement: str
    first: Any
    extra: tuple[Any, ...] = ()


async def find(connection: Connection, values: Sequence[str]) -> Erased:
    """What is stored of these values, and nothing is changed."""
    return await _each(connection, values, None, "", "")


async def erase(connection: Connection, values: Sequence[str], *, by: str, why: str) -> Erased:
    """Erase it.

    Args:
        connection: One that reads JSON, outside a transaction, of the role that owns the tables.
        values: What names the subject.
        by: Who does it, for the record.
        why: And why.
    """
    by, why = storable(by), storable(why)
    record = await connection.fetchval(_RECORD, by, why)
    return await _each(connection, values, record, by, why)


async def _each(connection: Connection, given: Sequence[str], record: int | None, by: str, why: str) -> Erased:
    values = [_canonical(storable(each.strip())) for each in given]
    lower = [each.lower() for each in values]
    walks = [
        _Walk("deliveries", _MESSAGES, UUID(int=0)),
        _Walk("dead_letters", _DEAD_LETTERS, 0, (by, why)),
        _Walk("operations", _OPERATIONS, 0),
    ]
    if await connection.fetchval("SELECT to_regclass('idempotency_key')") is not None:
        walks.append(_Walk("responses", _RESPONSES, ["", ""], (_GONE, _GONE_HEADERS, values)))
    counts: dict[str, int] = {}
    for walk in walks:
        counts |= await _walk(connection, walk, lower, record)
    return Erased(**counts)


async def _walk(connection: Connection, walk: _Walk, values: Sequence[str], record: int | None) -> dict[str, int]:
    clock = asyncio.get_running_loop().time
    cursor, done, still_open = walk.first, 0, 0
    while cursor is not None:
        began = clock()
        async with connection.transaction():
            row = await connection.fetchrow(walk.statement, values, cursor, PAGE, record is not None, *walk.extra)
            assert row is not None
            if row["erased"]:
                await connection.execute(_COUNT.format(column=walk.column), record, row["erased"])
        cursor = row["last"]
        done += row["found"] if record is None else row["erased"]
        still_open += row.get("open") or 0
        # Leaves the larger part of the processor and the disk to others.
        await asyncio.sleep(min(2 * (clock() - began), 1))
    return {walk.column: done} | ({"open": still_open} if walk.column == "deliveries" else {})


def _canonical(value: str) -> str:
    """A UUID as it is stored, however it was written."""
    try:
        return str(UUID(value))
    except ValueError:
        return value

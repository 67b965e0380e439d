"""Every statement a worker changes a delivery's state with; the diagram is in `tables.py`.

What must stay true: each statement names the row's id, the claim's token and the state it comes from, and the caller
treats "no row" as "somebody else has it now". Token alone or state alone would let an effect happen twice: after a
COMMIT whose reply was lost, or in a worker that comes back to life after its row was recovered, replayed or purged.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from service.ledger.follow_ups import AFTER, THEN
from service.ledger.ids import delivery_id, new_event_id

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    import asyncpg

    from service.database.driver import Connection

ERRORS_KEPT = 10
"""Errors a row keeps: the first one and the latest."""

SHARE = "share"
"""The header with the key under which a delivery takes turns with others of its queue; see `sharing.py`."""

SHARED = f"headers ->> '{SHARE}' IS NOT NULL AND state <> 'completed'"
SHARE_KEY = f"((queue || ':' || (headers ->> '{SHARE}')) COLLATE \"C\")"
"""Which deliveries have a place in the index of these, and its first column there."""

DUE_AFTER = "due_after"
"""The header of a delivery that was delayed or replayed: seconds after its event was there at which it came due."""

DIED = "delivery.died"
"""The type of the event that a delivery has been given up, for the one consumer that takes it over."""

DEAD_LETTER = "dead_letter"
"""The header of such a delivery: the dead letter's number."""

FORGIVEN_LOSSES = 3
"""How often a row may lose its database in mid-effect before that uses up attempts.

An outage hits whatever runs, and the same row again when it is the second one; but a row that crashes its own backend
looks like one each time, and must run out of attempts.
"""

SUSPECT_FROM = 2
"""The attempt from which on a row whose worker was lost is suspected of having killed it.

Such a row goes through the relay, which puts it apart from those that were lost with it, before anybody claims it; and
a worker process runs one of them at a time.
"""

WORKER_LOST = "WorkerLost"
"""The type of the error that a suspect's row is given."""

# Rows are found by the primary key. While the table is empty by PostgreSQL's statistics, the index of due rows looks
# just as good, and a plan that is kept would read all of it for every row. `_STATE` keeps that index out: PostgreSQL
# cannot tell from `_STATE = 'running'` that the row is in it. Arrays are matched by position for the same reason: a
# join with them may be planned from the table's side.
_STATE = "(message.state || '')"

# The states a claim may come from must cover what the row looked like before the relay's dispatch commits: a worker
# can be faster than that commit, and READ COMMITTED waits only for rows whose committed version matches. Suspects are
# left out: the relay never hands them over from `running`, and an old message must not bring them together again.
#
# A claim of a first dispatch need not survive a crash of PostgreSQL: it would only run again. From the second on it
# must, or a delivery that crashes its backend would never use up its attempts.
_CLAIMABLE = f"""
({_STATE} = 'dispatched'
 OR ({_STATE} = 'pending' AND message.due_at <= now())
 OR ({_STATE} = 'running' AND message.attempts < {SUSPECT_FROM} AND message.due_at <= now())
 OR ({_STATE} = 'running' AND message.claim_token = asked.token))
"""

# Of a limited queue nothing starts that was not handed over: what has a slot is dispatched, or runs. This is asked of
# the row as it is once it is locked, so what the relay is handing over at this moment is waited for like any other.
_MAY_START = """
CASE WHEN asked.state = 'dispatched' OR asked.mine THEN true
     ELSE NOT EXISTS (SELECT FROM limited_queue WHERE limited_queue.queue = message.queue) END
"""
_MINE = f"coalesce({_STATE} = 'running' AND message.claim_token = asked.token, false)"

_AS_RUNNING = """
SET state = 'running',
    claim_token = asked.token,
    attempts = message.attempts
               + CASE WHEN message.state = 'running' AND message.claim_token = asked.token THEN 0 ELSE 1 END,
    started_at = clock_timestamp(),
    due_at = clock_timestamp() + $3
"""

_TAKEN = f"""
message.id, claim_token, event_id, event_type, version, consumer, message.queue, payload, headers, attempts,
created_at, coalesce(expires_at <= clock_timestamp(), false) AS expired, message.dispatches,
extract(epoch FROM started_at - created_at)::float8 AS age,
coalesce(message.errors -> -1 ->> 'type' = '{WORKER_LOST}', false) AS suspect
"""

_CLAIM = f"""
WITH asked AS MATERIALIZED (
    SELECT message.state, {_MINE} AS mine, asked.token
    FROM outbox_message AS message CROSS JOIN (SELECT $2::uuid AS token) AS asked
    WHERE message.id = $1 AND {_CLAIMABLE}
    FOR UPDATE OF message
)
UPDATE outbox_message AS message {_AS_RUNNING}
FROM asked WHERE message.id = $1 AND {_MAY_START}
RETURNING {_TAKEN}, CASE WHEN dispatches < 2 THEN set_config('synchronous_commit', 'off', true) END
"""  # noqa: S608


def claiming(condition: str = "true", *, wait: bool = False) -> str:
    """SQL that takes those of the rows `$1` under the tokens `$2`, for the lease `$3`, that fulfil a condition as well.

    Args:
        condition: On `message`. It is asked again of a row that was waited for.
        wait: Whether rows that somebody has locked are waited for. Whoever had the lock may have put the row elsewhere
            in the table; one that was free keeps its place.
    """
    lock, place = ("", "id") if wait else ("SKIP LOCKED", "ctid")
    return f"""
WITH asked AS MATERIALIZED (
    SELECT message.{place}, message.state, message.dispatches, {_MINE} AS mine, asked.token
    FROM outbox_message AS message
    CROSS JOIN LATERAL (SELECT ($2::uuid[])[array_position($1::uuid[], message.id)] AS token) AS asked
    WHERE message.id = ANY($1::uuid[]) AND {_CLAIMABLE} AND {condition}
    FOR UPDATE OF message {lock}
)
UPDATE outbox_message AS message {_AS_RUNNING}
FROM asked WHERE message.{place} = asked.{place} AND {_MAY_START}
RETURNING {_TAKEN},
          (SELECT set_config('synchronous_commit', 'off', true)
           WHERE NOT EXISTS (SELECT FROM asked WHERE asked.dispatches >= 2))
"""  # noqa: S608


_CLAIM_FREE = claiming()

# What a completion let come due in its lane. It is claimed as if its message had come, but whoever is at it is not
# waited for; and a relay, which was not woken for it, is woken if it is not taken after all. Only the first one behind
# is looked at, since as many as there are may wait behind it.
_CLAIM_NEXT = f"""
WITH next AS MATERIALIZED (
    SELECT behind.id
    FROM outbox_message AS ended CROSS JOIN LATERAL (
        SELECT id FROM outbox_message WHERE lane = ended.lane AND position > ended.position ORDER BY position LIMIT 1
    ) AS behind
    WHERE ended.id = $1
), asked AS MATERIALIZED (
    SELECT message.ctid, message.state, {_MINE} AS mine, asked.token
    FROM outbox_message AS message CROSS JOIN (SELECT $2::uuid AS token) AS asked
    WHERE message.id = (SELECT id FROM next) AND message.queue = $4 AND message.consumer = ANY($5) AND {_CLAIMABLE}
    FOR UPDATE OF message SKIP LOCKED
), taken AS (
    UPDATE outbox_message AS message {_AS_RUNNING}
    FROM asked WHERE message.ctid = asked.ctid AND {_MAY_START}
    RETURNING {_TAKEN}, CASE WHEN dispatches < 2 THEN set_config('synchronous_commit', 'off', true) END
)
SELECT taken.*, CASE WHEN taken.id IS NULL THEN outbox_wake() END FROM next LEFT JOIN taken ON true
"""  # noqa: S608

_COMPLETE = f"""
UPDATE outbox_message AS message SET state = 'completed', completed_at = clock_timestamp()
WHERE id = $1 AND claim_token = $2 AND {_STATE} IN ('running', 'dispatched')
"""  # noqa: S608

# The row's lane moves on with the commit. It is locked together with those that the consumer has published to.
_COMPLETED = "RETURNING true, CASE WHEN lane IS NOT NULL THEN outbox_lock_all_lanes(lane) END"
_CLAIMS_NEXT = ", CASE WHEN lane IS NOT NULL THEN set_config('outbox.claims_next', lane, true) END"

# It has not run, so the attempt is refunded.
_EXPIRE = f"""
UPDATE outbox_message AS message
SET state = 'completed', completed_at = clock_timestamp(), ended_as = 'expired', attempts = attempts - 1,
    started_at = NULL
WHERE id = $1 AND claim_token = $2 AND {_STATE} = 'running'
RETURNING true
"""  # noqa: S608

# The mark of the session's transaction is the claim's token. It tells whether the effect is still whole: it is gone
# when a consumer has committed or rolled back behind the session's back.
_UNBROKEN = "coalesce(current_setting('outbox.transaction', true), '') = $2::uuid::text"


def errors_with(error: str) -> str:
    """SQL for a row's errors and this one. The oldest stays: it says what went wrong first."""
    return f"""
        CASE WHEN jsonb_array_length(errors) >= {ERRORS_KEPT} THEN errors - 1 ELSE errors END
        || jsonb_build_array(jsonb_build_object('at', clock_timestamp(), 'attempt', attempts) || {error})
    """


_ERRORS = errors_with("$3::jsonb")

# A retry may be due before the moment a sleeping relay wakes up at. The claim is over, and so is its token: a heartbeat
# that is under way would else take the row back once it is handed over again, and nobody would run it for a lease.
_FAIL = f"""
UPDATE outbox_message AS message
SET state = 'pending', due_at = clock_timestamp() + $4, claim_token = NULL, errors = {_ERRORS}
WHERE id = $1 AND claim_token = $2 AND {_STATE} = 'running'
RETURNING outbox_wake()
"""  # noqa: S608

_RELEASE = f"""
UPDATE outbox_message AS message
SET state = 'pending', due_at = clock_timestamp() + $4, claim_token = NULL, attempts = attempts - 1,
    errors = CASE WHEN $3::jsonb IS NULL THEN errors ELSE {_ERRORS} END
WHERE id = $1 AND claim_token = $2 AND {_STATE} = 'running'
RETURNING outbox_wake()
"""  # noqa: S608

# Suspected of ending its own backend each time, a row waits twice as long each time, and that often only.
_FORGIVEN = "(SELECT count(*) FROM jsonb_array_elements(errors) AS error WHERE error ? 'forgiven')"

_FORGIVE = f"""
UPDATE outbox_message AS message
SET state = 'pending', due_at = clock_timestamp() + $4::interval * 2 ^ {_FORGIVEN}, claim_token = NULL,
    attempts = attempts - 1, errors = {_ERRORS}
WHERE id = $1 AND claim_token = $2 AND {_STATE} = 'running' AND {_FORGIVEN} < {FORGIVEN_LOSSES}
RETURNING outbox_wake()
"""  # noqa: S608

# The first of a series stands for all of it, so that its time is kept however long the series becomes. The token stays,
# since the same claim may let the row die after this; no heartbeat ever had it.
_POSTPONE = f"""
UPDATE outbox_message AS message
SET state = 'pending', due_at = clock_timestamp() + $4, attempts = attempts - 1,
    errors = CASE WHEN errors -> -1 ->> 'type' = $3::jsonb ->> 'type' AND errors -> -1 -> 'attempt' = to_jsonb(attempts)
             THEN errors ELSE {_ERRORS} END
WHERE id = $1 AND claim_token = $2 AND {_STATE} = 'running'
RETURNING outbox_wake(), (errors -> -1 ->> 'at')::timestamptz < clock_timestamp() - $5::interval AS overdue
"""  # noqa: S608

_BURY = f"""
WITH dead AS (
    DELETE FROM outbox_message AS message
    WHERE id = $1 AND claim_token = $2 AND {_STATE} = ANY($5)
    RETURNING message.*
), letter AS (
    INSERT INTO dead_letter (message_id, event_id, event_type, version, consumer, queue, payload, headers, attempts,
                             dispatches, created_at, errors, reason, lane, position, blocks)
    SELECT id, event_id, event_type, version, consumer, queue, payload, headers, attempts, dispatches, created_at,
           {_ERRORS}, $4, lane, position, lane IS NOT NULL AND NOT $6
    FROM dead
    RETURNING id
)
"""  # noqa: S608
_DIE = f"{_BURY} SELECT id FROM letter"  # noqa: S608

# One statement: nobody may be told of a dead letter that is not there, nor of one twice.
_DIE_AND_TELL = f"""
{_BURY}, told AS (
    INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers)
    SELECT $7, $8, '{DIED}', version, $9, queue, payload,
           headers - ARRAY['{DUE_AFTER}', '{THEN}']
           || jsonb_build_object('{DEAD_LETTER}', letter.id::text, 'causation_id', dead.id::text)
    FROM dead CROSS JOIN letter
)
SELECT id FROM letter
"""  # noqa: S608

# SKIP LOCKED: rows locked by a complete would otherwise be waited for in another order than the completes lock them.
# A row the relay handed over again is taken back as long as nobody claimed it.
_HEARTBEAT = f"""
WITH mine AS MATERIALIZED (
    SELECT message.ctid, lease.until
    FROM outbox_message AS message
    CROSS JOIN LATERAL (SELECT array_position($1::uuid[], message.id) AS number) AS place
    CROSS JOIN LATERAL (SELECT ($2::uuid[])[number] AS token, ($3::interval[])[number] AS until) AS lease
    WHERE message.id = ANY($1::uuid[]) AND message.claim_token = lease.token
      AND {_STATE} IN ('running', 'dispatched') AND clock_timestamp() < message.started_at + lease.until
    FOR UPDATE OF message SKIP LOCKED
)
UPDATE outbox_message AS message
SET state = 'running', due_at = LEAST(clock_timestamp() + $4, message.started_at + mine.until)
FROM mine WHERE message.ctid = mine.ctid
"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Claim:
    """A row that is this worker's until its lease ends; `document` is the event's JSON."""

    id: UUID
    token: UUID
    event_id: UUID
    event_type: str
    version: int
    consumer: str
    queue: str
    document: str
    headers: dict[str, str]
    attempts: int
    dispatches: int
    waited: float
    """Seconds from when it was due first until now, by PostgreSQL's clock."""
    published_at: datetime
    expired: bool = False
    """It was claimed too late to be run."""
    deferred: bool = False
    """It came due later than its event, for it was delayed or replayed."""
    suspect: bool = False
    """Its last worker was lost, and not the first: it may have killed them."""
    dead_letter: int | None = None
    """What it is told of, if it is for an `on_dead`."""
    began: float = field(default_factory=time.perf_counter, compare=False)
    """By this process's clock, for its log alone."""

    @property
    def payload(self) -> dict[str, Any]:
        payload: dict[str, Any] = json.loads(self.document)
        return payload


async def claim(connection: Connection, delivery_id: UUID, token: UUID, lease: timedelta) -> Claim | None:
    """Take the row, or `None` if it is done, somebody else's, or not due. Repeatable with the same token."""
    row = await connection.fetchrow(_CLAIM, delivery_id, token, lease)
    return None if row is None else claim_of(row)


async def claim_free(connection: Connection, asked: Sequence[tuple[UUID, UUID]], lease: timedelta) -> list[Claim]:
    """Take what can be taken of `(id, token)` without waiting for a lock. What is missing is to be asked for alone."""
    ids, tokens = zip(*asked, strict=True)
    return [claim_of(row) for row in await connection.fetch(_CLAIM_FREE, ids, tokens, lease)]


async def claim_next(
    connection: Connection, ended: Claim, token: UUID, lease: timedelta, consumers: Sequence[str]
) -> Claim | None:
    """Take what is next in the lane of what was completed, if it is in the same queue and for one of these consumers.

    `None` if there is nothing, or others have it or will have it. Repeatable with the same token.
    """
    row = await connection.fetchrow(_CLAIM_NEXT, ended.id, token, lease, ended.queue, consumers)
    return None if row is None or row["id"] is None else claim_of(row)


def claim_of(row: asyncpg.Record) -> Claim:
    """What a statement of `claiming` has returned."""
    headers = json.loads(row["headers"])
    # Of this delivery alone, and not of what it publishes.
    due_after, letter, *_ = [headers.pop(name, None) for name in (DUE_AFTER, DEAD_LETTER, THEN, AFTER, SHARE)]
    return Claim(
        id=row["id"],
        token=row["claim_token"],
        event_id=row["event_id"],
        event_type=row["event_type"],
        version=row["version"],
        consumer=row["consumer"],
        queue=row["queue"],
        document=row["payload"],
        headers=headers,
        attempts=row["attempts"],
        dispatches=row["dispatches"],
        waited=max(row["age"] - float(due_after or 0), 0.0),
        published_at=row["created_at"],
        expired=row["expired"],
        deferred=due_after is not None,
        suspect=row["suspect"],
        dead_letter=None if letter is None else int(letter),
    )


async def complete_in_transaction(
    connection: Connection, mine: Claim, *, claims_next: bool = False
) -> tuple[bool, bool]:
    """Tick the row off inside the effect's transaction: (it is still that transaction, the row was still mine).

    Args:
        claims_next: No relay is woken for what comes due in its lane, since `claim_next` follows.
    """
    then = _CLAIMS_NEXT if claims_next else ""
    if await connection.fetchval(f"{_COMPLETE} AND {_UNBROKEN} {_COMPLETED}{then}", mine.id, mine.token):
        return True, True
    unbroken = await connection.fetchval(f"SELECT $1::uuid IS NOT NULL AND {_UNBROKEN}", mine.id, mine.token)
    return bool(unbroken), False


async def complete(connection: Connection, mine: Claim) -> bool:
    """Tick the row off after an effect outside the database; whether it was still mine."""
    return bool(await connection.fetchval(f"{_COMPLETE} {_COMPLETED}", mine.id, mine.token))


async def expire(connection: Connection, mine: Claim) -> bool:
    """Tick the row off without its effect; whether it was still mine."""
    return bool(await connection.fetchval(_EXPIRE, mine.id, mine.token))


async def fail(connection: Connection, mine: Claim, error: dict[str, str], backoff: timedelta) -> bool:
    """Put the row back, due after `backoff`; whether it was still mine."""
    return await connection.fetchrow(_FAIL, mine.id, mine.token, json.dumps(error), backoff) is not None


async def release(
    connection: Connection, mine: Claim, *, error: dict[str, str] | None = None, delay: timedelta = timedelta()
) -> None:
    """Put the row back with its attempt refunded."""
    document = None if error is None else json.dumps(error)
    await connection.execute(_RELEASE, mine.id, mine.token, document, delay)


async def forgive(connection: Connection, mine: Claim, error: dict[str, str], delay: timedelta) -> bool:
    """Put the row back with its attempt refunded, unless that was done `FORGIVEN_LOSSES` times; whether it was done."""
    document = json.dumps(error | {"forgiven": True})
    return await connection.fetchrow(_FORGIVE, mine.id, mine.token, document, delay) is not None


async def postpone(
    connection: Connection, mine: Claim, error: dict[str, str], delay: timedelta, patience: timedelta
) -> bool:
    """Put the row back with its attempt refunded; whether it has met nothing but this error for `patience`."""
    row = await connection.fetchrow(_POSTPONE, mine.id, mine.token, json.dumps(error), delay, patience)
    return bool(row and row["overdue"])


async def die(
    connection: Connection,
    mine: Claim,
    error: dict[str, str],
    reason: str,
    *,
    states: tuple[str, ...] = ("running",),
    skip: bool = False,
    tell: str | None = None,
) -> int | None:
    """Move the row to the dead letters.

    Args:
        states: Those it may come from.
        skip: Whether its lane, if it has one, goes on without it.
        tell: The consumer that is let know of it, in the same queue.

    Returns:
        The dead letter's id, or `None` if the row was not mine any more.
    """
    values = (mine.id, mine.token, json.dumps(error), reason, list(states), skip)
    number: int | None
    if tell is None:
        number = await connection.fetchval(_DIE, *values)
    else:
        event_id = new_event_id()
        number = await connection.fetchval(_DIE_AND_TELL, *values, delivery_id(event_id, 1), event_id, tell)
    return number


async def heartbeat(connection: Connection, leases: list[tuple[UUID, UUID, timedelta]], lease: timedelta) -> None:
    """Extend the leases of `(id, token, longest run)`, none of them past its longest run."""
    ids, tokens, limits = ([each[place] for each in leases] for place in range(3))
    await connection.execute(_HEARTBEAT, ids, tokens, limits, lease)

"""Shares: the keys of a queue, such as its tenants, take turns, so that what one has a million of holds up no other.

A delivery of a consumer with `share_by` has its key in its headers. An index holds the open ones of these alone, by
queue and key, and the relay goes round the keys that have something due. What has no key takes a turn as if it were one
key, in the order in which things are due.

What must stay true:

- Only the order depends on it. Whatever is due is handed over in the end by a relay that knows of no keys, too.
- No step reads what a key has waiting beyond its turn. A look visits so many keys at most, and the next one goes on
  after them; between two looks a scan begins where the last one of its key ended (the floor in `dispatching.py`).
- The index is asked for by an expression that no other one has. Of two that would do, a plan that is made while the
  table is small may take the one that reads the whole backlog.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from service.ledger.delivering import SHARE_KEY, SHARED
from service.ledger.dispatching import AS_DISPATCHED, DUE, NO_FLOOR, Floor, batch_of, rows_due

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence
    from datetime import datetime
    from uuid import UUID

    import asyncpg

    from service.database.driver import Connection
    from service.ledger.dispatching import Batch, Pauses

MOST = 1_000
"""Keys that a look visits."""

# One index look-up for each key, however much it has.
_KEYS = f"""
WITH RECURSIVE keys AS (
    (SELECT {SHARE_KEY} AS key, due_at FROM outbox_message
     WHERE {SHARED} AND {SHARE_KEY} > $1 AND {SHARE_KEY} < $2 ORDER BY {SHARE_KEY}, due_at LIMIT 1)
    UNION ALL
    SELECT next.key, next.due_at
    FROM keys CROSS JOIN LATERAL (
        SELECT {SHARE_KEY} AS key, due_at FROM outbox_message
        WHERE {SHARED} AND {SHARE_KEY} > keys.key AND {SHARE_KEY} < $2 ORDER BY {SHARE_KEY}, due_at LIMIT 1
    ) AS next
)
SELECT key, due_at <= now() AS due FROM keys LIMIT $3
"""  # noqa: S608

TURNS = f"""
SELECT head.*
FROM unnest($1::text[], $2::timestamptz[], $3::uuid[]) AS known (key, due_at, id)
CROSS JOIN LATERAL (
    SELECT {DUE} FROM outbox_message
    WHERE {SHARE_KEY} = known.key AND {SHARED} AND outbox_message.due_at <= now()
      AND (outbox_message.due_at, outbox_message.id) >= (known.due_at, known.id) AND (state <> 'running' OR $6)
      AND outbox_message.id <> ALL ($10::uuid[])
    ORDER BY outbox_message.due_at, outbox_message.id LIMIT $4
    FOR UPDATE SKIP LOCKED
) AS head
"""  # noqa: S608
"""Up to $4 of each key in $1 that are due at its floor in $2 and $3 or later, but for those in $10."""

NO_LAST = "last AS (SELECT NULL::timestamptz AS due_at, NULL::uuid AS id)"
"""The queue's own floor stays where it is."""

WITH_KEYS = f"{AS_DISPATCHED}, due.due_at, due.id, {SHARE_KEY}"
"""What `AS_DISPATCHED` returns, and where each row stood among those of its key."""

_TAKE_TURNS = f"""
WITH due AS MATERIALIZED (
    SELECT turns.* FROM ({TURNS}) AS turns WHERE NOT EXISTS (SELECT FROM limited_queue WHERE limited_queue.queue = $9)
),
{NO_LAST}
{WITH_KEYS}
"""  # noqa: S608


class KeyTurn(NamedTuple):
    """Keys whose turn it is, the floor of each, and how many deliveries each may have handed over."""

    keys: list[str]
    floors: list[Floor]
    quota: int

    @property
    def arguments(self) -> tuple[list[str], list[datetime], list[UUID], int]:
        """$1 to $4 of `TURNS`."""
        return self.keys, [each.due_at for each in self.floors], [each.id for each in self.floors], self.quota


class Shares:
    """Whose turn it is in one queue, as one relay knows it."""

    def __init__(self, queue: str) -> None:
        self._rest, self._end = f"{queue}:", f"{queue};"
        self._after = self._rest
        self._keys: list[str] = []
        self._seen = self._rest
        self._floors: dict[str, Floor] = {}

    async def look(self, connection: Connection) -> None:
        """See which keys have something due, from the one on whose turn is next."""
        visited = await connection.fetch(_KEYS, self._after, self._end, MOST)
        found = [(row["key"], row["due"]) for row in visited]
        if len(found) < MOST:
            found.append((self._rest, True))
            # No character that a key may have comes before this one.
            visited = await connection.fetch(_KEYS, self._rest, f"{self._after}\x01", MOST - len(found) + 1)
            found += [(row["key"], row["due"]) for row in visited]
        self._keys = [key for key, due in found if due]
        self._seen = found[-1][0]
        self._floors = {}
        if not self._keys:
            self._after = self._seen

    async def take(
        self,
        limit: int,
        of_keys: Callable[[KeyTurn], Awaitable[Sequence[asyncpg.Record]]],
        of_all: Callable[[int], Awaitable[Sequence[asyncpg.Record]]],
        but: Collection[UUID] = (),
    ) -> Sequence[asyncpg.Record]:
        """What `of_keys` marks of those whose turn it is, else what `of_all` marks in the order in which it is due.

        Args:
            limit: How many it may be.
            of_keys: Marks what is due of the keys of a turn.
            of_all: Marks so many, whatever their keys.
            but: What both mark beside, and is nobody's turn.
        """
        while self._keys:
            turn = self._next(limit)
            if not turn.floors:
                rows = await of_all(turn.quota)
                self._go_on(turn, [self._rest] if rows else [])
            else:
                rows = await of_keys(turn)
                self._note(turn, [row for row in rows if row[-2] not in but])
            if rows:
                return rows
        return await of_all(limit)

    def _next(self, limit: int) -> KeyTurn:
        if self._keys[0] == self._rest:
            return KeyTurn([self._rest], [], max(limit // len(self._keys), 1))
        until = self._keys.index(self._rest) if self._rest in self._keys else len(self._keys)
        keys = self._keys[: min(until, limit)]
        return KeyTurn(keys, [self._floors.get(key, NO_FLOOR) for key in keys], max(limit // len(keys), 1))

    def _note(self, turn: KeyTurn, rows: Sequence[asyncpg.Record]) -> None:
        counts = dict.fromkeys(turn.keys, 0)
        for *_, due_at, id_, key in rows:
            if key in counts:
                counts[key] += 1
                self._floors[key] = max(self._floors.get(key, NO_FLOOR), Floor(due_at, id_), key=_place)
        self._go_on(turn, [key for key, count in counts.items() if count >= turn.quota])

    def _go_on(self, turn: KeyTurn, more: list[str]) -> None:
        """Those that may have more come again after the others."""
        self._keys = [*self._keys[len(turn.keys) :], *more]
        self._after = turn.keys[-1] if self._keys else self._seen


def _place(floor: Floor) -> tuple[object, object]:
    return floor.due_at, floor.id


async def take_shared(
    connection: Connection,
    queue: str,
    shares: Shares,
    floor: Floor,
    limit: int,
    pauses: Pauses,
    *,
    expired_leases: bool,
) -> Batch | None:
    """As `dispatching.take_due`, of the keys whose turn it is."""
    how = pauses.redispatch_after, expired_leases, pauses.min_backoff, pauses.max_backoff

    async def of_keys(turn: KeyTurn) -> Sequence[asyncpg.Record]:
        return await connection.fetch(_TAKE_TURNS, *turn.arguments, *how, queue, [])

    async def of_all(most: int) -> Sequence[asyncpg.Record]:
        for start in dict.fromkeys((floor, NO_FLOOR)):
            rows = await rows_due(connection, queue, start, most, pauses, expired_leases=expired_leases)
            if rows:
                break
        return rows

    rows = await shares.take(limit, of_keys, of_all)
    return batch_of(rows, floor) if rows else None

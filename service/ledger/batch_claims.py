"""Statements on the deliveries of a batch: claimed at once, and completed by one commit.

A batch is another way to the same claim: each row has a token, a lease and an attempt of its own, and may be settled
alone at any time. What must stay true:

- Only a delivery to which nothing has happened yet is taken into a batch. One that has failed, whose worker was lost,
  or that shows an error for any other reason runs alone from then on: so it does no harm to others twice.
- One in a lane runs alone too, and one that a follow-up waits for: a transaction that ends several of them would have
  to lock all that goes on by that in one order.
- What is not taken is not missing: whoever asked for it asks alone, and hears what there is to hear.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.ledger.delivering import claim_of, claiming
from service.ledger.follow_ups import THEN

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta
    from uuid import UUID

    from service.database.driver import Connection
    from service.ledger.delivering import Claim

# Rows that the relay is handing over at this moment are waited for. They are all of one transaction, and it ends soon.
_CLAIM = claiming(
    f"""message.attempts = 0 AND message.errors = '[]' AND message.lane IS NULL
       AND NOT message.headers ? '{THEN}'
       AND (message.expires_at IS NULL OR message.expires_at > clock_timestamp())
       AND message.consumer = ANY($4::text[]) AND message.event_type = $5 AND message.version <= $6""",
    wait=True,
)

# Tokens are unique, so that none of them is another row's. As for the state: see `_STATE` in `delivering`.
_COMPLETE = """
UPDATE outbox_message AS message SET state = 'completed', completed_at = clock_timestamp()
WHERE id = ANY($1::uuid[]) AND claim_token = ANY($2::uuid[]) AND (message.state || '') IN ('running', 'dispatched')
"""
_UNBROKEN = "coalesce(current_setting('outbox.transaction', true), '') = $3::text"


async def claim(
    connection: Connection,
    asked: Sequence[tuple[UUID, UUID]],
    lease: timedelta,
    *,
    consumer: Sequence[str],
    event_type: str,
    version: int,
) -> list[Claim]:
    """Take what can be run together of `(id, token)`.

    Args:
        connection: In no transaction, or in one of its own.
        asked: Each ID once.
        lease: For how long.
        consumer: The names of the one consumer that they are for.
        event_type: What it consumes.
        version: The latest that its code knows.
    """
    ids, tokens = zip(*asked, strict=True)
    return [claim_of(row) for row in await connection.fetch(_CLAIM, ids, tokens, lease, consumer, event_type, version)]


async def complete_in_transaction(
    connection: Connection, mine: Sequence[Claim], mark: UUID
) -> tuple[bool, frozenset[UUID]]:
    """Tick the rows off inside the effect's transaction: (it is still that transaction, those that were still mine)."""
    ids, tokens = _names(mine)
    rows = await connection.fetch(f"{_COMPLETE} AND {_UNBROKEN} RETURNING id", ids, tokens, str(mark))
    if rows:
        return True, frozenset([row["id"] for row in rows])
    unbroken = await connection.fetchval(f"SELECT {_UNBROKEN.replace('$3', '$1')}", str(mark))
    return bool(unbroken), frozenset()


async def complete(connection: Connection, mine: Sequence[Claim]) -> frozenset[UUID]:
    """Tick the rows off after an effect outside the database; those that were still mine."""
    rows = await connection.fetch(f"{_COMPLETE} RETURNING id", *_names(mine))
    return frozenset([row["id"] for row in rows])


def _names(claims: Sequence[Claim]) -> tuple[list[UUID], list[UUID]]:
    return [each.id for each in claims], [each.token for each in claims]

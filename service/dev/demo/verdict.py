"""The verdict: three records that know nothing of each other are compared.

What the clients were answered, what PostgreSQL holds, and what the mail server received.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.dev.demo.example import EFFECTS, ORDERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from service.dev.demo.example import Load
    from service.dev.demo.stage import Stage
    from service.dev.sink import Mail

_LEDGER = """
SELECT (SELECT count(*) FROM outbox_message WHERE state <> 'completed') AS open,
       (SELECT count(*) FROM outbox_message WHERE state = 'completed') AS completed,
       (SELECT count(*) FROM outbox_message WHERE dispatches > 1) AS handed_over_again,
       (SELECT count(*) FROM dead_letter WHERE resolution IS NULL) AS dead,
       (SELECT count(DISTINCT event_id) FROM (SELECT event_id FROM outbox_message UNION ALL
                                              SELECT event_id FROM dead_letter) AS every_event) AS events
"""
# A delivery that was interrupted or replayed was started late because of what the demo did; it is counted apart.
_LATENCY = """
SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY extract(epoch FROM started_at - created_at))
FROM outbox_message WHERE state = 'completed' AND ($1 OR dispatches = 1)
  AND NOT EXISTS (SELECT FROM dead_letter WHERE message_id = outbox_message.id)
"""


@dataclass(frozen=True)
class Holdings:
    """What PostgreSQL holds."""

    undecided: int
    confirmed: int
    rejected: int
    counted: int
    stock_left: int
    sold: int
    open: int
    completed: int
    handed_over_again: int
    dead: int
    events: int


@dataclass(frozen=True)
class Verdict:
    """The findings; each says what is wrong, and is empty when all is well."""

    lost: list[str]
    duplicated: list[str]
    mails: int
    resent: int

    @property
    def passed(self) -> bool:
        """Whether nothing was lost and nothing done twice."""
        return not self.lost and not self.duplicated


async def count(stage: Stage) -> Holdings:
    [effects], [ledger] = await stage.database.fetch(EFFECTS), await stage.database.fetch(_LEDGER)
    return Holdings(**effects, **ledger)


async def latencies(stage: Stage, *, interrupted: bool) -> tuple[float, float]:
    """p50 and p99 in milliseconds from the commit to the start of its worker."""
    half, most = await stage.database.fetchval(_LATENCY, interrupted)
    return half * 1000, most * 1000


async def judge(stage: Stage, load: Load, mails: list[Mail]) -> Verdict:
    """Compare the clients' record with PostgreSQL, and both with what the mail server received."""
    counts = await count(stage)
    stored = {row["id"]: row["email"] for row in await stage.database.fetch(ORDERS)}
    by_address: dict[str, set[str]] = defaultdict(set)
    for mail in mails:
        for recipient in mail.recipients:
            by_address[recipient].add(mail.message_id)
    taken = load.stock - counts.stock_left
    lost = [f"order {order} was accepted and is not there" for order in load.accepted.values() if order not in stored]
    lost += ["an order was never decided"] * counts.undecided
    lost += ["a delivery is still open"] * counts.open + ["a dead letter is still open"] * counts.dead
    lost += ["an order was not counted"] * (len(stored) - counts.counted)
    lost += ["an item was sold and not taken from the stock"] * (counts.sold - taken)
    lost += [f"no e-mail about order {order}" for order, email in stored.items() if email not in by_address]
    duplicated = ["an order was counted twice"] * (counts.counted - len(stored))
    duplicated += ["an item was taken from the stock twice"] * (taken - counts.sold)
    duplicated += ["an order was stored twice"] * (len(stored) - len(set(stored.values())))
    duplicated += _written_twice(by_address)
    distinct = {mail.message_id for mail in mails}
    return Verdict(lost, duplicated, len(distinct), len(mails) - len(distinct))


def _written_twice(by_address: Mapping[str, set[str]]) -> list[str]:
    return [f"{len(ids)} different e-mails to {address}" for address, ids in by_address.items() if len(ids) > 1]

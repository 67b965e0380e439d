"""The ledger: one row per delivery, from `publish` until its effect has happened, and a while after.

                       put back, set apart
                 ┌──────────────────────────────┐
                 ▼            claim             │        complete                 purge
    publish ─► pending ─────────────────────► running ──────────────► completed ────────► gone
                 │           claim, heartbeat ▲ │                         ▲
        dispatch │   ┌────────────────────────┘ │ dispatch                │
                 ▼   │                          ▼                         │
               dispatched ◄─────────────────────┘                         │
                     └────────────────── complete ────────────────────────┘

    pending, running ── die ─► dead_letter ── replay ─► pending (same id, a fresh budget)
                                          ├── edit ──► closed; pending, under an id of its own
                                          └── discard ─► closed

    publish     `publishing.insert_deliveries` and `as_objects`
    dispatch    `dispatching.take_due`, of what is due: a new one, one that nobody claimed, or one whose lease ended;
                in a limited queue `limited_dispatching.take_limited`, of as much as may be in flight; where keys take
                turns `sharing.take_shared`
    set apart   by the same, of a suspect: its lease ended in its second attempt or later
    claim       `delivering.claim` and `claim_free`; of what is running if its lease ended, or again by the same token;
                in a limited queue of what is dispatched alone, or again by the same token. `claim_next` does the same
                to what came due in a lane, without a message
    heartbeat   `delivering.heartbeat`, which also takes back what was handed over again meanwhile
    put back    `delivering.fail`, `release`, `forgive` and `postpone`
    complete    `delivering.complete_in_transaction` and `complete`
    both        `batch_claims.claim`, `complete_in_transaction` and `complete`, of a batch
    expire      `delivering.expire`, right after a claim that came too late: completed without its effect
    cancel      `cancelling.cancel_open`, of what is pending or dispatched: the same
    die         `delivering.die`; of what is pending only right after `postpone`
    replay      `replaying.carry_out`, as is discard; `erasing.erase` discards too
    edit        `editing.edit`
    purge       `purging.purge_step_by_step`

`due_at` says when the relay must act on a row next, in every state but `completed`; so the relay's whole job is to
hand over each row that is due. A fresh event, a delayed one, a retry, a dead worker and a lost broker are that one
query. The states change nowhere else, and each change matches the state it comes from and, once claimed, the claim's
token; only the relay needs none, to take a row whose lease has ended.

What must stay true: nothing but PostgreSQL's clock writes or compares a time here; leases are written with
`clock_timestamp()`, since `now()` is stale after a lock wait or in a long transaction.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Double,
    Identity,
    Index,
    Integer,
    Interval,
    Text,
    Uuid,
    false,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP
from sqlalchemy.orm import Mapped, mapped_column

from service.database.base import Base
from service.ledger.delivering import SHARED

WAITS_ALONE = "unique_key IS NOT NULL AND started_at IS NULL AND state <> 'completed'"
"""Of the deliveries for which this is true there is one of a key. A claim makes it false for good, by whatever version
of this code: a retry may wait beside the next one, and what has begun stands for nothing that is published later."""

Timestamp = TIMESTAMP(timezone=True)
Buckets = ARRAY(BigInteger)


class OutboxMessage(Base):
    """A delivery: one event for one consumer. Its `id` is also its idempotency key, and Dramatiq's message id."""

    __tablename__ = "outbox_message"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    event_id: Mapped[UUID]
    event_type: Mapped[str] = mapped_column(Text)
    version: Mapped[int] = mapped_column(Integer)
    consumer: Mapped[str] = mapped_column(Text)
    queue: Mapped[str] = mapped_column(Text)
    payload: Mapped[dict[str, Any]] = mapped_column(JSONB)
    headers: Mapped[dict[str, str]] = mapped_column(JSONB)
    state: Mapped[str] = mapped_column(Text, server_default="pending")
    due_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.clock_timestamp())
    claim_token: Mapped[UUID | None]
    attempts: Mapped[int] = mapped_column(Integer, server_default="0")
    dispatches: Mapped[int] = mapped_column(Integer, server_default="0")
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.clock_timestamp())
    dispatched_at: Mapped[datetime | None] = mapped_column(Timestamp)
    started_at: Mapped[datetime | None] = mapped_column(Timestamp)
    completed_at: Mapped[datetime | None] = mapped_column(Timestamp)
    errors: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, server_default=text("'[]'"))
    # Of what has an order; see `lanes.py`.
    lane: Mapped[str | None] = mapped_column(Text)
    position: Mapped[int | None] = mapped_column(BigInteger)
    expires_at: Mapped[datetime | None] = mapped_column(Timestamp)
    # How it was completed without its effect: `expired` or `cancelled`.
    ended_as: Mapped[str | None] = mapped_column(Text)
    unique_key: Mapped[str | None] = mapped_column(Text)

    __table_args__ = (
        CheckConstraint("state IN ('pending', 'dispatched', 'running', 'completed')", name="state"),
        # Lanes and follow-ups go on by a trigger on this column.
        CheckConstraint("state <> 'completed' OR completed_at IS NOT NULL", name="completed_at"),
        # Every change of state writes a new entry into every index, so there is no third one for all rows. The
        # deliveries of an event are a range of the primary key (see `ids.delivery_id`), and so are the oldest rows for
        # the purge.
        Index("ix_outbox_message_due", "queue", "due_at", "id", postgresql_where=text("state <> 'completed'")),
        Index("ix_outbox_message_lane", "lane", "position", unique=True, postgresql_where=text("position IS NOT NULL")),
        Index(
            "ix_outbox_message_entering",
            "created_at",
            postgresql_where=text("lane IS NOT NULL AND position IS NULL AND state = 'pending'"),
        ),
        # In the form in which PostgreSQL says it again, without its COLLATE: a migration would drop it otherwise.
        Index(
            "ix_outbox_message_share",
            text("((queue || ':') || (headers ->> 'share'))"),
            "due_at",
            "id",
            postgresql_where=text(SHARED),
        ),
        Index("ix_outbox_message_unique", "consumer", "unique_key", unique=True, postgresql_where=text(WAITS_ALONE)),
    )
    # publish() needs none of the server's defaults back, and an INSERT without RETURNING can be batched.
    __mapper_args__ = {"eager_defaults": False}  # noqa: RUF012


class DeadLetter(Base):
    """A delivery that was given up. It stays as the record after it was replayed or discarded."""

    __tablename__ = "dead_letter"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    message_id: Mapped[UUID]  # the delivery's id
    event_id: Mapped[UUID]
    event_type: Mapped[str] = mapped_column(Text)
    version: Mapped[int] = mapped_column(Integer)
    consumer: Mapped[str] = mapped_column(Text)
    queue: Mapped[str] = mapped_column(Text)
    payload: Mapped[dict[str, Any]] = mapped_column(JSONB)
    headers: Mapped[dict[str, str]] = mapped_column(JSONB)
    attempts: Mapped[int] = mapped_column(Integer)
    dispatches: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(Timestamp)
    errors: Mapped[list[dict[str, Any]]] = mapped_column(JSONB)
    reason: Mapped[str] = mapped_column(Text)
    died_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.clock_timestamp())
    resolution: Mapped[str | None] = mapped_column(Text)
    resolved_at: Mapped[datetime | None] = mapped_column(Timestamp)
    resolved_by: Mapped[str | None] = mapped_column(Text)
    resolved_why: Mapped[str | None] = mapped_column(Text)
    # Who it was in the database, by the trigger `dead_letter_history`; `resolved_by` is what the command line says.
    resolved_role: Mapped[str | None] = mapped_column(Text)
    lane: Mapped[str | None] = mapped_column(Text)
    position: Mapped[int | None] = mapped_column(BigInteger)
    blocks: Mapped[bool] = mapped_column(server_default=false())

    __table_args__ = (
        CheckConstraint("resolution IN ('replayed', 'discarded', 'edited')", name="resolution"),
        CheckConstraint("(resolution IS NULL) = (resolved_at IS NULL)", name="resolved"),
        Index("ix_dead_letter_message_id", "message_id"),
        Index("ix_dead_letter_open", "died_at", "id", postgresql_where=text("resolution IS NULL")),
        Index("ix_dead_letter_lane", "lane", postgresql_where=text("blocks")),
    )


class AcceptedEvent(Base):
    """The keys under which events from elsewhere were accepted. Kept for good: a sender may repeat itself late."""

    __tablename__ = "accepted_event"

    key: Mapped[str] = mapped_column(Text, primary_key=True)
    event_id: Mapped[UUID]
    accepted_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.clock_timestamp())


class PausedQueue(Base):
    """A queue that no relay hands anything over to until it is resumed; `*` pauses all of them."""

    __tablename__ = "paused_queue"

    queue: Mapped[str] = mapped_column(Text, primary_key=True)
    paused_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.clock_timestamp())
    paused_by: Mapped[str] = mapped_column(Text)
    why: Mapped[str | None] = mapped_column(Text)


class LimitedQueue(Base):
    """A queue of which only so many deliveries run at once or start in a second; see `limited_dispatching.py`.

    What is in flight is `NULL` until a relay has counted it.
    """

    __tablename__ = "limited_queue"

    queue: Mapped[str] = mapped_column(Text, primary_key=True)
    concurrency: Mapped[int | None] = mapped_column(Integer)
    per_second: Mapped[float | None] = mapped_column(Double)
    burst: Mapped[int | None] = mapped_column(Integer)
    limited_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.clock_timestamp())
    limited_by: Mapped[str] = mapped_column(Text)
    why: Mapped[str | None] = mapped_column(Text)
    waiting: Mapped[list[UUID] | None] = mapped_column(ARRAY(Uuid))
    running: Mapped[list[UUID] | None] = mapped_column(ARRAY(Uuid))
    empty_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.clock_timestamp())

    __table_args__ = (
        CheckConstraint("concurrency > 0 OR per_second > 0", name="limit"),
        CheckConstraint("(per_second IS NULL) = (burst IS NULL) AND burst > 0", name="burst"),
    )


class OutboxSchedule(Base):
    """What is published again and again, and which delivery does so next. See `scheduling.py`."""

    __tablename__ = "outbox_schedule"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    declared: Mapped[bool]
    event_type: Mapped[str] = mapped_column(Text)
    version: Mapped[int] = mapped_column(Integer)
    payload: Mapped[dict[str, Any]] = mapped_column(JSONB)
    cron: Mapped[str | None] = mapped_column(Text)
    every: Mapped[timedelta | None] = mapped_column(Interval)
    tz: Mapped[str] = mapped_column(Text)
    catch_up: Mapped[str] = mapped_column(Text)
    queue: Mapped[str] = mapped_column(Text)
    anchor: Mapped[datetime] = mapped_column(Timestamp, server_default=func.clock_timestamp())
    next_at: Mapped[datetime | None] = mapped_column(Timestamp)
    last_at: Mapped[datetime | None] = mapped_column(Timestamp)
    tick_id: Mapped[UUID | None]  # the delivery's id
    paused_at: Mapped[datetime | None] = mapped_column(Timestamp)
    paused_by: Mapped[str | None] = mapped_column(Text)
    why: Mapped[str | None] = mapped_column(Text)

    __table_args__ = (
        CheckConstraint("catch_up IN ('latest', 'all', 'none')", name="catch_up"),
        CheckConstraint("num_nonnulls(cron, every) = 1", name="timing"),
        Index("ix_outbox_schedule_tick_id", "tick_id", unique=True),
    )


class OutboxMinute(Base):
    """What became of the runs of a minute; in the minute `-infinity` stand the totals. See `statistics.py`."""

    __tablename__ = "outbox_minute"

    minute: Mapped[datetime] = mapped_column(Timestamp, primary_key=True)
    queue: Mapped[str] = mapped_column(Text, primary_key=True)
    consumer: Mapped[str] = mapped_column(Text, primary_key=True)
    outcome: Mapped[str] = mapped_column(Text, primary_key=True)
    count: Mapped[int] = mapped_column(BigInteger)
    run_seconds: Mapped[float] = mapped_column(Double)
    run_buckets: Mapped[list[int]] = mapped_column(Buckets)
    start_seconds: Mapped[float] = mapped_column(Double)
    start_buckets: Mapped[list[int]] = mapped_column(Buckets)
    effect_seconds: Mapped[float] = mapped_column(Double)
    effect_buckets: Mapped[list[int]] = mapped_column(Buckets)


class OutboxProcess(Base):
    """A relay or worker process. It reports while it lives, and removes its row when it ends in good order."""

    __tablename__ = "outbox_process"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(Text)
    host: Mapped[str] = mapped_column(Text)
    pid: Mapped[int] = mapped_column(Integer)
    queues: Mapped[list[str]] = mapped_column(ARRAY(Text))
    threads: Mapped[int] = mapped_column(Integer)
    version: Mapped[str] = mapped_column(Text)
    started_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.clock_timestamp())
    seen_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.clock_timestamp())
    running: Mapped[int] = mapped_column(Integer, server_default="0")
    loop_lag: Mapped[float] = mapped_column(Double, server_default="0")
    pool_timeouts: Mapped[int] = mapped_column(BigInteger, server_default="0")
    schedules: Mapped[str | None] = mapped_column(Text)  # which ones a worker's code declares, in short

    __table_args__ = (CheckConstraint("kind IN ('relay', 'worker')", name="kind"),)


class OutboxErasure(Base):
    """A time at which what was stored of somebody was erased: how much, by whom and why, but not of whom."""

    __tablename__ = "outbox_erasure"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    began_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.clock_timestamp())
    erased_by: Mapped[str] = mapped_column(Text)
    erased_role: Mapped[str] = mapped_column(Text, server_default=text("session_user"))
    why: Mapped[str] = mapped_column(Text)
    deliveries: Mapped[int] = mapped_column(BigInteger, server_default="0")
    dead_letters: Mapped[int] = mapped_column(BigInteger, server_default="0")
    responses: Mapped[int] = mapped_column(BigInteger, server_default="0")
    operations: Mapped[int] = mapped_column(BigInteger, server_default="0")


class OutboxOperation(Base):
    """Something that a person did to the ledger, or does. It never holds a payload. See `operations.py`."""

    __tablename__ = "outbox_operation"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    kind: Mapped[str] = mapped_column(Text)
    about: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default=text("'{}'"))
    asked_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.clock_timestamp())
    asked_by: Mapped[str] = mapped_column(Text)
    asked_role: Mapped[str] = mapped_column(Text, server_default=text("session_user"))
    why: Mapped[str | None] = mapped_column(Text)
    state: Mapped[str] = mapped_column(Text, server_default="finished")
    ids: Mapped[list[int]] = mapped_column(ARRAY(BigInteger), server_default="{}")  # of dead letters
    total: Mapped[int] = mapped_column(Integer, server_default="0")
    done: Mapped[int] = mapped_column(Integer, server_default="0")
    refused: Mapped[int] = mapped_column(Integer, server_default="0")
    refused_ids: Mapped[list[int]] = mapped_column(ARRAY(BigInteger), server_default="{}")  # the first of them
    rate: Mapped[float | None] = mapped_column(Double)
    runner: Mapped[UUID | None]
    seen_at: Mapped[datetime | None] = mapped_column(Timestamp)
    ended_at: Mapped[datetime | None] = mapped_column(Timestamp)

    __table_args__ = (CheckConstraint("state IN ('planned', 'running', 'stopped', 'finished')", name="state"),)

"""Create the ledger: outbox messages, dead letters, accepted keys, paused queues, and the relay's wake-up.

Part of the template: take the next version of it as it comes, and put changes of your own into `migrations/domains`.

Revision: ledger_0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "ledger_0001"
down_revision = None
branch_labels = ("ledger",)
depends_on = None

_CLOCK = sa.text("clock_timestamp()")
_TIME = sa.TIMESTAMP(timezone=True)

# A trigger that always notifies takes PostgreSQL's database-wide notification lock in every commit, and the commits
# run one by one. So writers notify only a sleeping relay: it holds the exclusive lock of this key while it sleeps. A
# writer that gets the shared lock instead holds it until its transaction ends, so no relay can fall asleep in between.
_WAKE = """
CREATE FUNCTION outbox_wake() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock_shared(outbox_gate()) THEN
        PERFORM pg_notify('outbox', '');
    END IF;
END $$
"""

# Derived from the table's oid, so that several ledgers in one database have a gate each.
_GATE = """
CREATE FUNCTION outbox_gate() RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT (x'6f757462'::bigint << 32) | 'outbox_message'::regclass::oid::bigint
$$
"""

_TRIGGER_FUNCTION = """
CREATE FUNCTION outbox_wake_trigger() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM outbox_wake();
    RETURN NULL;
END $$
"""

_TRIGGER = """
CREATE TRIGGER outbox_wake AFTER INSERT ON outbox_message
FOR EACH STATEMENT EXECUTE FUNCTION outbox_wake_trigger()
"""


def upgrade() -> None:
    op.create_table(
        "outbox_message",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("event_type", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("consumer", sa.Text(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("payload", JSONB(), nullable=False),
        sa.Column("headers", JSONB(), nullable=False),
        sa.Column("state", sa.Text(), server_default="pending", nullable=False),
        sa.Column("due_at", _TIME, server_default=_CLOCK, nullable=False),
        sa.Column("claim_token", sa.Uuid(), nullable=True),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("dispatches", sa.Integer(), server_default="0", nullable=False),
        sa.Column("created_at", _TIME, server_default=_CLOCK, nullable=False),
        sa.Column("dispatched_at", _TIME, nullable=True),
        sa.Column("started_at", _TIME, nullable=True),
        sa.Column("completed_at", _TIME, nullable=True),
        sa.Column("errors", JSONB(), server_default=sa.text("'[]'"), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_outbox_message"),
        sa.CheckConstraint(
            "state IN ('pending', 'dispatched', 'running', 'completed')", name="ck_outbox_message_state"
        ),
        # No update of this table can stay within its page (every one changes the index), so autovacuum has to come
        # often and cheaply; truncating the table's end would take an exclusive lock.
        postgresql_with={
            "autovacuum_vacuum_scale_factor": "0.02",
            "autovacuum_vacuum_threshold": "5000",
            "autovacuum_vacuum_insert_scale_factor": "0.1",
            "autovacuum_analyze_scale_factor": "0.05",
            "autovacuum_vacuum_cost_delay": "1",
            "vacuum_truncate": "off",
        },
    )
    op.create_index(
        "ix_outbox_message_due",
        "outbox_message",
        ["queue", "due_at", "id"],
        postgresql_where=sa.text("state <> 'completed'"),
    )
    op.create_table(
        "dead_letter",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("message_id", sa.Uuid(), nullable=False),
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("event_type", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("consumer", sa.Text(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("payload", JSONB(), nullable=False),
        sa.Column("headers", JSONB(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("dispatches", sa.Integer(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("errors", JSONB(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("died_at", _TIME, server_default=_CLOCK, nullable=False),
        sa.Column("resolution", sa.Text(), nullable=True),
        sa.Column("resolved_at", _TIME, nullable=True),
        sa.Column("resolved_by", sa.Text(), nullable=True),
        sa.Column("resolved_why", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_dead_letter"),
        sa.CheckConstraint("resolution IN ('replayed', 'discarded')", name="ck_dead_letter_resolution"),
        sa.CheckConstraint("(resolution IS NULL) = (resolved_at IS NULL)", name="ck_dead_letter_resolved"),
    )
    op.create_index("ix_dead_letter_message_id", "dead_letter", ["message_id"])
    op.create_index(
        "ix_dead_letter_open",
        "dead_letter",
        ["died_at", "id"],
        postgresql_where=sa.text("resolution IS NULL"),
    )
    op.create_table(
        "accepted_event",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("accepted_at", _TIME, server_default=_CLOCK, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_accepted_event"),
    )
    op.create_table(
        "paused_queue",
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("paused_at", _TIME, server_default=_CLOCK, nullable=False),
        sa.Column("paused_by", sa.Text(), nullable=False),
        sa.Column("why", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("queue", name="pk_paused_queue"),
    )
    for statement in (_GATE, _WAKE, _TRIGGER_FUNCTION, _TRIGGER):
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TRIGGER outbox_wake ON outbox_message")
    for function in ("outbox_wake_trigger", "outbox_wake", "outbox_gate"):
        op.execute(f"DROP FUNCTION {function}()")
    for table in ("paused_queue", "accepted_event", "dead_letter", "outbox_message"):
        op.drop_table(table)

"""Create the tables of what workers have run, and of the processes that are there.

Revision: ledger_statistics
Revises: ledger_history
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "ledger_statistics"
down_revision = "ledger_history"
branch_labels = None
depends_on = None

_CLOCK = sa.text("clock_timestamp()")
_TIME = sa.TIMESTAMP(timezone=True)
_BUCKETS = ARRAY(sa.BigInteger())


def upgrade() -> None:
    op.create_table(
        "outbox_minute",
        sa.Column("minute", _TIME, nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("consumer", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("run_seconds", sa.Double(), nullable=False),
        sa.Column("run_buckets", _BUCKETS, nullable=False),
        sa.Column("start_seconds", sa.Double(), nullable=False),
        sa.Column("start_buckets", _BUCKETS, nullable=False),
        sa.Column("effect_seconds", sa.Double(), nullable=False),
        sa.Column("effect_buckets", _BUCKETS, nullable=False),
        sa.PrimaryKeyConstraint("minute", "queue", "consumer", "outcome", name="pk_outbox_minute"),
        # The totals are written again and again: with room in their page the index need not be.
        postgresql_with={"fillfactor": "70"},
    )
    op.create_table(
        "outbox_process",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("queues", ARRAY(sa.Text()), nullable=False),
        sa.Column("threads", sa.Integer(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("started_at", _TIME, server_default=_CLOCK, nullable=False),
        sa.Column("seen_at", _TIME, server_default=_CLOCK, nullable=False),
        sa.Column("running", sa.Integer(), server_default="0", nullable=False),
        sa.Column("loop_lag", sa.Double(), server_default="0", nullable=False),
        sa.Column("pool_timeouts", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_outbox_process"),
        sa.CheckConstraint("kind IN ('relay', 'worker')", name=op.f("ck_outbox_process_kind")),
    )


def downgrade() -> None:
    op.drop_table("outbox_process")
    op.drop_table("outbox_minute")

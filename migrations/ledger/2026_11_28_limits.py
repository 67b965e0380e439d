"""Create the table of queues of which only so many deliveries may run at once, or start in a second.

Revision: ledger_limits
Revises: ledger_operations
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "ledger_limits"
down_revision = "ledger_operations"
branch_labels = None
depends_on = None

_CLOCK = sa.text("clock_timestamp()")
_TIME = sa.TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.create_table(
        "limited_queue",
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("concurrency", sa.Integer(), nullable=True),
        sa.Column("per_second", sa.Double(), nullable=True),
        sa.Column("burst", sa.Integer(), nullable=True),
        sa.Column("limited_at", _TIME, server_default=_CLOCK, nullable=False),
        sa.Column("limited_by", sa.Text(), nullable=False),
        sa.Column("why", sa.Text(), nullable=True),
        sa.Column("waiting", ARRAY(sa.Uuid()), nullable=True),
        sa.Column("running", ARRAY(sa.Uuid()), nullable=True),
        sa.Column("empty_at", _TIME, server_default=_CLOCK, nullable=False),
        sa.PrimaryKeyConstraint("queue", name="pk_limited_queue"),
        sa.CheckConstraint("concurrency > 0 OR per_second > 0", name=op.f("ck_limited_queue_limit")),
        sa.CheckConstraint("(per_second IS NULL) = (burst IS NULL) AND burst > 0", name=op.f("ck_limited_queue_burst")),
        # A relay writes a row at each hand-over: with room in its page the index need not be.
        postgresql_with={"fillfactor": "50"},
    )


def downgrade() -> None:
    op.drop_table("limited_queue")

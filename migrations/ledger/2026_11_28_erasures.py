"""Create the table of what was erased for somebody's sake, by whom and why.

Revision: ledger_erasures
Revises: ledger_statistics
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "ledger_erasures"
down_revision = "ledger_statistics"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "outbox_erasure",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("began_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("erased_by", sa.Text(), nullable=False),
        sa.Column("erased_role", sa.Text(), server_default=sa.text("session_user"), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("deliveries", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("dead_letters", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("responses", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_outbox_erasure"),
    )


def downgrade() -> None:
    op.drop_table("outbox_erasure")

"""Let a delivery expire, and say of one that ended without its effect how it ended.

Revision: ledger_ending
Revises: ledger_limits
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "ledger_ending"
down_revision = "ledger_limits"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("outbox_message", sa.Column("expires_at", sa.TIMESTAMP(timezone=True), nullable=True))
    op.add_column("outbox_message", sa.Column("ended_as", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("outbox_message", "ended_as")
    op.drop_column("outbox_message", "expires_at")

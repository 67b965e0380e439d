"""Let an event that waits already be published once.

Revision: ledger_unique
Revises: ledger_ending
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "ledger_unique"
down_revision = "ledger_ending"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("outbox_message", sa.Column("unique_key", sa.Text(), nullable=True))
    # Of those that no worker has begun: a retry may stand beside a new one, and an older worker need not know of it.
    op.create_index(
        "ix_outbox_message_unique",
        "outbox_message",
        ["consumer", "unique_key"],
        unique=True,
        postgresql_where=sa.text("unique_key IS NOT NULL AND started_at IS NULL AND state <> 'completed'"),
    )


def downgrade() -> None:
    op.drop_column("outbox_message", "unique_key")

"""Let the keys of a queue take turns: an index over the deliveries that have one.

Revision: ledger_shares
Revises: ledger_claims_next
"""

from __future__ import annotations

from alembic import op

revision = "ledger_shares"
down_revision = "ledger_claims_next"
branch_labels = None
depends_on = None

_INDEX = """
CREATE INDEX ix_outbox_message_share
ON outbox_message (((queue || ':' || (headers ->> 'share')) COLLATE "C"), due_at, id)
WHERE headers ->> 'share' IS NOT NULL AND state <> 'completed'
"""


def upgrade() -> None:
    op.execute(_INDEX)


def downgrade() -> None:
    op.execute("DROP INDEX ix_outbox_message_share")

"""Say whose an order is. Those that are there already are nobody's, until you say whose.

Revision: domains_0002
Revises: domains_0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "domains_0002"
down_revision = "domains_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # The default is for the version before this one, which may go on placing orders until it is replaced.
    op.add_column("customer_order", sa.Column("owner", sa.Text(), nullable=False, server_default=""))
    op.create_index("ix_customer_order_owner_id", "customer_order", ["owner", "id"])


def downgrade() -> None:
    op.drop_index("ix_customer_order_owner_id", "customer_order")
    op.drop_column("customer_order", "owner")

"""Create the tables of the orders domain.

Revision: domains_0001
Revises: domains_0000
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "domains_0001"
down_revision = "domains_0000"
branch_labels = None
depends_on = None

_TIME = sa.TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.create_table(
        "product",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("stock", sa.Integer(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_product"),
        sa.CheckConstraint("stock >= 0", name=op.f("ck_product_stock")),
    )
    op.create_table(
        "customer_order",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("email", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_customer_order"),
        sa.CheckConstraint("status IN ('placed', 'confirmed', 'rejected')", name=op.f("ck_customer_order_status")),
    )
    op.create_table(
        "order_line",
        sa.Column("order_id", sa.Uuid(), nullable=False),
        sa.Column("product_id", sa.Uuid(), nullable=False),
        sa.Column("quantity", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("order_id", "product_id", name="pk_order_line"),
        sa.ForeignKeyConstraint(
            ["order_id"], ["customer_order.id"], name="fk_order_line_order_id_customer_order", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["product_id"], ["product.id"], name="fk_order_line_product_id_product"),
        sa.CheckConstraint("quantity > 0", name=op.f("ck_order_line_quantity")),
    )
    op.create_index("ix_order_line_product_id", "order_line", ["product_id"])
    op.create_table(
        "daily_sales",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("orders", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("day", name="pk_daily_sales"),
    )


def downgrade() -> None:
    for table in ("daily_sales", "order_line", "customer_order", "product"):
        op.drop_table(table)

"""Create the table of what people did to the ledger, and let a dead letter be edited.

Revision: ledger_operations
Revises: ledger_lanes
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

revision = "ledger_operations"
down_revision = "ledger_lanes"
branch_labels = None
depends_on = None

_TIME = sa.TIMESTAMP(timezone=True)

# Rights alone do not do that: whoever carries an operation out has to write how far it came.
_FUNCTION = """
CREATE FUNCTION outbox_operation_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (OLD.state = 'finished' OR TG_OP = 'DELETE' AND OLD.state <> 'planned')
       AND NOT pg_has_role(current_user, (SELECT relowner FROM pg_class WHERE oid = TG_RELID), 'USAGE') THEN
        RAISE insufficient_privilege USING MESSAGE = 'permission denied: what somebody did stays on record';
    END IF;
    RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
END $$
"""
_TRIGGER = """
CREATE TRIGGER outbox_operation_history BEFORE UPDATE OR DELETE ON outbox_operation
FOR EACH ROW EXECUTE FUNCTION outbox_operation_history()
"""


def upgrade() -> None:
    op.create_table(
        "outbox_operation",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("about", JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("asked_at", _TIME, server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("asked_by", sa.Text(), nullable=False),
        sa.Column("asked_role", sa.Text(), server_default=sa.text("session_user"), nullable=False),
        sa.Column("why", sa.Text(), nullable=True),
        sa.Column("state", sa.Text(), server_default="finished", nullable=False),
        sa.Column("ids", ARRAY(sa.BigInteger()), server_default="{}", nullable=False),
        sa.Column("total", sa.Integer(), server_default="0", nullable=False),
        sa.Column("done", sa.Integer(), server_default="0", nullable=False),
        sa.Column("refused", sa.Integer(), server_default="0", nullable=False),
        sa.Column("refused_ids", ARRAY(sa.BigInteger()), server_default="{}", nullable=False),
        sa.Column("rate", sa.Double(), nullable=True),
        sa.Column("runner", sa.Uuid(), nullable=True),
        sa.Column("seen_at", _TIME, nullable=True),
        sa.Column("ended_at", _TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_outbox_operation"),
        sa.CheckConstraint(
            "state IN ('planned', 'running', 'stopped', 'finished')", name=op.f("ck_outbox_operation_state")
        ),
    )
    # Why somebody did something, and by what filter, may name somebody too.
    op.add_column("outbox_erasure", sa.Column("operations", sa.BigInteger(), server_default="0", nullable=False))
    # Uncompressed, a part of a long array is read without the rest.
    op.execute("ALTER TABLE outbox_operation ALTER ids SET STORAGE EXTERNAL")
    op.execute(_FUNCTION)
    op.execute(_TRIGGER)
    _let_be("replayed", "discarded", "edited")


def downgrade() -> None:
    op.execute("UPDATE dead_letter SET resolution = 'discarded' WHERE resolution = 'edited'")
    _let_be("replayed", "discarded")
    op.drop_column("outbox_erasure", "operations")
    op.drop_table("outbox_operation")
    op.execute("DROP FUNCTION outbox_operation_history()")


def _let_be(*resolutions: str) -> None:
    """What may become of a dead letter."""
    name = op.f("ck_dead_letter_resolution")
    allowed = ", ".join(f"'{each}'" for each in resolutions)
    op.drop_constraint(name, "dead_letter")
    op.create_check_constraint(name, "dead_letter", f"resolution IN ({allowed})")

"""Keep resolved dead letters as they are, and let the database say who resolved them.

Rights alone do not do that: whoever may resolve a dead letter may write into the columns that say who did.

Revision: ledger_history
Revises: ledger_names
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "ledger_history"
down_revision = "ledger_names"
branch_labels = None
depends_on = None

_FUNCTION = """
CREATE FUNCTION dead_letter_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND OLD.resolution IS NULL THEN
        IF NEW.resolution IS NOT NULL THEN
            NEW.resolved_at := clock_timestamp();
            NEW.resolved_role := session_user;
        END IF;
    ELSIF NOT pg_has_role(current_user, (SELECT relowner FROM pg_class WHERE oid = TG_RELID), 'USAGE') THEN
        RAISE insufficient_privilege USING
            MESSAGE = 'permission denied: a dead letter stays, and once resolved it stays as it is';
    END IF;
    RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
END $$
"""

# An open one is inserted whenever a delivery dies.
_TRIGGERS = (
    """
    CREATE TRIGGER dead_letter_history BEFORE UPDATE OR DELETE ON dead_letter
    FOR EACH ROW EXECUTE FUNCTION dead_letter_history()
    """,
    """
    CREATE TRIGGER dead_letter_forgery BEFORE INSERT ON dead_letter
    FOR EACH ROW WHEN (NEW.resolution IS NOT NULL) EXECUTE FUNCTION dead_letter_history()
    """,
)


def upgrade() -> None:
    op.add_column("dead_letter", sa.Column("resolved_role", sa.Text(), nullable=True))
    for statement in (_FUNCTION, *_TRIGGERS):
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TRIGGER dead_letter_history ON dead_letter")
    op.execute("DROP TRIGGER dead_letter_forgery ON dead_letter")
    op.execute("DROP FUNCTION dead_letter_history()")
    op.drop_column("dead_letter", "resolved_role")

"""Give the check constraints the names that the models say.

The naming convention was applied twice to them (`ck_outbox_message_ck_outbox_message_state`), unless the tables were
created by a project whose metadata has none.

Revision: ledger_names
Revises: ledger_0002
"""

from __future__ import annotations

from alembic import op

revision = "ledger_names"
down_revision = "ledger_0002"
branch_labels = None
depends_on = None

_RENAME = """
DO $$ BEGIN
    IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = '{table}'::regclass AND conname = 'ck_{table}_{name}') THEN
        ALTER TABLE {table} RENAME CONSTRAINT ck_{table}_{name} TO {name};
    END IF;
END $$
"""


def upgrade() -> None:
    for table, name in (
        ("outbox_message", "ck_outbox_message_state"),
        ("dead_letter", "ck_dead_letter_resolution"),
        ("dead_letter", "ck_dead_letter_resolved"),
    ):
        op.execute(_RENAME.format(table=table, name=name))


def downgrade() -> None:
    """Nothing asks for the names."""

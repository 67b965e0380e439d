"""Let no update but a completion look at the triggers of lanes and follow-ups.

Every hand-over and claim sets `state`; only what completes a delivery sets `completed_at`, and now it has to.

Revision: ledger_completed_at
Revises: ledger_shares
"""

from __future__ import annotations

from alembic import op

revision = "ledger_completed_at"
down_revision = "ledger_shares"
branch_labels = None
depends_on = None

_TRIGGERS = {
    "outbox_leave_lane": "OLD.lane IS NOT NULL AND OLD.state <> 'completed' AND NEW.state = 'completed'",
    "outbox_follow_up": "OLD.state <> 'completed' AND NEW.state = 'completed' AND OLD.headers ? 'then'",
}


def upgrade() -> None:
    # NOT VALID: nothing that is there is looked at, so the table is locked for a moment only.
    op.execute("""
        ALTER TABLE outbox_message ADD CONSTRAINT ck_outbox_message_completed_at
        CHECK (state <> 'completed' OR completed_at IS NOT NULL) NOT VALID
    """)
    _fire_at("completed_at")


def downgrade() -> None:
    _fire_at("state")
    op.execute("ALTER TABLE outbox_message DROP CONSTRAINT ck_outbox_message_completed_at")


def _fire_at(column: str) -> None:
    for name, when in _TRIGGERS.items():
        op.execute(f"DROP TRIGGER {name} ON outbox_message")
        op.execute(f"""
            CREATE CONSTRAINT TRIGGER {name} AFTER UPDATE OF {column} ON outbox_message DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION {name}()
        """)

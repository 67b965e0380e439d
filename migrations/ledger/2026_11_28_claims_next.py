"""Let whoever completes a delivery of a lane claim the next one without a relay being woken for it.

Revision: ledger_claims_next
Revises: ledger_follow_ups
"""

from __future__ import annotations

from alembic import op

revision = "ledger_claims_next"
down_revision = "ledger_follow_ups"
branch_labels = None
depends_on = None

_ADVANCE = """
CREATE OR REPLACE FUNCTION outbox_advance_lane(asked text, after bigint) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    next uuid;
BEGIN
    IF outbox_lane_blocked(asked) THEN
        RETURN;
    END IF;
    SELECT id INTO next FROM outbox_message
    WHERE lane = asked AND position > after AND (state || '') = 'pending' AND due_at = outbox_parked()
    ORDER BY position LIMIT 1 FOR UPDATE;
    IF FOUND THEN
        UPDATE outbox_message SET due_at = clock_timestamp() WHERE id = next;
        %s
    END IF;
END $$
"""
_WAKE = "PERFORM outbox_wake();"

# The worker will ask for it at once. Where it dies before that, the relay's next look finds it.
_WAKE_UNLESS_CLAIMED = """IF current_setting('outbox.claims_next', true) IS DISTINCT FROM asked THEN
            PERFORM outbox_wake();
        END IF;"""


def upgrade() -> None:
    op.execute(_ADVANCE % _WAKE_UNLESS_CLAIMED)


def downgrade() -> None:
    op.execute(_ADVANCE % _WAKE)

"""Create the table of schedules, and let a process say which ones its code declares.

Revision: ledger_schedules
Revises: ledger_unique
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "ledger_schedules"
down_revision = "ledger_unique"
branch_labels = None
depends_on = None

_TIME = sa.TIMESTAMP(timezone=True)

# A tick that died stops its schedule until a person decides. Who discards it means this one time: the schedule goes on,
# by the event's next delivery, which is told to leave this time out.
_FUNCTION = """
CREATE FUNCTION outbox_tick_discarded() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    number int := ('x' || right(NEW.message_id::text, 2))::bit(8)::int + 1;
    successor uuid := left(NEW.message_id::text, 34) || lpad(to_hex(least(number, 255)), 2, '0');
BEGIN
    UPDATE outbox_schedule SET tick_id = successor WHERE tick_id = NEW.message_id AND number < 256;
    IF FOUND THEN
        INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers)
        SELECT successor, NEW.event_id, NEW.event_type, NEW.version, NEW.consumer, queue,
               OLD.payload || jsonb_build_object('skip', true), NEW.headers - 'due_after'
        FROM outbox_schedule WHERE tick_id = successor;
    END IF;
    RETURN NULL;
END $$
"""
_TRIGGER = """
CREATE TRIGGER outbox_tick_discarded AFTER UPDATE ON dead_letter FOR EACH ROW
WHEN (NEW.consumer = 'outbox.tick' AND OLD.resolution IS NULL AND NEW.resolution IN ('discarded', 'edited'))
EXECUTE FUNCTION outbox_tick_discarded()
"""


def upgrade() -> None:
    op.create_table(
        "outbox_schedule",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("declared", sa.Boolean(), nullable=False),
        sa.Column("event_type", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("payload", JSONB(), nullable=False),
        sa.Column("cron", sa.Text(), nullable=True),
        sa.Column("every", sa.Interval(), nullable=True),
        sa.Column("tz", sa.Text(), nullable=False),
        sa.Column("catch_up", sa.Text(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("anchor", _TIME, server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("next_at", _TIME, nullable=True),
        sa.Column("last_at", _TIME, nullable=True),
        sa.Column("tick_id", sa.Uuid(), nullable=True),
        sa.Column("paused_at", _TIME, nullable=True),
        sa.Column("paused_by", sa.Text(), nullable=True),
        sa.Column("why", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("name", name="pk_outbox_schedule"),
        sa.CheckConstraint("catch_up IN ('latest', 'all', 'none')", name=op.f("ck_outbox_schedule_catch_up")),
        sa.CheckConstraint("num_nonnulls(cron, every) = 1", name=op.f("ck_outbox_schedule_timing")),
    )
    op.create_index("ix_outbox_schedule_tick_id", "outbox_schedule", ["tick_id"], unique=True)
    op.add_column("outbox_process", sa.Column("schedules", sa.Text(), nullable=True))
    op.execute(_FUNCTION)
    op.execute(_TRIGGER)


def downgrade() -> None:
    op.execute("DROP TRIGGER outbox_tick_discarded ON dead_letter")
    op.execute("DROP FUNCTION outbox_tick_discarded()")
    op.execute("DELETE FROM outbox_message WHERE consumer = 'outbox.tick'")
    op.drop_column("outbox_process", "schedules")
    op.drop_table("outbox_schedule")

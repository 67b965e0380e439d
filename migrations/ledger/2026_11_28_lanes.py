"""Let deliveries of one lane take effect one at a time, in the order of their commits.

How it works, and what must stay true, is in `service/ledger/lanes.py`.

Revision: ledger_lanes
Revises: ledger_erasures
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "ledger_lanes"
down_revision = "ledger_erasures"
branch_labels = None
depends_on = None

# Not `infinity`: before PostgreSQL 17 nothing can be subtracted from it.
_PARKED = """
CREATE FUNCTION outbox_parked() RETURNS timestamptz LANGUAGE sql IMMUTABLE AS $$
    SELECT '9000-01-01 00:00:00+00'::timestamptz
$$
"""

# Sorted, and all of a transaction's at once, so that no two wait for each other. Stripes, since a transaction that
# publishes to many keys must not fill the server's table of locks. What is looked at under the lock needs a statement
# that begins after it; above READ COMMITTED there is none.
_LOCK = """
CREATE FUNCTION outbox_lock_lanes(lanes text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'what goes through a lane needs a transaction at READ COMMITTED, not %',
            upper(current_setting('transaction_isolation'));
    END IF;
    PERFORM pg_advisory_xact_lock('outbox_message'::regclass::oid::int, stripe)
    FROM (SELECT DISTINCT hashtext(lane) & 1023 AS stripe FROM unnest(lanes) AS lane ORDER BY stripe) AS stripes;
END $$
"""

# The lanes of what this transaction has published are found by rows that have no place yet: nobody sees another's. By
# the time of its own start, or a held-back vacuum would have it crawl over all that once had none.
_LOCK_ALL = """
CREATE FUNCTION outbox_lock_all_lanes(mine text) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    this text := pg_current_xact_id()::text;
BEGIN
    IF current_setting('outbox.lanes_locked', true) IS DISTINCT FROM this THEN
        PERFORM outbox_lock_lanes(mine || ARRAY(
            SELECT lane FROM outbox_message
            WHERE created_at >= now() AND lane IS NOT NULL AND position IS NULL AND state = 'pending'));
        PERFORM set_config('outbox.lanes_locked', this, true);
    ELSE
        PERFORM outbox_lock_lanes(ARRAY[mine]);
    END IF;
END $$
"""

# Expressions around columns keep other indexes out, which look just as good to a plan that is made while the tables are
# empty, and kept.
_BLOCKED = """
CREATE FUNCTION outbox_lane_blocked(asked text) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM dead_letter WHERE lane = asked AND blocks AND coalesce(resolution, '') = '')
$$
"""

_ADVANCE = """
CREATE FUNCTION outbox_advance_lane(asked text, after bigint) RETURNS void LANGUAGE plpgsql
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
        PERFORM outbox_wake();
    END IF;
END $$
"""

_ENTER = """
CREATE FUNCTION outbox_enter_lane() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    newest text;
BEGIN
    PERFORM outbox_lock_all_lanes(NEW.lane);
    IF NEW.position IS NOT NULL THEN  -- back at its old place, and whatever is open in the lane is behind it
        PERFORM outbox_advance_lane(NEW.lane, NEW.position - 1);
        RETURN NULL;
    END IF;
    SELECT state INTO newest FROM outbox_message
    WHERE lane = NEW.lane AND position IS NOT NULL ORDER BY position DESC LIMIT 1;
    UPDATE outbox_message
    SET position = nextval('outbox_position'),
        due_at = CASE WHEN coalesce(newest, 'completed') = 'completed' AND NOT outbox_lane_blocked(NEW.lane)
                 THEN clock_timestamp() ELSE due_at END
    WHERE id = NEW.id AND (state || '') = 'pending' AND position IS NULL;
    RETURN NULL;
END $$
"""

# What leaves while it is parked was nobody's predecessor. It loses its place, since the newest row that has one must
# be open while any is.
_LEAVE = """
CREATE FUNCTION outbox_leave_lane() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.due_at < outbox_parked() THEN
        PERFORM outbox_lock_all_lanes(OLD.lane);
        PERFORM outbox_advance_lane(OLD.lane, OLD.position);
    ELSIF TG_OP = 'UPDATE' THEN
        UPDATE outbox_message SET position = NULL WHERE id = OLD.id;
    END IF;
    RETURN NULL;
END $$
"""

_RESOLVED = """
CREATE FUNCTION outbox_unblock_lane() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
BEGIN
    PERFORM outbox_lock_all_lanes(OLD.lane);
    IF NOT EXISTS (SELECT FROM outbox_message WHERE lane = OLD.lane AND position = OLD.position) THEN
        PERFORM outbox_advance_lane(OLD.lane, OLD.position);
    END IF;
    RETURN NULL;
END $$
"""

# Deferred to the commit: so a place is taken in the order of commits, what a savepoint undid takes none, and no lock
# is held while a request or a consumer still works.
_TRIGGERS = (
    """
    CREATE CONSTRAINT TRIGGER outbox_enter_lane AFTER INSERT ON outbox_message DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.lane IS NOT NULL) EXECUTE FUNCTION outbox_enter_lane()
    """,
    """
    CREATE CONSTRAINT TRIGGER outbox_leave_lane AFTER UPDATE OF state ON outbox_message DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (OLD.lane IS NOT NULL AND OLD.state <> 'completed' AND NEW.state = 'completed')
    EXECUTE FUNCTION outbox_leave_lane()
    """,
    """
    CREATE CONSTRAINT TRIGGER outbox_leave_lane_deleted AFTER DELETE ON outbox_message DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (OLD.lane IS NOT NULL AND OLD.state <> 'completed')
    EXECUTE FUNCTION outbox_leave_lane()
    """,
    """
    CREATE CONSTRAINT TRIGGER outbox_unblock_lane AFTER UPDATE OF resolution ON dead_letter
    DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (OLD.blocks AND OLD.resolution IS NULL AND NEW.resolution IS NOT NULL)
    EXECUTE FUNCTION outbox_unblock_lane()
    """,
)

_FUNCTIONS = (_PARKED, _LOCK, _LOCK_ALL, _BLOCKED, _ADVANCE, _ENTER, _LEAVE, _RESOLVED)


def upgrade() -> None:
    for table in ("outbox_message", "dead_letter"):
        op.add_column(table, sa.Column("lane", sa.Text(), nullable=True))
        op.add_column(table, sa.Column("position", sa.BigInteger(), nullable=True))
    op.add_column("dead_letter", sa.Column("blocks", sa.Boolean(), server_default=sa.false(), nullable=False))
    # No cache: a session would keep numbers that are behind by the time it takes its lock.
    op.execute("CREATE SEQUENCE outbox_position CACHE 1")
    op.create_index(
        "ix_outbox_message_lane",
        "outbox_message",
        ["lane", "position"],
        unique=True,
        postgresql_where=sa.text("position IS NOT NULL"),
    )
    op.create_index(
        "ix_outbox_message_entering",
        "outbox_message",
        ["created_at"],
        postgresql_where=sa.text("lane IS NOT NULL AND position IS NULL AND state = 'pending'"),
    )
    op.create_index("ix_dead_letter_lane", "dead_letter", ["lane"], postgresql_where=sa.text("blocks"))
    for statement in (*_FUNCTIONS, *_TRIGGERS):
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TRIGGER outbox_unblock_lane ON dead_letter")
    for trigger in ("outbox_enter_lane", "outbox_leave_lane", "outbox_leave_lane_deleted"):
        op.execute(f"DROP TRIGGER {trigger} ON outbox_message")
    for function in (
        "outbox_unblock_lane()",
        "outbox_leave_lane()",
        "outbox_enter_lane()",
        "outbox_advance_lane(text, bigint)",
        "outbox_lane_blocked(text)",
        "outbox_lock_all_lanes(text)",
        "outbox_lock_lanes(text[])",
        "outbox_parked()",
    ):
        op.execute(f"DROP FUNCTION {function}")
    op.drop_column("dead_letter", "blocks")
    for table in ("outbox_message", "dead_letter"):
        op.drop_column(table, "position")
        op.drop_column(table, "lane")
    op.execute("DROP SEQUENCE outbox_position")

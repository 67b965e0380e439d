"""Publish an event once all consumers of another one are done.

How it works, and what must stay true, is in `service/ledger/follow_ups.py`.

Revision: ledger_follow_ups
Revises: ledger_from_sql
"""

from __future__ import annotations

from alembic import op

revision = "ledger_follow_ups"
down_revision = "ledger_from_sql"
branch_labels = None
depends_on = None

# What is looked at under the lock needs a statement that begins after it. Expressions around columns keep other indexes
# out, which look just as good to a plan that is made while the tables are empty, and kept.
_FUNCTION = """
CREATE FUNCTION outbox_follow_up() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    waiting uuid := overlay(OLD.headers ->> 'then' PLACING 'ff' FROM 35)::uuid;
    event uuid;
    last uuid;
BEGIN
    SELECT (headers ->> 'after')::uuid INTO event FROM outbox_message
    WHERE id = waiting AND (state || '') = 'pending' AND due_at = outbox_parked() FOR UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'what another event waits for needs a transaction at READ COMMITTED, not %',
            upper(current_setting('transaction_isolation'));
    END IF;
    last := overlay(event::text PLACING 'ff' FROM 35)::uuid;
    IF EXISTS (SELECT FROM outbox_message WHERE id > event AND id <= last AND (state || '') <> 'completed')
       OR EXISTS (SELECT FROM dead_letter
                  WHERE message_id > event AND message_id <= last AND coalesce(resolution, '') = '') THEN
        RETURN NULL;
    END IF;
    WITH parked AS (DELETE FROM outbox_message WHERE id = waiting RETURNING *)
    INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers)
    SELECT id, event_id, event_type, version, consumer, queue, payload, headers FROM parked;
    RETURN NULL;
END $$
"""

# A transaction that ends deliveries of several events takes all locks at once and sorted, so that no two wait for each
# other. Who ends one needs none of this.
_LOCK = """
CREATE FUNCTION outbox_lock_follow_ups(events text[]) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
BEGIN
    PERFORM FROM outbox_message
    WHERE id = ANY (ARRAY(SELECT overlay(event PLACING 'ff' FROM 35)::uuid FROM unnest(events) AS event))
    ORDER BY id FOR UPDATE;
END $$
"""

# Deferred to the commit, as for lanes: no lock is held while a consumer still works.
_TRIGGERS = (
    """
    CREATE CONSTRAINT TRIGGER outbox_follow_up AFTER UPDATE OF state ON outbox_message DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (OLD.state <> 'completed' AND NEW.state = 'completed' AND OLD.headers ? 'then')
    EXECUTE FUNCTION outbox_follow_up()
    """,
    """
    CREATE CONSTRAINT TRIGGER outbox_follow_up_deleted AFTER DELETE ON outbox_message DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (OLD.state <> 'completed' AND OLD.headers ? 'then')
    EXECUTE FUNCTION outbox_follow_up()
    """,
    """
    CREATE CONSTRAINT TRIGGER outbox_follow_up_resolved AFTER UPDATE OF resolution ON dead_letter
    DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (OLD.resolution IS NULL AND NEW.resolution = 'discarded' AND OLD.headers ? 'then')
    EXECUTE FUNCTION outbox_follow_up()
    """,
)


def upgrade() -> None:
    for statement in (_FUNCTION, _LOCK, *_TRIGGERS):
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TRIGGER outbox_follow_up_resolved ON dead_letter")
    for trigger in ("outbox_follow_up", "outbox_follow_up_deleted"):
        op.execute(f"DROP TRIGGER {trigger} ON outbox_message")
    op.execute("DROP FUNCTION outbox_lock_follow_ups(text[])")
    op.execute("DROP FUNCTION outbox_follow_up()")
    # Nobody would publish it any more: too early is better than never.
    op.execute("""
        UPDATE outbox_message SET due_at = clock_timestamp()
        WHERE state = 'pending' AND due_at = outbox_parked() AND lane IS NULL
    """)

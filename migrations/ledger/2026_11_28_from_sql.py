"""Let SQL publish events: triggers, other languages, bulk loads.

Revision: ledger_from_sql
Revises: ledger_schedules
"""

from __future__ import annotations

from alembic import op

revision = "ledger_from_sql"
down_revision = "ledger_schedules"
branch_labels = None
depends_on = None

# A UUID v7, since the purge and every search walk the ids by time; with a last byte that is free for the numbers of the
# event's deliveries (`service/ledger/ids.py`). PostgreSQL has a function of its own from version 18 on.
_NEW_ID = """
CREATE FUNCTION outbox_new_event_id() RETURNS uuid LANGUAGE sql VOLATILE AS $$
    SELECT overlay(overlay(overlay(replace(gen_random_uuid()::text, '-', '')
               PLACING lpad(to_hex(trunc(extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0') FROM 1 FOR 12)
               PLACING '7' FROM 13 FOR 1)
               PLACING '00' FROM 31 FOR 2)::uuid
$$
"""

# Who consumes it only the code knows. So one row is written, with the last number that a delivery can have, for the
# consumer that every worker has; that one publishes it. It stands in a lane of that consumer's, so that events with one
# key are published in the order of the commits here.
_PUBLISH = """
CREATE FUNCTION outbox_publish(type text, payload jsonb, queue text, version int DEFAULT 1,
                               order_key text DEFAULT NULL) RETURNS uuid LANGUAGE plpgsql AS $$
DECLARE
    event uuid := outbox_new_event_id();
BEGIN
    IF type IS NULL OR type !~ '^[a-z][a-z0-9_]*(\\.[a-z][a-z0-9_]*)+$' OR length(type) > 128 THEN
        RAISE invalid_parameter_value USING MESSAGE = 'an event has a dotted type such as order.placed';
    END IF;
    IF type LIKE 'outbox.%' THEN
        RAISE invalid_parameter_value USING MESSAGE = 'types that begin with outbox. are the template''s own';
    END IF;
    IF queue IS NULL OR queue !~ '^[A-Za-z_][A-Za-z0-9_-]{0,99}$' THEN
        RAISE invalid_parameter_value USING MESSAGE = 'name the queue in which a worker takes it over';
    END IF;
    IF version IS NULL OR version NOT BETWEEN 1 AND 32767 THEN
        RAISE invalid_parameter_value USING MESSAGE = 'a version is a whole number from 1';
    END IF;
    IF payload IS NULL OR jsonb_typeof(payload) <> 'object' OR octet_length(payload::text) > 8192 THEN
        RAISE invalid_parameter_value USING MESSAGE = 'an event''s fields are a JSON object of 8192 bytes at most';
    END IF;
    IF order_key = '' OR length(order_key) > 255 THEN
        RAISE invalid_parameter_value USING MESSAGE = 'what orders events has 1 to 255 characters';
    END IF;
    INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers, lane, due_at)
    VALUES (overlay(event::text PLACING 'ff' FROM 35)::uuid, event, type, version, 'outbox.fan_out', queue, payload,
            jsonb_build_object('correlation_id', event), 'outbox.fan_out:' || order_key,
            CASE WHEN order_key IS NULL THEN clock_timestamp() ELSE outbox_parked() END);
    RETURN event;
END $$
"""


def upgrade() -> None:
    op.execute(_NEW_ID)
    op.execute(_PUBLISH)


def downgrade() -> None:
    op.execute("DROP FUNCTION outbox_publish(text, jsonb, text, int, text)")
    op.execute("DROP FUNCTION outbox_new_event_id()")

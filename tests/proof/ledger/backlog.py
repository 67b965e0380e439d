"""A backlog that is there at once."""

__all__ = ["MANY", "ROWS"]

ROWS = 10_000

MANY = f"""
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers, state)
SELECT id, id, 'ledger.happened', 1, 'ledger.react', 'ledger', json_build_object('subject_id', id)::jsonb, '{{}}', $1
FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, {ROWS})) AS new
RETURNING id
"""
"""`ROWS` deliveries in one state, $1; returns their ids."""

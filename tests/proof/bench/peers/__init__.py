"""What the benchmark compares with: each module is run as a process, see `roles`.

They need `tests/proof/bench/requirements.lock`; nothing else imports them.
"""

__all__ = ["PROMISES", "QUEUES", "RELAYS"]

RELAYS = ("txoutbox", "faststream_outbox")
"""Move rows of an outbox to a broker, and trust it from there on."""

QUEUES = ("procrastinate", "pgqueuer")
"""Run jobs from Postgres, without a broker."""

PROMISES = {
    "txoutbox": "at-least-once to the broker, fenced; done once the broker took it; ordered per key",
    "faststream_outbox": "at-least-once to the broker, fenced; deleted once the broker took it",
    "procrastinate": "at-least-once; not fenced; finished after the effect's transaction; a dead worker's jobs wait",
    "pgqueuer": "at-least-once; not fenced; finished in batches after the effects' transactions; no retries by default",
}
"""What of it each peer promises."""

"""The ledger's test worker, with plain actors beside it: `dramatiq tests.proof.contract.hostile_app:setup_broker`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import dramatiq

from tests.proof.ledger import app


def leave_sign(name: str) -> None:
    """Create a file in the folder `SIGNS`."""
    (Path(os.environ["SIGNS"]) / name).touch()


def fail(*_args: Any, **_kwargs: Any) -> None:
    """Raise."""
    raise RuntimeError("as always")


def setup_broker() -> None:
    """Its broker."""
    app.setup_broker()
    for name, fn in (("plain.sign", leave_sign), ("plain.fail", fail)):
        dramatiq.Actor(
            fn,
            broker=dramatiq.get_broker(),
            actor_name=name,
            queue_name="ledger",
            priority=0,
            options={"max_retries": 1},
        )

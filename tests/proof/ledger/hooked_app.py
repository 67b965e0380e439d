"""The ledger's test worker with a middleware of a user's: `dramatiq tests.proof.ledger.hooked_app:setup_broker`."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import dramatiq
from dramatiq.middleware import Middleware, SkipMessage

from service.settings import load_settings
from tests.proof.ledger import app, batched

__all__ = ["batched", "setup_broker"]

_CURRENT: ContextVar[str] = ContextVar("_CURRENT", default="")
"""What a tracer keeps of the message that runs."""


class Tracer(Middleware):
    """Prints what it hears, and skips the messages that the setting `VERSION` names."""

    def before_process_message(self, broker: dramatiq.Broker, message: Any) -> None:
        _CURRENT.set(message.message_id)
        if message.message_id == load_settings().version:
            raise SkipMessage("as told")

    def after_process_message(self, broker: dramatiq.Broker, message: Any, **outcome: Any) -> None:
        print(f"after {message.message_id} {_CURRENT.get() == message.message_id} {outcome['result']}", flush=True)

    def after_skip_message(self, broker: dramatiq.Broker, message: Any) -> None:
        print(f"skipped {message.message_id}", flush=True)

    def after_ack(self, broker: dramatiq.Broker, message: Any) -> None:
        print(f"acknowledged {message.message_id}", flush=True)


def setup_broker() -> None:
    """Its broker."""
    app.setup_broker()
    dramatiq.get_broker().add_middleware(Tracer())

"""Stock Dramatiq on either broker."""

from __future__ import annotations

from tests.proof.rabbitmq.node import amqp, node, rabbitmq

__all__ = ["amqp", "node", "rabbitmq"]

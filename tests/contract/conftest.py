"""Stock Dramatiq on either broker."""

from __future__ import annotations

from tests.rabbitmq.node import amqp, node, rabbitmq

__all__ = ["amqp", "node", "rabbitmq"]

"""What the relay needs of a broker, and how each of them does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.brokers.sender import Sender
    from service.settings import BrokerSettings


def make_sender(settings: BrokerSettings) -> Sender:
    """The sender for the broker that `BROKER__URL` names."""
    if settings.is_rabbitmq:
        from relay.brokers.rabbitmq_sender import RabbitmqSender

        return RabbitmqSender(settings)
    from relay.brokers.redis_sender import RedisSender

    return RedisSender(settings)

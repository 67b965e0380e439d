"""Every error this project raises on purpose, in one tree. One with a module before its description is defined there.

    ServiceError
    ├── ConfigurationError          a setting is missing or wrong; the process does not start
    ├── OutboxError                 a misuse of the outbox; the message says what to do instead
    │   ├── EventDefinitionError        an event class that cannot be published safely
    │   ├── ConsumerDefinitionError     a consumer that cannot be registered
    │   ├── ScheduleError               a schedule that could not fire as it says
    │   ├── PublishError                publish() or accept() refused
    │   └── DeliveryError               a consumer used its Delivery in a way that would lose or repeat an effect
    ├── TransactionError            a handler or consumer tried to end the transaction it was lent
    ├── DatabaseUnavailableError    PostgreSQL cannot be reached; nothing is wrong with the work
    ├── LeaseLostError              service.outbox.delivery: somebody else has the delivery by now
    ├── BadTokenError               service.identity.tokens: a token is not believed
    ├── IssuerAwayError             service.identity.issuer_keys: nothing can be said about a token now
    ├── StuckError                  service.worker.watchdog: ends a worker process that does not come back
    ├── MailRefusedError            service.mail: this e-mail will never be taken
    ├── MailDeferredError           service.mail: it was not taken now
    ├── BrokerUnavailableError      relay.brokers.sender: the broker takes nothing
    ├── QueueRefusedError           relay.brokers.sender: one of its queues takes nothing
    ├── CommandError                relay.cli.command: an `outbox` command cannot do what it was asked
    ├── ReaderGoneError             relay.cli.output: nobody reads what a command prints
    ├── ServerError                 service.dev.places: a server for development cannot be started
    └── BusinessError               an expected refusal: a 4xx with a stable code; each domain has its own
        ├── MalformedKeyError           service.http.idempotency: the Idempotency-Key cannot be read
        ├── ReusedKeyError              service.http.idempotency: it belongs to another request
        ├── RequestInProgressError      service.http.idempotency: the first request under it still runs
        ├── UnauthenticatedError        service.identity.principal: the request does not say who is calling
        ├── RefusedTokenError           service.identity.principal: what it says is not believed
        └── MissingScopeError           service.identity.principal: the caller may not do this

`Retry`, `Fail` and `Postpone` are not errors: a consumer raises them to steer its own delivery. Nor is what has an
underscore: no other module sees it.
"""

from __future__ import annotations

from typing import ClassVar


class ServiceError(Exception):
    """Base of every error raised on purpose."""


class ConfigurationError(ServiceError):
    """A setting is missing or wrong."""


class OutboxError(ServiceError):
    """The outbox was used in a way that could lose or repeat an event."""


class EventDefinitionError(OutboxError):
    """An event class cannot be published safely."""


class ConsumerDefinitionError(OutboxError):
    """A consumer cannot be registered."""


class ScheduleError(OutboxError):
    """A schedule could not fire as it says; nothing was written."""


class PublishError(OutboxError):
    """An event was refused; nothing was written."""


class DeliveryError(OutboxError):
    """A consumer used its delivery in a way that would lose or repeat an effect."""


class TransactionError(ServiceError):
    """A handler or consumer tried to end the transaction that it was lent."""


class DatabaseUnavailableError(ServiceError):
    """PostgreSQL cannot be reached."""


class BusinessError(ServiceError):
    """An expected refusal. Subclasses set `status` (HTTP), `code` (stable, for machines) and `title`."""

    status: ClassVar[int] = 409
    code: ClassVar[str] = "conflict"
    title: ClassVar[str] = "The request cannot be carried out in the current state"
    headers: ClassVar[dict[str, str]] = {}

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail

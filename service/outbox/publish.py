"""Publishing: an event and its session are checked, and a row is written for each consumer, in that session.

What must stay true: an event exists if and only if the transaction that published it committed. So `publish` only
ever leaves rows to be flushed with the session it is given, it refuses a session whose work nobody will commit, and it
touches neither the broker nor any connection of its own.
"""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession

from service.database.sessions import FlushingSession, confirm
from service.errors import PublishError
from service.ledger.cancelling import cancel_open
from service.ledger.delivering import DUE_AFTER
from service.ledger.follow_ups import AFTER, THEN
from service.ledger.ids import FAN_OUT, delivery_id, last_delivery_of, new_event_id
from service.ledger.lanes import parked
from service.ledger.publishing import Terms, as_objects, insert_deliveries, insert_many, take_key
from service.ledger.tables import OutboxMessage
from service.outbox.consumers import consumers_of
from service.outbox.events import Event
from service.outbox.ordering import share_of
from service.outbox.payloads import payload_of
from service.telemetry import tracing
from service.telemetry.logs import current_headers
from service.text import storable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any
    from uuid import UUID

    from sqlalchemy import Connection
    from sqlalchemy.orm import Mapper

MAX_DELAY = timedelta(days=366)
"""How far ahead an event can be scheduled."""

READ_ONLY = "outbox.read_only"
"""Key in `session.info` of sessions that are never committed."""


def publish(
    session: AsyncSession,
    event: Event,
    *,
    delay: timedelta | None = None,
    expires: timedelta | None = None,
    unique: bool = False,
    debounce: timedelta | None = None,
    then: Event | None = None,
) -> UUID:
    """Publish `event` in the session's transaction, to every consumer that is registered now.

    Args:
        session: The request's or the delivery's session. Its commit is what makes the event exist.
        event: What happened.
        delay: Hand it over no earlier than this much after the row is written, by the database's clock.
        expires: Begin no run of it later than this much after the row is written. It is completed as `expired` then.
        unique: Let an equal event that no worker has begun stand for both: this one is not stored beside it. The one
            that waits is due when the first of both would be.
        debounce: The same, and put it off by `delay` each time, until it has waited for so long in all.
        then: What is published once all its consumers are done: when each delivery is completed or has expired, or its
            dead letter was discarded.

    Returns:
        The event's id, for `cancel` and for `outbox events show`. Nothing has it where another event stands for this
        one.

    Raises:
        PublishError: when the event or the session cannot be used safely; nothing was written.
    """
    payload = checked_payload(event)
    check_session(session)
    _refuse_delay_in_order(delay, type(event))
    terms = _terms(delay, expires, debounce)
    event_id = new_event_id()
    rows = _rows(event_id, event, payload, debounce or delay)
    if unique or debounce is not None:
        if expires is not None:
            raise PublishError("an event that may stand for others cannot expire: publish it without `expires`")
        if then is not None:
            raise PublishError("an event that may stand for others has no end of its own: publish it without `then`")
        _make_unique(session, event, rows)
    if then is not None:
        _write(session, _follow_up(then, event_id, rows), Terms())
    _write(session, rows, terms)
    return event_id


def publish_as(session: AsyncSession, event_id: UUID, event: Event) -> None:
    """Publish what has an id already, and is in the ledger for nobody but whoever calls this.

    It keeps fields that its class does not have, where they were read.

    Raises:
        PublishError: as for `publish`.
    """
    payload = (event.model_extra or {}) | checked_payload(event)
    check_session(session)
    _write(session, _rows(event_id, event, payload, None), Terms())


def publish_all(
    session: AsyncSession,
    events: Iterable[Event],
    *,
    delay: timedelta | None = None,
    expires: timedelta | None = None,
) -> list[UUID]:
    """Publish many events at once: as `publish` does with each of them, in a few large statements.

    Args:
        session: As for `publish`.
        events: Of one class or of several. They are held in memory until the session's next flush.
        delay, expires: As for `publish`, the same for all.

    Returns:
        The events' ids, in their order.

    Raises:
        PublishError: as for `publish`, for the first event that cannot be published; none of them is.
    """
    check_session(session)
    terms = _terms(delay, expires)
    ids: list[UUID] = []
    rows: list[dict[str, Any]] = []
    for event in events:
        _refuse_delay_in_order(delay, type(event))
        ids.append(event_id := new_event_id())
        rows += _rows(event_id, event, checked_payload(event), delay)
    _write(session, rows, terms, insert_many)
    return ids


async def cancel(session: AsyncSession, event_id: UUID) -> bool:
    """Cancel what has been published, in the session's transaction: deliveries that no worker has begun never run.

    One that waits for a retry is cancelled too. What is running goes on, and what is completed or dead stays as it is.

    Args:
        session: As for `publish`.
        event_id: What `publish` returned.

    Returns:
        Whether all deliveries of the event are cancelled. `False` means that it was too late for one of them at least,
        or that there is no such event (any more).

    Raises:
        PublishError: for a session that cannot be used, as for `publish`.
    """
    check_session(session)
    await session.flush()  # it may have been published in this very transaction
    await (await session.connection()).run_sync(refuse_autocommit)
    return await cancel_open(session, event_id)


async def accept(session: AsyncSession, key: str, event: Event) -> bool:
    """Take over an event from elsewhere (a webhook, another service) once, under its sender's idempotency key.

    Args:
        session: As for `publish`; acknowledge to the sender only after it committed.
        key: The sender's key, unique across all senders: prefix it with the sender's name.
        event: The event to publish here.

    Returns:
        Whether it was new; `False` means that it was accepted before and nothing was written.

    Raises:
        PublishError: as for `publish`, or for a key that is empty or longer than 255 characters.
    """
    payload = checked_payload(event)
    check_session(session)
    if not key or len(key) > 255 or storable(key) != key:  # cleaned, it could be another one
        raise PublishError("the key must have 1 to 255 characters, no NUL: pass the sender's idempotency key")
    await (await session.connection()).run_sync(refuse_autocommit)
    event_id = new_event_id()
    if not await take_key(session, key, event_id):
        await confirm(session)  # the sender is about to be told that it is here
        return False
    _write(session, _rows(event_id, event, payload, None), Terms())
    return True


def _rows(event_id: UUID, event: Event, payload: dict[str, Any], delay: timedelta | None) -> list[dict[str, Any]]:
    headers = tracing.created(event.event_type, str(event_id), current_headers())
    headers |= {DUE_AFTER: f"{delay.total_seconds()}"} if delay else {}
    return [
        {
            "id": delivery_id(event_id, number),
            "event_id": event_id,
            "event_type": event.event_type,
            "version": event.event_version,
            "consumer": consumer.name,
            "queue": consumer.queue,
            "payload": payload,
            "headers": headers | share_of(payload, consumer.share_by),
            **({} if consumer.order is None else parked(consumer.order.lane_of(payload))),
        }
        for number, consumer in enumerate(consumers_of(type(event)), start=1)
    ]


def _follow_up(event: Event, after: UUID, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is to be written of an event that waits for these deliveries, which are marked for it."""
    payload, event_id, consumers = checked_payload(event), new_event_id(), consumers_of(type(event))
    if not rows or not consumers:
        return _rows(event_id, event, payload, None)
    headers = {name: value for name, value in rows[0]["headers"].items() if name != DUE_AFTER}
    for row in rows:
        row["headers"] = row["headers"] | {THEN: str(event_id)}
    waiting = {
        "id": last_delivery_of(event_id),
        "event_id": event_id,
        "event_type": event.event_type,
        "version": event.event_version,
        "consumer": FAN_OUT,
        "queue": consumers[0].queue,
        "payload": payload,
        "headers": headers | {AFTER: str(after)},
        **parked(None),
    }
    return [waiting]


def _write(
    session: AsyncSession,
    rows: list[dict[str, Any]],
    terms: Terms,
    insert: Callable[[Connection, list[dict[str, Any]], Terms], None] = insert_deliveries,
) -> None:
    def insert_rows(connection: Connection) -> None:
        refuse_autocommit(connection)
        insert(connection, rows, terms)

    sync = session.sync_session
    if rows and isinstance(sync, FlushingSession):
        sync.at_flush(insert_rows)
    else:
        session.add_all(as_objects(rows, terms))


def checked_payload(event: Event) -> dict[str, Any]:
    """The event's JSON, if it can be published.

    Raises:
        PublishError: it cannot; the message says why.
    """
    if not isinstance(event, Event) or type(event) is Event:  # type: ignore[redundant-expr]
        raise PublishError(f"publish takes an instance of an Event class, not {type(event).__name__}")
    if not consumers_of(type(event)) and not event.unconsumed:
        raise PublishError(
            f"nobody consumes {event.event_type!r}: add a @consumer for it, check that its module is imported, or "
            f"declare it: class {type(event).__name__}(Event, type={event.event_type!r}, unconsumed=True)"
        )
    payload = payload_of(event)
    for consumer in consumers_of(type(event)):
        if consumer.order is not None:
            consumer.order.lane_of(payload)  # refused before anything is written
        share_of(payload, consumer.share_by)
    return payload


def _refuse_delay_in_order(delay: timedelta | None, event: type[Event]) -> None:
    if delay and any(consumer.order for consumer in consumers_of(event)):
        raise PublishError(
            f"{event.event_type!r} has a consumer that runs in order, and all behind it would wait for the delay: "
            "publish it without one"
        )


def _make_unique(session: AsyncSession, event: Event, rows: list[dict[str, Any]]) -> None:
    if any(consumer.order for consumer in consumers_of(type(event))):
        raise PublishError(
            f"{event.event_type!r} has a consumer that runs in order, and an earlier event cannot stand for one that "
            "comes after others: publish it without `unique`"
        )
    if not isinstance(session.sync_session, FlushingSession):
        raise PublishError(
            "unique needs a session that can merge it into another event: that of a request or a delivery, or one of "
            "session_factory(engine, OneTransaction)"
        )
    for row in rows:
        fields = json.dumps([row["version"], row["payload"]], sort_keys=True)
        row["unique_key"] = hashlib.sha256(fields.encode()).hexdigest()


def _terms(delay: timedelta | None, expires: timedelta | None, debounce: timedelta | None = None) -> Terms:
    if delay is not None and not timedelta() <= delay <= MAX_DELAY:
        raise PublishError(f"delay must be from 0 to {MAX_DELAY.days} days, not {delay}")
    if expires is not None and not (delay or timedelta()) < expires <= MAX_DELAY:
        raise PublishError(f"expires must be longer than the delay, and at most {MAX_DELAY.days} days, not {expires}")
    if debounce is not None and not (delay and delay <= debounce <= MAX_DELAY):
        raise PublishError(
            f"debounce is how long it is put off in all: it needs a delay, and is from that to {MAX_DELAY.days} days"
        )
    return Terms(delay, expires, debounce)


def check_session(session: AsyncSession) -> None:
    """Refuse a session whose commit would not publish anything.

    Raises:
        PublishError: naming the reason.
    """
    if not isinstance(session, AsyncSession):
        raise PublishError(
            f"publish takes the AsyncSession whose commit publishes the event, not {type(session).__name__}"
        )
    if session.info.get(READ_ONLY):
        raise PublishError(
            "delivery.read() is never committed: publish inside `async with delivery.begin() as session`"
        )
    if not session.is_active:
        raise PublishError("the session's transaction has failed: roll it back before publishing")
    if not session.in_transaction():
        try:
            session.sync_session.begin()
        except InvalidRequestError:
            raise PublishError(
                "the session is closed, so nothing would commit the event: publish inside the request or delivery that "
                "owns the session"
            ) from None


def refuse_autocommit(connection: Connection) -> None:
    """Refuse a connection on which each statement is committed by itself.

    Raises:
        PublishError: it is one.
    """
    if connection.dialect.detect_autocommit_setting(connection.connection.dbapi_connection):  # type: ignore[arg-type]
        raise PublishError("an AUTOCOMMIT connection has no transaction to publish in: use the default isolation level")


@sqlalchemy_event.listens_for(OutboxMessage, "before_insert")
def _before_insert(_mapper: Mapper[OutboxMessage], connection: Connection, _row: OutboxMessage) -> None:
    refuse_autocommit(connection)

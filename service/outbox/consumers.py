"""Who consumes what: the registry that `publish` fans out over and the worker turns into Dramatiq actors.

A consumer's name is stored in every row that waits for it, so it must survive refactoring: it derives from the
domain's name and the function's, and after a rename `formerly=` keeps the rows of the old name deliverable.

What must stay true: a name is one function's, and that function runs for one type of event only. A second function
would take the rows of the first, so it is refused; a module that is imported again defines the same ones again.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from service.errors import ConsumerDefinitionError
from service.ledger.delivering import DIED
from service.ledger.ids import MAX_CONSUMERS
from service.ledger.message import is_queue_name
from service.outbox.events import AnyEvent, event_named
from service.outbox.ordering import in_order, shared_by

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.outbox.events import Event
    from service.outbox.ordering import InOrder

_LARGEST_BATCH = 1_000

ANY_QUEUE = "*"
"""The queue of a consumer of the template's own, which every worker has: its deliveries say where they wait."""

F = TypeVar("F", bound=Callable[..., Any])

_NAME = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)+")
_BY_NAME: dict[str, Consumer] = {}
_BY_EVENT: dict[str, list[Consumer]] = {}


class Retry(Exception):  # noqa: N818  it steers a delivery, it reports no error
    """Raise it in a consumer to be run again, after `delay` milliseconds or the usual backoff. Uses up an attempt."""

    def __init__(self, reason: str = "the consumer asked for a retry", *, delay: int | None = None) -> None:
        super().__init__(reason)
        if delay is not None and not 0 <= delay <= 30 * 86_400_000:
            raise ValueError("delay is in milliseconds, from 0 to 30 days")
        self.delay = delay


class Fail(Exception):  # noqa: N818
    """Raise it in a consumer to move the delivery to the dead letters at once, with `reason`."""


class Postpone(Exception):  # noqa: N818
    """Leaves a delivery to a worker with other code, as if this one did not know the consumer."""


@dataclass(frozen=True, slots=True)
class Consumer:
    """One consumer. `None` for an option means the setting of the same name under `OUTBOX__`.

    `max_retries` counts retries after the first attempt; `min_backoff`, `max_backoff` and `time_limit` are
    milliseconds; `throws` are exceptions that mean "never retry"; a lower `priority` runs first. `order` is `None`
    where deliveries run in any order.
    """

    name: str
    event: type[Event]
    fn: Callable[..., Any]
    queue: str
    max_retries: int | None
    min_backoff: int | None
    max_backoff: int | None
    time_limit: int | None
    throws: tuple[type[BaseException], ...]
    priority: int
    formerly: tuple[str, ...]
    order: InOrder | None = None
    share_by: str | None = None
    """The field whose value is the key under which its deliveries take turns."""
    on_dead: Consumer | None = None
    """Takes over what this one has given up; `publish` knows nothing of it."""
    of_dead: bool = False
    """It is such a one."""
    batch: int | None = None
    """How many deliveries it takes at once; `None` for one that takes a single event."""

    @property
    def event_type(self) -> str:
        """As it stands in its deliveries."""
        return DIED if self.of_dead else self.event.event_type

    def knows(self, event_type: str, version: int) -> bool:
        """Whether this code can read such an event."""
        event = self.class_of(event_type)
        return event is not None and version <= event.event_version

    def class_of(self, event_type: str) -> type[Event] | None:
        """As what it is handed events that are stored under this type, if it takes them."""
        if self.event is AnyEvent:
            return event_named(event_type)
        return self.event if event_type == self.event_type else None

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.fn)


def consumer(
    event: type[Event],
    *,
    queue: str,
    name: str | None = None,
    max_retries: int | None = None,
    min_backoff: int | None = None,
    max_backoff: int | None = None,
    time_limit: int | None = None,
    throws: type[BaseException] | tuple[type[BaseException], ...] = (),
    priority: int = 0,
    formerly: Sequence[str] = (),
    on_dead: Callable[..., Any] | None = None,
    order_by: str | None = None,
    lane: str | None = None,
    skip_dead: bool = False,
    share_by: str | None = None,
    batch: int | None = None,
) -> Callable[[F], F]:
    """Register a function as a consumer of `event`; the function itself is returned unchanged.

        @consumer(OrderPlaced, queue="stock")
        async def reserve_stock(event: OrderPlaced, delivery: Delivery) -> None: ...

    An `async def` runs on the worker's event loop. A plain `def` runs in a thread, for CPU work or blocking
    libraries, and cannot call `delivery.begin()`.

    `on_dead` is a function like a consumer, for a delivery that is given up. The dead letter and a delivery of its own,
    to `<name>.on_dead` in the same queue, are written by one statement: so it runs once for each dead letter, with
    retries like any other, whatever the first one died of, a lost worker too. Only where this code does not know the
    consumer or the event it is not run.

    With `order_by`, deliveries of events that have the same value in that field run one at a time, in the order in
    which their publishers committed. Consumers with the same `lane` share one order. When a delivery is given up, all
    behind it wait for whoever replays or discards the dead letter; with `skip_dead` they go on without it.

    With `share_by`, the values of that field take turns when deliveries of the queue are handed over: a million of one
    value hold up no other.

    With `batch` it takes up to so many events at once, as `(events: list[OrderPlaced], deliveries: Deliveries)`, and
    one transaction completes all of them.

    Raises:
        ConsumerDefinitionError: for a name that is taken or malformed, a signature that cannot be called, an order or
            shares that make no sense, or a batch that cannot be.
    """

    def register(fn: F) -> F:
        _check_signature(fn)
        stored = name or f"{_domain_of(fn)}.{fn.__name__}"
        spec = Consumer(
            name=stored,
            event=event,
            fn=fn,
            queue=queue,
            max_retries=_bounded("max_retries", max_retries, 0, 1000),
            min_backoff=_bounded("min_backoff", min_backoff, 1, 604_800_000),
            max_backoff=_bounded("max_backoff", max_backoff, 1, 604_800_000),
            time_limit=_bounded("time_limit", time_limit, 1, 86_400_000),
            throws=throws if isinstance(throws, tuple) else (throws,),
            priority=priority,
            formerly=tuple(formerly),
            on_dead=None if on_dead is None else _for_the_dead(on_dead, event, queue, [stored, *formerly]),
            order=in_order(stored, event, order_by=order_by, lane=lane, skip_dead=skip_dead, renamed=bool(formerly)),
            share_by=shared_by(stored, event, share_by),
            batch=_batch(fn, batch, order_by),
        )
        _register(spec)
        return fn

    return register


def _for_the_dead(fn: Callable[..., Any], event: type[Event], queue: str, names: list[str]) -> Consumer:
    _check_signature(fn)
    name, *formerly = [f"{each}.on_dead" for each in names]
    return Consumer(
        name=name,
        event=event,
        fn=fn,
        queue=queue,
        max_retries=None,
        min_backoff=None,
        max_backoff=None,
        time_limit=None,
        throws=(),
        priority=0,
        formerly=tuple(formerly),
        of_dead=True,
    )


def _domain_of(fn: Callable[..., Any]) -> str:
    module = fn.__module__.removesuffix(".consumers")
    return module.rpartition(".")[2].lstrip("_").lower()


def _bounded(option: str, value: int | None, low: int, high: int) -> int | None:
    if value is not None and not low <= value <= high:
        raise ConsumerDefinitionError(f"{option} must be from {low} to {high}, not {value}")
    return value


def _batch(fn: Callable[..., Any], batch: int | None, order_by: str | None) -> int | None:
    if batch is not None and order_by is not None:
        raise ConsumerDefinitionError(f"{fn.__qualname__}: what runs in order runs alone: drop batch= or order_by=")
    if batch is not None and not inspect.iscoroutinefunction(fn):
        raise ConsumerDefinitionError(f"{fn.__qualname__}: batch= shares a transaction, and a `def` has none")
    return _bounded("batch", batch, 1, _LARGEST_BATCH)


def _check_signature(fn: Callable[..., Any]) -> None:
    try:
        inspect.signature(fn).bind(object(), object())
    except TypeError:
        raise ConsumerDefinitionError(
            f"{fn.__qualname__} must take exactly (event, delivery), like every consumer"
        ) from None


def _register(spec: Consumer) -> None:
    if spec.queue != ANY_QUEUE and not is_queue_name(spec.queue):
        raise ConsumerDefinitionError(f"{spec.queue!r} is no queue name: letters, digits, _ and -, at most 100")
    siblings = [each for each in _BY_EVENT.get(spec.event.event_type, []) if each.name != spec.name]
    if len(siblings) >= MAX_CONSUMERS:
        raise ConsumerDefinitionError(f"{spec.event.event_type!r} has {MAX_CONSUMERS} consumers already")
    added = [spec] if spec.on_dead is None else [spec, spec.on_dead]
    for each in added:
        _refuse_taken_names(each)
    for each in added:
        for name in (each.name, *each.formerly):
            _BY_NAME[name] = each
    _BY_EVENT[spec.event.event_type] = [*siblings, spec]


def _refuse_taken_names(spec: Consumer) -> None:
    for name in (spec.name, *spec.formerly):
        if not _NAME.fullmatch(name) or len(name) > 128:
            raise ConsumerDefinitionError(f"{name!r} is no consumer name: expected '<domain>.<verb>'")
        taken = _BY_NAME.get(name)
        if taken is not None and _definition(taken) != _definition(spec):
            raise ConsumerDefinitionError(
                f"{name!r} is already the name of {taken.fn.__module__}.{taken.fn.__qualname__} (line {_line(taken)}), "
                f"a consumer of {taken.event.event_type!r}: give each consumer a name of its own"
            )


def _definition(spec: Consumer) -> tuple[object, ...]:
    """What stays the same when its module is imported again, and differs in a namesake."""
    return spec.fn.__module__, spec.fn.__qualname__, _line(spec), spec.event.event_type


def _line(spec: Consumer) -> int:
    code = getattr(inspect.unwrap(spec.fn), "__code__", None)
    return 0 if code is None else int(code.co_firstlineno)


def consumer_named(name: str) -> Consumer | None:
    """The consumer that handles rows stored under `name`, if this process knows one."""
    return _BY_NAME.get(name)


def consumers_of(event: type[Event]) -> list[Consumer]:
    """The consumers of an event type, in the order of registration."""
    return _BY_EVENT.get(event.event_type, [])


def registered_consumers() -> list[Consumer]:
    """Every consumer once, by name."""
    return sorted({spec.name: spec for spec in _BY_NAME.values()}.values(), key=lambda spec: spec.name)

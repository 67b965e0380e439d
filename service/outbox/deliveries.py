"""Deliveries that a consumer is handed together: what it is told of each, and their one session.

What must stay true: the writes and the completion of every delivery in it commit together or not at all. If one of them
is not this claim's any more, all is rolled back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, overload

from service.errors import DeliveryError
from service.ledger import batch_claims
from service.outbox.delivery import Delivery, LeaseLostError, Progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncSession

    from service.database.driver import Connection
    from service.database.lent_connection import LentConnection
    from service.ledger.delivering import Claim


class _Member(Delivery):
    """One of a batch."""

    def _enter(self, name: str) -> NoReturn:
        raise DeliveryError(f"there is one transaction for all of a batch: use deliveries.{name}")


class Deliveries(Sequence[Delivery]):
    """The deliveries of a batch, in the order of its events.

    Each says what a `Delivery` says: its `idempotency_key`, for one. None of them begins a transaction of its own.
    """

    def __init__(
        self,
        claims: Sequence[Claim],
        sessions: Callable[..., AbstractAsyncContextManager[AsyncSession]],
        connections: Callable[[str, Callable[[Connection], str]], AbstractAsyncContextManager[LentConnection]],
        progress: Progress,
        *,
        timeout_ms: int,
        last_attempt: bool,
    ) -> None:
        self._claims = claims
        self._lenders = sessions, connections
        self._options: dict[str, Any] = {"is_async": True, "timeout_ms": timeout_ms, "last_attempt": last_attempt}
        self._together = _Together(claims, sessions, connections, progress, **self._options)

    def begin(self) -> AbstractAsyncContextManager[AsyncSession]:
        """As `Delivery.begin`: the commit at the end of the block completes all of them."""
        return self._together.begin()

    def connection(self) -> AbstractAsyncContextManager[LentConnection]:
        """As `Delivery.connection`."""
        return self._together.connection()

    def read(self) -> AbstractAsyncContextManager[AsyncSession]:
        """As `Delivery.read`."""
        return self._together.read()

    def __len__(self) -> int:
        return len(self._claims)

    @overload
    def __getitem__(self, index: int) -> Delivery: ...
    @overload
    def __getitem__(self, index: slice) -> list[Delivery]: ...
    def __getitem__(self, index: int | slice) -> Delivery | list[Delivery]:
        chosen = self._claims[index]
        return [self._member(each) for each in chosen] if isinstance(chosen, Sequence) else self._member(chosen)

    def _member(self, claim: Claim) -> Delivery:
        return _Member(claim, *self._lenders, Progress(), **self._options)

    @property
    def missing(self) -> frozenset[UUID]:
        """Those that were somebody else's when all were to be completed."""
        return self._together.missing


class _Together(Delivery):
    """The transaction of all of them, under the token of the first."""

    def __init__(self, claims: Sequence[Claim], *arguments: Any, **options: Any) -> None:
        super().__init__(claims[0], *arguments, **options)
        self.missing: frozenset[UUID] = frozenset()
        self._claims = claims

    async def _complete(self, driver: Connection) -> None:
        unbroken, mine = await batch_claims.complete_in_transaction(driver, self._claims, self._claim.token)
        if not unbroken:
            raise DeliveryError("the delivery's transaction was committed or rolled back inside its block")
        if len(mine) != len(self._claims):
            self.missing = frozenset([each.id for each in self._claims]) - mine
            self._progress.lost = True
            raise LeaseLostError

"""asyncpg's connection, lent for one transaction: for SQL that has no need of SQLAlchemy's session.

What must stay true, as of a session that is lent: whoever has it cannot end the transaction, and its owner commits all
of it or nothing. Once the transaction has ended no statement goes through, for the connection serves somebody else by
then. And no connection goes back to the pool in a transaction, in use, or with a server that only reads.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import asyncpg

from service.database.driver import DRIVER_ERRORS, ENDED, PreparedBegin, refuse_to_end
from service.errors import DatabaseUnavailableError, TransactionError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine


class LentConnection:
    """asyncpg's methods by their names, without those whose work outlives the statement. Parameters are `$1`, `$2`.

    Raises:
        TransactionError: for a statement that would end the transaction, and for any once it has ended.
    """

    __slots__ = ("_driver", "_mark")

    def __init__(self, driver: PreparedBegin) -> None:
        self._driver = driver
        self._mark = driver.mark

    async def execute(self, query: str, *args: object) -> str:
        """Run a statement, or several without parameters; the status of the last, such as `INSERT 0 1`."""
        return await self._for(query).execute(query, *args)

    async def executemany(self, query: str, args: Iterable[Sequence[object]]) -> None:
        """Run a statement for each of these parameters, all sent at once."""
        await self._for(query).executemany(query, args)

    async def fetch(self, query: str, *args: object) -> list[asyncpg.Record]:
        """All rows."""
        return await self._for(query).fetch(query, *args)

    async def fetchrow(self, query: str, *args: object) -> asyncpg.Record | None:
        """The first row."""
        return await self._for(query).fetchrow(query, *args)

    async def fetchval(self, query: str, *args: object) -> Any:
        """The first row's first column."""
        return await self._for(query).fetchval(query, *args)

    async def copy_records_to_table(
        self, table_name: str, *, records: Iterable[Sequence[object]], columns: Sequence[str] | None = None
    ) -> str:
        """Insert rows by COPY, which is the fastest way for many."""
        return await self._for("COPY").copy_records_to_table(table_name, records=records, columns=columns)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """A savepoint: if the block raises, what it did is undone, and nothing else."""
        async with self._for("SAVEPOINT").transaction():
            yield

    def _for(self, query: str) -> PreparedBegin:
        if self._driver.mark != self._mark:
            raise TransactionError(ENDED)
        refuse_to_end(query)
        return self._driver


@asynccontextmanager
async def lend_connection(
    engine: AsyncEngine, mark: str, first: Callable[[PreparedBegin], str]
) -> AsyncIterator[LentConnection]:
    """A connection in a transaction at READ COMMITTED, committed at the end of the block unless the block raises.

    Args:
        engine: From whose pool it is.
        mark: Of the transaction.
        first: The transaction's first statement, without parameters; it sets the mark.

    Raises:
        DatabaseUnavailableError: where there is none to be had, or it broke, or its server only reads.
        TransactionError: when the transaction was ended in the block, or the engine is not one of `create_engine`.
    """
    borrowed = await engine.raw_connection()
    driver = borrowed.driver_connection
    if type(driver) is not PreparedBegin:  # asyncpg answers isinstance() with True for every connection
        borrowed.close()
        raise TransactionError("this engine's connections cannot be lent: make it by `create_engine` of the service")
    transaction = driver.transaction(isolation="read_committed")
    try:
        driver.lend(mark)
        driver.prepare_begin(first(driver))
        await transaction.start()
        yield LentConnection(driver)
        driver.may_commit = True
        await transaction.commit()
    except BaseException as error:
        with suppress(*DRIVER_ERRORS):
            await transaction.rollback()
        if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
            driver.terminate()
        if isinstance(error, OSError | asyncpg.ReadOnlySQLTransactionError) and driver.is_closed():
            raise DatabaseUnavailableError(f"the connection to PostgreSQL is lost: {type(error).__name__}") from error
        raise
    finally:
        if not driver.is_closed() and driver.is_in_transaction():  # in use, or left in the middle of its end
            driver.terminate()
        borrowed.close()

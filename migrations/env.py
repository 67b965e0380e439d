"""Runs migrations on the database of `DATABASE__URL`.

Autogenerate compares what the domains and the outbox declare with what the database has. What has nothing to do with
a migration's own statements (no settings, no server, a database that other code has migrated) ends in one line.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from alembic import context
from alembic.runtime.migration import RevisionStep
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

import service.domains
import service.http.idempotency
import service.ledger.tables
from service.database.base import Base
from service.database.driver import DRIVER_ERRORS, open_connection
from service.errors import ConfigurationError
from service.settings import load_settings
from service.text import visible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

service.domains.discover()

_OTHER_CODE = (
    "the database was migrated by other code than this. If its data may go, start with an empty one (`make reset` for "
    "that of `make dev`); if not, downgrade it with the code that has the migration, or take that code"
)
_LOCKED = "a lock that the migration needs was held for 5 s; nothing was changed by it, so try again at a quieter time"
_WHICH_BRANCH = "`downgrade {0}` could mean either branch: say `alembic downgrade domains@{0}`"
_LEDGER = (
    "this would undo migrations of the ledger ({0}), which may hold events that nobody has handled yet; nothing was "
    "done. `alembic downgrade domains@-1` undoes one of yours. If it is the ledger you mean: `alembic -x ledger=down "
    "downgrade {1}`"
)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Add what to do about it."""
    try:
        yield
    except CommandError as error:
        if re.search("Can't locate revision", str(error)):
            raise CommandError(f"{error}: {_OTHER_CODE}") from None
        raise
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == "55P03":
            raise CommandError(_LOCKED) from error
        raise


def _run(connection: Connection) -> None:
    # A migration that waits for a lock makes everything behind it wait too: give up early instead.
    connection.execute(text("SET lock_timeout = '5s'"))
    connection.execute(text("SET statement_timeout = '10min'"))
    connection.commit()
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        transaction_per_migration=True,
        compare_type=True,
        compare_server_default=False,
    )
    with _plain_errors(), context.begin_transaction():
        _refuse_what_is_not_meant()
        context.run_migrations()


def _refuse_what_is_not_meant() -> None:
    """Going down must name its branch, and takes the ledger, with the events in it, only when told to.

    Alembic itself goes down an arbitrary one of several branches.
    """
    migration = context.get_context()
    destination = migration.opts.get("destination_rev")
    if not isinstance(destination, str):
        return
    if re.fullmatch(r"-\d+", destination) and len(migration.get_current_heads()) > 1:
        raise CommandError(_WHICH_BRANCH.format(destination))
    steps = migration.opts["fn"](migration.get_current_heads(), migration)
    ledger = [
        step.revision.revision
        for step in steps
        if isinstance(step, RevisionStep) and step.is_downgrade and "ledger" in step.revision.branch_labels
    ]
    if ledger and context.get_x_argument(as_dictionary=True).get("ledger") != "down":
        raise CommandError(_LEDGER.format(", ".join(ledger), destination))


async def _migrate() -> None:
    try:
        settings = load_settings().database
    except ConfigurationError as error:
        raise CommandError(str(error)) from None
    arguments = {"async_creator_fn": partial(open_connection, settings, "alembic"), "command_timeout": None}
    engine = create_async_engine("postgresql+asyncpg://", connect_args=arguments)
    try:
        connection = engine.connect()
        try:
            await connection.start()
        except (*DRIVER_ERRORS, DBAPIError) as error:
            reason = str(getattr(error, "orig", error)).partition("\n")[0] or type(error).__name__
            problem = (
                f"cannot use {settings.address.where}: {reason}. Is PostgreSQL running, and is DATABASE__URL right?"
            )
            raise CommandError(visible(problem)) from None
        try:
            await connection.run_sync(_run)
        finally:
            await connection.close()
    finally:
        await engine.dispose()


if context.is_offline_mode():
    context.configure(dialect_name="postgresql", target_metadata=Base.metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    given: Any = context.config.attributes.get("connection")
    if given is not None:
        _run(given)
    else:
        asyncio.run(_migrate())

"""Runs migrations on the database of `DATABASE__URL`.

Autogenerate compares what the domains and the outbox declare with what the database has.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from alembic import context
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

import service.domains
import service.idempotency
import service.outbox.tables
from service.database import Base
from service.settings import load_settings

if TYPE_CHECKING:
    from sqlalchemy import Connection

service.domains.discover()


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
    with context.begin_transaction():
        context.run_migrations()


async def _migrate() -> None:
    engine = create_async_engine(load_settings().database.sqlalchemy_url)
    try:
        async with engine.connect() as connection:
            await connection.run_sync(_run)
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

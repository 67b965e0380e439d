"""Connections of the asyncpg driver itself, for the ledger's own statements and the command line.

Apart from `database.py`, so that a command need not import a web framework to open a connection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import asyncpg

if TYPE_CHECKING:
    from service.settings import DatabaseSettings

__all__ = ["DRIVER_ERRORS", "bound_waits", "connect", "driver_arguments"]

# asyncpg raises an InternalClientError, which is none of its other errors, when a connection breaks while it is used.
DRIVER_ERRORS = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What a connection of asyncpg's own may raise when PostgreSQL refuses something or goes away."""


def driver_arguments(settings: DatabaseSettings, application_name: str) -> dict[str, Any]:
    """Arguments for `asyncpg.connect` and `asyncpg.create_pool`, for the ledger's own statements."""
    arguments: dict[str, Any] = {"dsn": settings.dsn, "timeout": settings.connect_timeout, "command_timeout": 30}
    if settings.pooler:
        arguments["statement_cache_size"] = 0
    return arguments | {"server_settings": {"application_name": application_name}}


async def connect(settings: DatabaseSettings, application_name: str) -> asyncpg.Connection[asyncpg.Record]:
    """A connection for the ledger's own statements, its waits bounded."""
    connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(
        **driver_arguments(settings, application_name)
    )
    if not settings.pooler:
        await bound_waits(connection)
    return connection


async def bound_waits(connection: asyncpg.Connection[asyncpg.Record], **more: str) -> None:
    """Set the session's timeouts, so that defaults of the database role can neither end nor hang a statement.

    And let no plan outlive the table it was made for: one that was kept since the ledger was empty reads all of it.

    They are set here and not when connecting, where a pooler would refuse them; behind one in transaction mode they
    would reach other sessions, so there they are the pooler's to set.
    """
    bounds = {
        "statement_timeout": "30s",
        "lock_timeout": "0",
        "idle_in_transaction_session_timeout": "10s",
        "plan_cache_mode": "force_custom_plan",
    } | more
    calls = ", ".join(f"set_config('{name}', ${number}, false)" for number, name in enumerate(bounds, start=1))
    await connection.execute(f"SELECT {calls}", *bounds.values())

"""PostgreSQL crashes, drops its clients, is full, is locked, is impatient, or is another server that knows less."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import asyncpg

from tests.chaos.scenario import scenario
from tests.chaos.world import SHORT, Plan, World

_BACKENDS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND random() < $1
"""
_RELAYS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name IN ('outbox-relay', 'api')
"""


@scenario()
async def postgres_restarted(world: World) -> None:
    """An immediate restart, twice: once at once, once after longer than a lease."""
    for away in (0.0, 4.0):
        await world.wait(2)
        began = time.time()
        await asyncio.to_thread(world.postgres.kill)
        await world.wait(away)
        await asyncio.to_thread(world.postgres.start)
        world.excuse("PostgreSQL restarted", began)
    await world.wait(1)


@scenario()
async def backends_killed(world: World) -> None:
    """A third of all sessions is ended, twenty times."""
    began = time.time()
    for _ in range(20):
        await world.sql(_BACKENDS, 0.3)
        await world.wait(0.5)
    world.excuse("sessions ended", began)


@scenario()
async def backends_of_relays_killed(world: World) -> None:
    """The sessions of relays and of the API are ended, thirty times; nothing excuses a repeated effect."""
    for _ in range(30):
        await world.sql(_RELAYS)
        await world.wait(0.3)


_KILL_AFTER_CLAIM = """
CREATE FUNCTION chaos_kill() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF random() < 0.15 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER chaos_kill AFTER UPDATE ON outbox_message DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (NEW.state = '{}') EXECUTE FUNCTION chaos_kill();
"""


@scenario()
async def backends_killed_in_claims(world: World) -> None:
    """The session ends in the commit of every seventh claim."""
    await world.sql(_KILL_AFTER_CLAIM.format("running"))
    await world.wait(8)
    await world.sql("DROP TRIGGER chaos_kill ON outbox_message")


@scenario()
async def backends_killed_in_completes(world: World) -> None:
    """The session ends in the commit of every seventh completion."""
    began = time.time()
    await world.sql(_KILL_AFTER_CLAIM.format("completed"))
    await world.wait(8)
    await world.sql("DROP TRIGGER chaos_kill ON outbox_message")
    world.excuse("sessions ended", began)


@scenario()
async def backends_killed_in_dispatches(world: World) -> None:
    """The session ends in the commit of every seventh row that is handed over."""
    await world.sql(_KILL_AFTER_CLAIM.format("dispatched"))
    await world.wait(8)
    await world.sql("DROP TRIGGER chaos_kill ON outbox_message")


@scenario()
async def connections_used_up(world: World) -> None:
    """Somebody else takes every connection there is, and old ones end meanwhile."""
    began = time.time()
    hogs: list[asyncpg.Connection[asyncpg.Record]] = []
    with suppress(asyncpg.PostgresError):
        while len(hogs) < 250:
            hogs.append(await asyncpg.connect(world.postgres.socket_url()))
    ender = hogs.pop()
    await ender.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name <> '' AND random() < 0.5"
    )
    await world.wait(4)
    for hog in [*hogs, ender]:
        await hog.close()
    world.excuse("no connections", began)


@scenario()
async def transaction_left_open(world: World) -> None:
    """A transaction is open for the whole run, and the sleeper's lock is held by it."""
    connection = await world.connect()
    await connection.execute("BEGIN")
    await connection.execute("SELECT pg_current_xact_id(), pg_advisory_xact_lock_shared(outbox_gate())")
    await world.wait(8)
    await connection.close()


@scenario(within=35)
async def locks_held(world: World) -> None:
    """Somebody locks outbox rows, then the ledger, then the business tables, 10 s in all."""
    began = time.time()
    for statement, seconds in (
        ("SELECT FROM outbox_message WHERE state <> 'completed' FOR UPDATE", 3),
        ("LOCK TABLE outbox_message IN ACCESS EXCLUSIVE MODE", 4),
        ("LOCK TABLE booking IN ACCESS EXCLUSIVE MODE", 3),
    ):
        connection = await world.connect()
        await connection.execute("BEGIN")
        await connection.execute(statement)
        await world.wait(seconds)
        await connection.close()
    world.excuse("ledger locked", began)


@scenario(Plan(settings={**SHORT, "OUTBOX__MAX_RETRIES": "50"}))
async def timeouts_on_the_role(world: World) -> None:
    """The role has timeouts that end statements, lock waits and idle transactions within milliseconds."""
    began = time.time()
    for setting in (
        "statement_timeout = '30ms'",
        "lock_timeout = '5ms'",
        "idle_in_transaction_session_timeout = '25ms'",
    ):
        await world.sql(f"ALTER ROLE postgres SET {setting}")
    await world.sql(_BACKENDS, 1.0)
    await world.wait(8)
    await world.sql("ALTER ROLE postgres RESET ALL")
    await world.sql(_BACKENDS, 1.0)
    world.excuse("short timeouts", began)

"""PostgreSQL crashes, drops its clients, is full, is locked, is impatient, or is another server that knows less."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import asyncpg
import psutil

from tests.proof.chaos.scenario import scenario
from tests.proof.chaos.world import LONGER_THAN_A_LEASE, SHORT, Plan, World

if TYPE_CHECKING:
    from service.database.driver import Connection

_SESSIONS = """
SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name LIKE $1 ORDER BY pid
"""


async def _end_sessions(world: World, chance: float = 1.0, application: str = "%") -> None:
    """End each session with this chance, as the scenario's dice say."""
    pids = [row["pid"] for row in await world.sql(_SESSIONS, application)]
    doomed = [pid for pid in pids if world.dice.random() < chance]
    await world.sql("SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) AS pid", doomed)


@scenario(attempts=2)
async def postgres_restarted(world: World) -> None:
    """An immediate restart, twice: once at once, once after longer than a lease."""
    for away in (0.0, LONGER_THAN_A_LEASE):
        await world.wait(2)
        began = time.time()
        await asyncio.to_thread(world.postgres.kill)
        await world.wait(away)
        await asyncio.to_thread(world.postgres.start)
        world.excuse("PostgreSQL restarted", began)
    await world.wait(1)


@scenario(attempts=2)
async def postgres_stalls(world: World) -> None:
    """All of it stands still for 7 s, and nobody is told."""
    await world.wait(1.5)
    began = time.time()
    server = psutil.Process(world.postgres.pid)
    family = [server, *server.children()]
    for process in family:
        process.suspend()
    await world.wait(7)
    for process in family:
        process.resume()
    world.excuse("PostgreSQL stood still", began)
    await world.wait(1)


@scenario()
async def backends_killed(world: World) -> None:
    """A third of all sessions is ended, twenty times; whoever has sent completes on another."""
    for _ in range(20):
        await _end_sessions(world, 0.3)
        await world.wait(0.5)


@scenario(attempts=1)
async def backends_of_relays_killed(world: World) -> None:
    """The sessions of relays and of the API are ended, thirty times."""
    for _ in range(30):
        for application in ("outbox-relay", "api"):
            await _end_sessions(world, application=application)
        await world.wait(0.3)


@scenario()
async def workers_die_while_relays_reconnect(world: World) -> None:
    """Relays lose their sessions every third of a lease; what killed workers were running must run again meanwhile."""
    world.hold()
    for _ in range(8):
        await world.place_surely("held")
    await world.until("SELECT count(*) FROM outbox_message WHERE state = 'running' AND consumer = 'chaos.book'", 8)
    for name in world.fleet.names("worker"):
        world.fleet.kill(name)
    world.hold(held=False)
    over = time.monotonic() + 90
    while (await world.sql(_HELD_AND_BOOKED))[0][0] < 8:
        assert time.monotonic() < over, "what the workers were running does not run again"
        await _end_sessions(world, application="outbox-relay")
        await world.wait(1)


_HELD_AND_BOOKED = """
SELECT count(*) FROM booking JOIN thing USING (subject_id) WHERE how = 'held'
"""

# Every seventh such change, counted by a sequence: the same ones whenever the load is the same.
_ON_EVERY_SEVENTH = """
CREATE SEQUENCE chaos_count;
CREATE FUNCTION chaos_strike() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('chaos_count') % 7 = 0 THEN PERFORM {}; END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER chaos_strike AFTER UPDATE ON outbox_message DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (NEW.state = '{}') EXECUTE FUNCTION chaos_strike();
"""
_IN_COMMIT = "pg_terminate_backend(pg_backend_pid())"
_AFTER_COMMIT = "pg_notify('chaos_committed', pg_backend_pid()::text)"


async def _in_commits(world: World, state: str) -> None:
    await world.sql(_ON_EVERY_SEVENTH.format(_IN_COMMIT, state))
    await world.wait(8)
    await world.sql("DROP TRIGGER chaos_strike ON outbox_message")
    assert (await world.sql("SELECT last_value FROM chaos_count"))[0][0] >= 14


@scenario()
async def backends_killed_in_claims(world: World) -> None:
    """The session ends in the commit of every seventh claim."""
    await _in_commits(world, "running")


@scenario()
async def backends_killed_in_completes(world: World) -> None:
    """The session ends in the commit of every seventh completion."""
    await _in_commits(world, "completed")


@scenario(attempts=1)
async def backends_killed_in_dispatches(world: World) -> None:
    """The session ends in the commit of every seventh row that is handed over."""
    await _in_commits(world, "dispatched")


@scenario()
async def backends_killed_after_claims(world: World) -> None:
    """The session ends right after the commit of every seventh claim."""
    ended: list[str] = []
    connection = await world.connect()
    pending: set[asyncio.Task[list[asyncpg.Record]]] = set()

    def end(_connection: object, _pid: int, _channel: str, backend: object) -> None:
        ended.append(str(backend))
        task = asyncio.create_task(world.sql("SELECT pg_terminate_backend($1)", int(str(backend))))
        pending.add(task)
        task.add_done_callback(pending.discard)

    await connection.add_listener("chaos_committed", end)
    await world.sql(_ON_EVERY_SEVENTH.format(_AFTER_COMMIT, "running"))
    await world.wait(8)
    await world.sql("DROP TRIGGER chaos_strike ON outbox_message")
    await asyncio.gather(*pending)
    await connection.close()
    assert len(ended) >= 5


@scenario()
async def connections_used_up(world: World) -> None:
    """Somebody else takes every connection there is, and old ones end meanwhile."""
    began = time.time()
    hogs: list[Connection] = []
    with suppress(asyncpg.PostgresError):
        while len(hogs) < 250:
            hogs.append(await asyncpg.connect(world.postgres.socket_url(), timeout=60))
    ender = hogs.pop()
    rows = await ender.fetch("SELECT pid FROM pg_stat_activity WHERE application_name <> '' ORDER BY pid")
    doomed = [row["pid"] for row in rows if world.dice.random() < 0.5]
    await ender.execute("SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) AS pid", doomed)
    await world.wait(LONGER_THAN_A_LEASE)
    for hog in [*hogs, ender]:
        await hog.close()
    world.excuse("no connections", began)


@scenario()
async def transaction_left_open(world: World) -> None:
    """A transaction is open until all is judged, and holds the sleeper's lock and old rows."""
    connection = await world.connect()
    world.keep_open(connection)
    await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await connection.execute(
        "SELECT pg_current_xact_id(), pg_advisory_xact_lock_shared(outbox_gate()), count(*) FROM outbox_message"
    )
    await world.wait(8)


@scenario(within=35)
async def locks_held(world: World) -> None:
    """Somebody locks outbox rows for 10 s, then the whole ledger, then the business tables."""
    for statement, seconds in (
        ("SELECT FROM outbox_message WHERE state <> 'completed' FOR UPDATE", 10),
        ("LOCK TABLE outbox_message IN ACCESS EXCLUSIVE MODE", LONGER_THAN_A_LEASE),
        ("LOCK TABLE booking IN ACCESS EXCLUSIVE MODE", LONGER_THAN_A_LEASE),
    ):
        began = time.time()
        connection = await world.connect()
        await connection.execute("BEGIN")
        await connection.execute(statement)
        await world.wait(seconds)
        await connection.close()
        world.excuse(statement, began)
        await world.wait(1)


_SHORT_TIMEOUTS = {
    "statement_timeout": "30ms",
    "lock_timeout": "5ms",
    "idle_in_transaction_session_timeout": "25ms",
    "transaction_timeout": "60ms",
    "idle_session_timeout": "150ms",
}


@scenario(Plan(settings={**SHORT, "OUTBOX__MAX_RETRIES": "50"}))
async def timeouts_on_the_role(world: World) -> None:
    """The role has timeouts that end statements, lock waits, transactions and sessions within milliseconds."""
    began = time.time()
    known = {row["name"] for row in await world.sql("SELECT name FROM pg_settings")}
    for name, value in _SHORT_TIMEOUTS.items():
        if name in known:
            await world.sql(f"ALTER ROLE postgres SET {name} = '{value}'")
    await _end_sessions(world)
    await world.wait(8)
    await world.sql("ALTER ROLE postgres RESET ALL")
    await _end_sessions(world)
    world.excuse("short timeouts", began)

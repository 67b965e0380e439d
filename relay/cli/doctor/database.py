"""The checks of PostgreSQL. Each has a connection of its own, so that one that fails hides no other."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

import asyncpg
from alembic.util import CommandError as AlembicError

from relay.cli.command import database_problem
from relay.cli.doctor.findings import Finding, Level, found
from service.database.driver import DRIVER_ERRORS
from service.database.revisions import Revisions, applied
from service.ledger import diagnosis

if TYPE_CHECKING:
    from service.database.driver import Connection
    from service.settings import Settings

OLDEST_VERSION = 15
CLOCKS_APART = 1.0
OLD_TRANSACTION = timedelta(minutes=5)
MANY_DEAD_ROWS = 50_000
MANY_PAGES = 10_000

_LOG = "look into PostgreSQL's log, and try again"
_ROLES = "run migrations/roles.sql, which follows every migration, and give each process the role that it makes for it"
_UPGRADE = "run `alembic upgrade heads` with this version of the code"
_VERIFY = "add sslmode=verify-full and sslrootcert to DATABASE__URL; PostgreSQL needs ssl = on"
_DURABLE = "durable, and no limit that fails what the service does"

_SETTINGS = {
    "fsync": "a crash of the machine may destroy the data",
    "full_page_writes": "a crash of the machine may destroy the data",
    "autovacuum": "the ledger grows and becomes slow",
    "track_counts": "autovacuum does not work without it",
    "synchronous_commit": "a crash loses what was answered with success",
    "default_transaction_read_only": "nothing can be written",
}

# By check: what is seen where all is well, and for each statement what is seen of a row of it, and what to do.
_LOOKS = {
    "settings": (_DURABLE, (
        (diagnosis.SWITCHED_OFF, "{setting}: {why}", "{cure}"),
        (diagnosis.LIMITS, "{setting}: {why}", "{cure}"),
    )),
    "connections": ("enough for one more process of each kind", ((
        diagnosis.CONNECTIONS, "{allowed} allowed, {free} free; one process of each kind takes {needed}",
        "raise max_connections or the CONNECTION LIMIT, or lower DATABASE__POOL_SIZE",
    ),)),
    "transactions": ("none is old", (
        (diagnosis.OLD_TRANSACTIONS, "one of {who} is {minutes} min old and keeps VACUUM back", "to end it: {cure}"),
    )),
    "replication": ("no slot without a reader", ((
        diagnosis.IDLE_SLOTS, "nobody reads {name}: it keeps {wal:,.0f} MB of WAL, rows of {transactions} transactions",
        "start its reader, or {cure}",
    ),)),
    "autovacuum": ("keeps up with the ledger", (
        (diagnosis.TABLES, "{why}: {name} has {live:,} rows, {dead:,} dead, {size:,.0f} MB", "{cure}"),
    )),
    "schedules": ("each waits for its next tick", ((diagnosis.STOPPED_SCHEDULES, "{seen}", "outbox {cure}"),)),
}  # fmt: skip


async def check_database(settings: Settings) -> list[Finding]:
    """All findings; if PostgreSQL is away that is the only one."""
    try:
        async with diagnosis.look(settings.database):
            pass
    except DRIVER_ERRORS as error:
        return [Finding("postgresql", Level.PROBLEM, str(database_problem(error, settings.database)))]
    findings = []
    for check in ("postgresql", "migrations", "rights", *_LOOKS):
        try:
            async with diagnosis.look(settings.database) as connection:
                findings += await _check(check, connection, settings)
        except (asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedTableError, AlembicError) as error:
            findings.append(Finding(check, Level.UNKNOWN, f"not checked: {error}"))
        except DRIVER_ERRORS as error:
            findings.append(Finding(check, Level.PROBLEM, f"not checked: {str(error) or type(error).__name__}", _LOG))
    return findings


async def _check(check: str, connection: Connection, settings: Settings) -> list[Finding]:
    match check:
        case "postgresql":
            return await _server(connection, settings)
        case "migrations":
            return await _migrations(connection)
        case "rights":
            return await _rights(connection)
    # One process of each kind: the API's pool, a worker's with its 5 for the ledger, 3 of a relay, and a command.
    needed = 4 if settings.database.pooler else 2 * settings.database.pool_size + 9
    arguments = {
        diagnosis.LIMITS: (settings.api.request_timeout, settings.outbox.time_limit / 1000),
        diagnosis.CONNECTIONS: (needed,),
        diagnosis.OLD_TRANSACTIONS: (OLD_TRANSACTION,),
        diagnosis.TABLES: (MANY_DEAD_ROWS, MANY_PAGES),
    }
    well, looks = _LOOKS[check]
    cases = []
    for statement, seen, cure in looks:
        for row in await connection.fetch(statement, *arguments.get(statement, ())):
            words = {"why": _SETTINGS.get(str(row.get("name")), "it ends requests or consumers too early"), **row}
            level = Level.PROBLEM if row.get("bad") else Level.ADVICE
            cases.append((True, level, seen.format(**words), cure.format(**words)))
    if check == "transactions" and not await connection.fetchval(diagnosis.SEES_OTHERS):
        cases.append((True, Level.UNKNOWN, "this role sees only its own", "GRANT pg_read_all_stats to it"))
    return found(check, well, cases)


async def _server(connection: Connection, settings: Settings) -> list[Finding]:
    before = time.time()
    row = await connection.fetchrow(diagnosis.SERVER)
    assert row is not None
    apart = max(before - row["clock"], row["clock"] - time.time())
    pooled, verified = row["pid"] != connection.get_server_pid(), settings.database.address.parameters.get("sslmode")
    seen = f"PostgreSQL {row['version']}, as role {row['role']}" + ", through a pooler" * pooled
    return [
        *found("postgresql", seen, (
            (row["major"] < OLDEST_VERSION, Level.PROBLEM, seen, f"upgrade it to {OLDEST_VERSION} or newer"),
            (row["standby"], Level.PROBLEM, f"{seen}: it only reads", "DATABASE__URL must name the primary"),
            (pooled and not settings.database.pooler, Level.PROBLEM, f"{seen}, and DATABASE__POOLER is not set",
             "set it for API and workers; the relay needs a URL that leads to PostgreSQL itself"),
        )),
        *found("tls postgresql", row["tls"] or "not encrypted, on one machine", (
            (not row["tls"] and not row["near"], Level.ADVICE, "not encrypted, over a network", _VERIFY),
            (row["tls"] and not row["near"] and verified != "verify-full", Level.ADVICE,
             f"{row['tls']}, but nothing makes sure who answers", _VERIFY),
        )),
        *found("clock", "this host's is that of PostgreSQL", ((
            apart > CLOCKS_APART, Level.ADVICE, f"this host's and PostgreSQL's are {apart:.0f} s apart",
            "let NTP set both: PostgreSQL's decides what is due, but logs will mislead",
        ),)),
    ]  # fmt: skip


async def _migrations(connection: Connection) -> list[Finding]:
    revisions = Revisions()

    async def ask(statement: str) -> list[str | None]:
        return [row[0] for row in await connection.fetch(statement)]

    has = await applied(ask)
    if has is None:
        return [Finding("migrations", Level.PROBLEM, "none that this role sees", f"{_UPGRADE}, then roles.sql")]
    missing, newer = revisions.missing(has), has - revisions.known
    seen = ", ".join(sorted(has)) or "none"
    return found("migrations", seen, (
        (missing, Level.PROBLEM, f"applied: {seen}; missing: {', '.join(sorted(missing))}", _UPGRADE),
        (newer and not missing, Level.ADVICE, f"{seen}: newer than this code", "is this the right image?"),
    ))  # fmt: skip


async def _rights(connection: Connection) -> list[Finding]:
    lacks = {
        work: [row["lacking"] for row in await connection.fetch(diagnosis.LACKS, *map(list, zip(*needs, strict=True)))]
        for work, needs in diagnosis.RIGHTS.items()
    }
    able = [work for work, lacking in lacks.items() if not lacking]
    work, lacking = min(lacks.items(), key=lambda each: len(each[1]))
    power = await connection.fetchval(diagnosis.POWER)
    return found("rights", f"those of {' and '.join(able)}", (
        (lacking, Level.PROBLEM, f"lacks for {work}: {', '.join(lacking[:5])}" + ", ..." * (len(lacking) > 5), _ROLES),
        (power, Level.ADVICE, f"more than any process needs: {power}", _ROLES),
    ))  # fmt: skip

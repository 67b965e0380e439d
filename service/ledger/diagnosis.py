"""What `outbox doctor` asks of PostgreSQL: its catalogs, its settings, and the ledger as a whole.

Most statements return a row for each thing that is wrong, `bad` if it is more than unwise, and in `cure` the statement
that mends it. What must stay true: nothing is changed, no wait is unbounded, any role may ask, and a pooler may stand
in between. So each look is a read-only transaction of its own, whose limits end with it.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from service.database.driver import open_connection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from service.database.driver import Connection
    from service.settings import DatabaseSettings

_BEGIN = "BEGIN READ ONLY; SET LOCAL statement_timeout = '10s'; SET LOCAL lock_timeout = '2s'; SET LOCAL jit = off"

SERVER = """
SELECT pg_backend_pid() AS pid, session_user::text AS role, current_setting('server_version') AS version,
       current_setting('server_version_num')::int / 10000 AS major, pg_is_in_recovery() AS standby,
       ssl.version AS tls, extract(epoch FROM clock_timestamp())::float8 AS clock,
       inet_client_addr() IS NULL OR inet_client_addr() <<= '127.0.0.0/8' OR inet_client_addr() = '::1' AS near
FROM (SELECT) AS one LEFT JOIN pg_stat_ssl AS ssl ON ssl.pid = pg_backend_pid() AND ssl.ssl
"""

# By what the processes do, as `migrations/roles.sql` grants it: table, rights, and the columns if not all.
RIGHTS = {
    "API and workers": (
        ("outbox_message", "SELECT INSERT DELETE", "*"),
        ("outbox_message", "UPDATE", "state due_at claim_token attempts started_at completed_at errors position"),
        ("outbox_message", "UPDATE", "ended_as"),
        ("dead_letter", "SELECT INSERT", "*"),
        ("accepted_event", "SELECT INSERT", "*"),
        ("idempotency_key", "SELECT INSERT", "*"),
        ("limited_queue", "SELECT", "*"),
        ("outbox_minute", "SELECT INSERT UPDATE", "*"),
        ("outbox_process", "SELECT INSERT DELETE", "*"),
        ("outbox_process", "UPDATE", "seen_at running loop_lag pool_timeouts schedules"),
        ("outbox_schedule", "SELECT INSERT DELETE", "*"),
        (
            "outbox_schedule",
            "UPDATE",
            "declared event_type version payload cron every tz catch_up queue anchor next_at last_at tick_id",
        ),
        ("alembic_version", "SELECT", "*"),
    ),
    "relay and commands": (
        ("outbox_message", "SELECT INSERT DELETE", "*"),
        ("outbox_message", "UPDATE", "state due_at dispatches dispatched_at errors position"),
        ("dead_letter", "SELECT", "*"),
        ("dead_letter", "UPDATE", "resolution resolved_at resolved_by resolved_why"),
        ("paused_queue", "SELECT INSERT DELETE", "*"),
        ("limited_queue", "SELECT INSERT UPDATE DELETE", "*"),
        ("outbox_operation", "SELECT DELETE", "*"),
        ("outbox_operation", "INSERT", "kind about asked_by why state ids total rate ended_at"),
        ("outbox_operation", "UPDATE", "state done refused refused_ids rate runner seen_at ended_at"),
        ("outbox_erasure", "SELECT", "*"),
        ("idempotency_key", "DELETE", "*"),
        ("idempotency_key", "SELECT", "ctid created_at"),
        ("idempotency_key", "UPDATE", "created_at"),
        ("outbox_minute", "SELECT DELETE", "*"),
        ("outbox_process", "SELECT INSERT DELETE", "*"),
        ("outbox_process", "UPDATE", "seen_at running loop_lag pool_timeouts"),
        ("outbox_schedule", "SELECT", "*"),
        ("outbox_schedule", "UPDATE", "tick_id paused_at paused_by why"),
        ("alembic_version", "SELECT", "*"),
    ),
}

LACKS = """
SELECT privilege || CASE col WHEN '*' THEN '' ELSE ' (' || col || ')' END || ' on ' || tbl AS lacking
FROM unnest($1::text[], $2::text[], $3::text[]) AS needed (tbl, privileges, cols),
     string_to_table(privileges, ' ') AS privilege, string_to_table(cols, ' ') AS col
WHERE CASE col WHEN '*' THEN has_table_privilege(to_regclass(tbl), privilege)
               ELSE has_column_privilege(to_regclass(tbl), col, privilege) END IS NOT TRUE
"""

POWER = """
SELECT concat_ws(', ', CASE WHEN rolsuper THEN 'SUPERUSER' END, CASE WHEN rolcreaterole THEN 'CREATEROLE' END,
                 CASE WHEN pg_has_role(relowner, 'USAGE') THEN 'owner of the ledger' END,
                 CASE WHEN has_column_privilege(pg_class.oid, 'payload', 'UPDATE') THEN 'UPDATE (payload)' END)
FROM pg_roles, pg_class WHERE rolname = session_user AND pg_class.oid = to_regclass('outbox_message')
"""

SWITCHED_OFF = """
SELECT name, name || ' = off' AS setting, format('ALTER SYSTEM SET %s = on', name) AS cure, true AS bad FROM pg_settings
WHERE name IN ('fsync', 'full_page_writes', 'autovacuum', 'track_counts') AND setting = 'off'
"""

# What a session gets that sets nothing itself: of each role that writes to the ledger, and of this connection. $1 and
# $2 are the seconds that a request and a consumer may take.
LIMITS = r"""
WITH me AS (SELECT oid FROM pg_roles WHERE rolname = session_user),
given AS (
    SELECT setrole, setdatabase, split_part(entry, '=', 1) AS name, substr(entry, strpos(entry, '=') + 1) AS value,
           '' AS sound
    FROM pg_db_role_setting, unnest(setconfig) AS entry
    WHERE setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
      AND (setrole IN (0, (SELECT oid FROM me))
           OR has_any_column_privilege(setrole, to_regclass('outbox_message'), 'UPDATE'))
    UNION ALL
    SELECT NULL, NULL, name, reset_val, boot_val FROM pg_settings
),
judged AS (
    SELECT *, CASE WHEN name = 'synchronous_commit' THEN value ~* '^(of|n|f|0)'
                   WHEN name = 'default_transaction_read_only' THEN value !~* '^(of|n|f|0)' END AS wrong,
           CASE WHEN name IN ('statement_timeout', 'lock_timeout', 'transaction_timeout',
                              'idle_in_transaction_session_timeout')
                THEN extract(epoch FROM (value || CASE WHEN value ~ '\d\s*$' THEN ' ms' ELSE '' END)::interval)
           END AS seconds
    FROM given
)
SELECT name, name || ' = ' || value AS setting, coalesce(wrong, seconds < $1::float8) AS bad,
       CASE WHEN setrole IS NULL THEN format('ALTER SYSTEM SET %s = %s', name, sound)
            WHEN setrole = 0 THEN format('ALTER DATABASE %I RESET %s', current_database(), name)
            WHEN setdatabase = 0 THEN format('ALTER ROLE %I RESET %s', rolname, name)
            ELSE format('ALTER ROLE %I IN DATABASE %I RESET %s', rolname, current_database(), name) END AS cure
FROM judged LEFT JOIN pg_roles ON pg_roles.oid = setrole
WHERE (wrong OR seconds > 0 AND seconds < greatest($1::float8, $2::float8)) AND (setrole IS NOT NULL OR NOT EXISTS (
    SELECT FROM given AS nearer WHERE nearer.name = judged.name AND nearer.setrole IN (0, (SELECT oid FROM me))))
ORDER BY cure
"""

CONNECTIONS = """
SELECT least(server, nullif(rolconnlimit, -1), nullif(datconnlimit, -1)) AS allowed, server - used AS free,
       least(server, nullif(rolconnlimit, -1), nullif(datconnlimit, -1)) < $1 AS bad, $1::int AS needed
FROM pg_roles, pg_database,
     (SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
             - coalesce(current_setting('reserved_connections', true)::int, 0) AS server) AS limits,
     (SELECT count(*) AS used FROM pg_stat_activity WHERE datid IS NOT NULL) AS sessions
WHERE rolname = session_user AND datname = current_database()
  AND least(server - used, nullif(rolconnlimit, -1), nullif(datconnlimit, -1)) < $1
"""

OLD_TRANSACTIONS = """
SELECT concat_ws(' ', usename, nullif(application_name, '')) AS who, 'pg_terminate_backend(' || pid || ')' AS cure,
       round(extract(epoch FROM clock_timestamp() - xact_start) / 60) AS minutes
FROM pg_stat_activity
WHERE xact_start < clock_timestamp() - $1::interval AND pid <> pg_backend_pid()
  AND (datname = current_database() OR backend_type = 'walsender')
UNION ALL
SELECT owner::text, 'ROLLBACK PREPARED ' || quote_literal(gid),
       round(extract(epoch FROM clock_timestamp() - prepared) / 60)
FROM pg_prepared_xacts WHERE database = current_database() AND prepared < clock_timestamp() - $1::interval
ORDER BY minutes DESC
"""

SEES_OTHERS = "SELECT pg_has_role('pg_read_all_stats', 'USAGE')"

IDLE_SLOTS = """
SELECT slot_name::text AS name, 'pg_drop_replication_slot(' || quote_literal(slot_name) || ')' AS cure,
       coalesce(greatest(age(xmin), age(catalog_xmin)), 0) AS transactions,
       CASE WHEN pg_is_in_recovery() THEN 0 ELSE pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) / 1e6 END AS wal
FROM pg_replication_slots
WHERE NOT active AND coalesce(restart_lsn::text, xmin::text, catalog_xmin::text) IS NOT NULL ORDER BY name
"""

# $1: the dead rows, and $2: the pages beyond one for each row, that a table may have.
TABLES = """
SELECT *, why = 'off' AS bad,
       CASE why WHEN 'off' THEN 'ALTER TABLE ' || name || ' RESET (autovacuum_enabled)'
                WHEN 'dead' THEN 'VACUUM (VERBOSE) ' || name ELSE 'VACUUM (FULL) ' || name END AS cure
FROM (
    SELECT pg_class.relname::text AS name, n_live_tup AS live, n_dead_tup AS dead,
           pg_relation_size(relid) / 1e6 AS size,
           CASE WHEN array_to_string(reloptions, ' ') ~ 'autovacuum_enabled=(of|n|f|0)' THEN 'off'
                WHEN n_dead_tup > $1 + n_live_tup / 5 THEN 'dead'
                WHEN pg_relation_size(relid) / 8192 > $2 + n_live_tup + n_dead_tup THEN 'empty' END AS why
    FROM pg_stat_user_tables JOIN pg_class ON pg_class.oid = relid
    WHERE relid IN (to_regclass('outbox_message'), to_regclass('dead_letter'), to_regclass('idempotency_key'))
) AS tables WHERE why IS NOT NULL
"""

# One of each kind, however many there are.
STOPPED_SCHEDULES = """
SELECT true AS bad, CASE WHEN letter IS NULL THEN name || ' has lost its next tick'
                         ELSE name || ' is stopped by dead letter ' || letter END
                    || CASE alike WHEN 1 THEN '' ELSE ', and ' || alike - 1 || ' more like it' END AS seen,
       CASE WHEN letter IS NULL THEN 'schedules resume ' || name ELSE 'dead-letters replay ' || letter END AS cure
FROM (
    SELECT DISTINCT ON (letter IS NULL) name, letter, count(*) OVER (PARTITION BY letter IS NULL) AS alike
    FROM (
        SELECT name, (SELECT min(id) FROM dead_letter WHERE message_id = tick_id AND resolution IS NULL) AS letter,
               EXISTS (SELECT FROM outbox_message WHERE id = tick_id AND state <> 'completed') AS waits
        FROM outbox_schedule WHERE paused_at IS NULL AND next_at IS NOT NULL
    ) AS schedules WHERE letter IS NOT NULL OR NOT waits ORDER BY letter IS NULL, name
) AS stopped
"""


@asynccontextmanager
async def look(settings: DatabaseSettings) -> AsyncIterator[Connection]:
    """A connection in a read-only transaction. Whatever goes wrong, nobody waits for its end."""
    connection = await open_connection(settings, "outbox-doctor", statement_cache_size=0, command_timeout=12)
    try:
        await connection.execute(_BEGIN)
        yield connection
        await connection.execute("ROLLBACK")
        await connection.close(timeout=settings.connect_timeout)
    finally:
        if not connection.is_closed():
            connection.terminate()

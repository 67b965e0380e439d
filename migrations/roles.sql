-- Four database roles with no more rights than their processes need, instead of one that may do everything.
--
--     psql "postgresql://admin@host/database" -f migrations/roles.sql
--
-- Run it as a superuser, or as the database's owner with CREATEROLE: before the first migration, and again after
-- every one (of the ledger it grants each right by name). It can be repeated at any time, also while the service runs.
-- The roles are named after the database, since roles belong to the whole server:
--
--     <database>_migrator   alembic upgrade heads: owns the tables
--     <database>_app        API and workers: the domains' tables, and what publishing and delivering take
--     <database>_relay      `outbox relay` and every other `outbox` command; it never sees the domains' tables
--     <database>_viewer     looks at the ledger and changes nothing, and sees no payload: the console's pages
--
-- It sets no passwords: ALTER ROLE <database>_app PASSWORD '...', or however your server authenticates.

\set ON_ERROR_STOP on

SELECT current_database() AS database,
       current_database() || '_migrator' AS migrator,
       current_database() || '_app' AS app,
       current_database() || '_relay' AS relay,
       current_database() || '_viewer' AS viewer
\gset

BEGIN;

-- PostgreSQL would cut longer names off, and make one role of several.
DO $$ BEGIN
    IF octet_length(current_database()) > 54 THEN
        RAISE EXCEPTION 'the roles are named after the database, whose name may have 54 bytes at most for that';
    END IF;
END $$;

SELECT format('CREATE ROLE %I LOGIN', name)
FROM unnest(ARRAY[:'migrator', :'app', :'relay', :'viewer']) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name)
  -- A deploy runs this as the migrator, which makes no roles: only the console waits for the viewer.
  AND (name <> :'viewer' OR (SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user))
\gexec

SELECT to_regrole(quote_ident(:'viewer')) IS NOT NULL AS viewed
\gset

-- Whoever is no superuser has to be a member to hand tables over and to set default privileges.
SELECT format('GRANT %I TO CURRENT_USER', :'migrator')
WHERE NOT pg_has_role(:'migrator', 'USAGE')
\gexec

REVOKE ALL ON DATABASE :"database" FROM PUBLIC;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT CONNECT ON DATABASE :"database" TO :"migrator", :"app", :"relay";
GRANT USAGE ON SCHEMA public TO :"migrator", :"app", :"relay";
\if :viewed
    GRANT CONNECT ON DATABASE :"database" TO :"viewer";
    GRANT USAGE ON SCHEMA public TO :"viewer";
\endif
GRANT CREATE ON SCHEMA public TO :"migrator";

-- What another role has created so far, other than extensions, becomes the migrator's.
SELECT format('ALTER TABLE %s OWNER TO %I', pg_class.oid::regclass, :'migrator')
FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'S')
  AND relowner <> quote_ident(:'migrator')::regrole
  AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_class.oid AND deptype IN ('e', 'a', 'i')
                  AND classid = 'pg_class'::regclass)
UNION ALL
SELECT format('ALTER ROUTINE %s OWNER TO %I', pg_proc.oid::regprocedure, :'migrator')
FROM pg_proc
WHERE pronamespace = 'public'::regnamespace AND proowner <> quote_ident(:'migrator')::regrole
  AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_proc.oid AND deptype = 'e')
UNION ALL
SELECT format('ALTER TYPE %s OWNER TO %I', pg_type.oid::regtype, :'migrator')
FROM pg_type
WHERE typnamespace = 'public'::regnamespace AND typtype IN ('e', 'd') AND typowner <> quote_ident(:'migrator')::regrole
  AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_type.oid AND deptype = 'e')
\gexec

GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO :"app";
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO :"app";

-- The ledger's tables: only what the statements of service/outbox and of relay do. A payload, once written, can be
-- changed by nobody.
SELECT to_regclass('public.outbox_message') IS NOT NULL AS migrated
\gset
\if :migrated
    -- The domains' tables of migrations to come. Not before the first one: that creates the ledger's tables too.
    ALTER DEFAULT PRIVILEGES FOR ROLE :"migrator" IN SCHEMA public
        GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO :"app";
    ALTER DEFAULT PRIVILEGES FOR ROLE :"migrator" IN SCHEMA public
        GRANT USAGE ON SEQUENCES TO :"app";

    REVOKE ALL ON outbox_message, dead_letter, accepted_event, paused_queue, limited_queue, idempotency_key,
        outbox_minute, outbox_process, outbox_erasure, outbox_operation, outbox_schedule, alembic_version
        FROM :"app", :"relay";

    GRANT SELECT, INSERT, DELETE ON outbox_message TO :"app";
    GRANT UPDATE (state, due_at, claim_token, attempts, started_at, completed_at, errors, position, ended_as)
        ON outbox_message TO :"app";
    GRANT SELECT, INSERT ON dead_letter, accepted_event, idempotency_key TO :"app";
    GRANT SELECT ON limited_queue TO :"app";
    GRANT SELECT, INSERT, UPDATE ON outbox_minute TO :"app";
    GRANT SELECT, INSERT, DELETE, UPDATE (seen_at, running, loop_lag, pool_timeouts, schedules) ON outbox_process
        TO :"app";
    GRANT SELECT, INSERT, DELETE, UPDATE (declared, event_type, version, payload, cron, every, tz, catch_up, queue,
        anchor, next_at, last_at, tick_id) ON outbox_schedule TO :"app";
    -- Nobody but the tables' owner erases anything, or changes what says so.
    GRANT SELECT ON outbox_erasure TO :"relay";
    GRANT SELECT ON alembic_version TO :"app", :"relay";

    GRANT SELECT, INSERT, DELETE ON outbox_message TO :"relay";
    GRANT UPDATE (state, due_at, dispatches, dispatched_at, errors, position) ON outbox_message TO :"relay";
    GRANT USAGE ON SEQUENCE outbox_position TO :"relay";
    -- Of those that are open: a trigger keeps the resolved ones as they are.
    GRANT SELECT, UPDATE (resolution, resolved_at, resolved_by, resolved_why) ON dead_letter TO :"relay";
    GRANT SELECT, INSERT, DELETE ON paused_queue TO :"relay";
    GRANT SELECT, INSERT, UPDATE, DELETE ON limited_queue TO :"relay";
    -- Who asked for something, when and for what is written once. A trigger keeps what is finished, and lets only go
    -- what never began.
    GRANT SELECT, DELETE, INSERT (kind, about, asked_by, why, state, ids, total, rate, ended_at),
        UPDATE (state, done, refused, refused_ids, rate, runner, seen_at, ended_at) ON outbox_operation TO :"relay";
    GRANT SELECT, DELETE ON outbox_minute TO :"relay";
    GRANT SELECT, UPDATE (tick_id, paused_at, paused_by, why) ON outbox_schedule TO :"relay";
    GRANT SELECT, INSERT, DELETE, UPDATE (seen_at, running, loop_lag, pool_timeouts) ON outbox_process TO :"relay";
    -- It purges stored responses without being able to read them; locking a row takes the right to update a column.
    GRANT SELECT (ctid, created_at), UPDATE (created_at), DELETE ON idempotency_key TO :"relay";

    \if :viewed
        REVOKE ALL ON outbox_message, dead_letter, accepted_event, paused_queue, limited_queue, idempotency_key,
            outbox_minute, outbox_process, outbox_erasure, outbox_operation, outbox_schedule, alembic_version
            FROM :"viewer";
        -- All but the payloads. Whatever reads `*` is refused.
        GRANT SELECT (id, event_id, event_type, version, consumer, queue, headers, state, due_at, attempts, dispatches,
            created_at, dispatched_at, started_at, completed_at, errors, lane, position, expires_at, ended_as)
            ON outbox_message TO :"viewer";
        GRANT SELECT (id, message_id, event_id, event_type, version, consumer, queue, headers, attempts, dispatches,
            created_at, errors, reason, died_at, resolution, resolved_at, resolved_by, resolved_why, resolved_role,
            lane, position, blocks) ON dead_letter TO :"viewer";
        GRANT SELECT (name, declared, event_type, version, cron, every, tz, catch_up, queue, anchor, next_at, last_at,
            tick_id, paused_at, paused_by, why) ON outbox_schedule TO :"viewer";
        GRANT SELECT ON paused_queue, limited_queue, outbox_minute, outbox_process, outbox_erasure, outbox_operation,
            alembic_version TO :"viewer";
    \endif
\endif

COMMIT;

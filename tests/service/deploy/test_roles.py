"""With the grants of `migrations/roles.sql` everything works, and nothing else does."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import pytest
from fastapi import APIRouter
from pydantic import SecretStr

from service.api import create_app
from service.database.driver import read_json
from service.dev.places import ROOT, ServerError
from service.dev.postgres import psql
from service.http.callers import PUBLIC
from service.http.idempotency import IdempotentRoute
from service.http.request_session import Session  # noqa: TC001  FastAPI resolves annotations at run time
from service.ledger import audit, editing, operations, statistics
from service.ledger.presence import Presence
from service.ledger.replaying import carry_out
from service.outbox import accept, publish
from service.settings import DatabaseSettings, Settings
from service.telemetry.loop_lag import LoopLag
from tests.servers.processes import Started
from tests.servers.real_servers import migrate
from tests.servers.relaying import relaying
from tests.servers.scraping import shows, watched
from tests.service.api.serving import serve
from tests.service.deploy.app import Happened
from tests.service.deploy.conftest import Roles, apply_roles
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.servers.real_servers import Where

pytestmark = pytest.mark.slow

router = APIRouter(route_class=IdempotentRoute, dependencies=[PUBLIC])


@router.post("/happen/{how}", status_code=201)
async def happen(how: str, session: Session) -> None:
    """Publish an event, and accept the same one from elsewhere."""
    event = Happened(subject_id=uuid4(), how=how)
    publish(session, event)
    await accept(session, f"elsewhere-{event.subject_id}", event)


def _settings(settings: Settings, url: str) -> Settings:
    return settings.model_copy(update={"database": DatabaseSettings(url=SecretStr(url))})


def _outbox(environment: Mapping[str, str], roles: Roles, *arguments: str) -> str:
    command = [sys.executable, "-m", "relay", *arguments]
    given = {**environment, "DATABASE__URL": roles.relay}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_every_process_does_its_work(
    roles: Roles, settings: Settings, environment: dict[str, str], tmp_path: Path
) -> None:
    command = ("dramatiq", "tests.service.deploy.app:setup_broker", "-p", "1", "-t", "2")
    worker = Started({**environment, "DATABASE__URL": roles.app}, tmp_path / "worker.log", *command)
    app = create_app(_settings(settings, roles.app))
    app.include_router(router)
    try:
        async with relaying(_settings(settings, roles.relay)), serve(app) as client:
            assert (await client.get("/health/ready")).status_code == 200
            for how in ("well", "fail", "die"):
                for _ in range(2):
                    answer = await client.post(f"/happen/{how}", headers={"Idempotency-Key": how})
                    assert answer.status_code == 201, answer.text
            await until(lambda: _said(roles, "SELECT count(*) FROM effect") == "2")
            await until(lambda: _said(roles, "SELECT count(*) FROM dead_letter") == "4")
            await asyncio.to_thread(_operate, environment, roles)
            await until(lambda: _said(roles, "SELECT count(*) FROM dead_letter") == "7")
            kinds = "SELECT string_agg(kind, ' ' ORDER BY kind) FROM outbox_process"
            await until(lambda: _said(roles, kinds) == "relay worker")
            await until(lambda: _said(roles, "SELECT count(*) > 0 FROM outbox_minute") == "t")
    finally:
        await worker.stop()
    assert _said(roles, "SELECT count(*) FROM outbox_process") == "0"
    await _purge_statistics(roles)
    assert _said(roles, "SELECT DISTINCT minute FROM outbox_minute") == "-infinity"


async def _purge_statistics(roles: Roles) -> None:
    """As the relay's own role, with all of it looking old."""
    connection = await asyncpg.connect(roles.relay)
    assert await statistics.forget_minutes(connection, timedelta(minutes=-2), 1_000) > 0
    await Presence("relay", "", LoopLag(1)).tell(connection)
    assert await statistics.forget_processes(connection, timedelta(minutes=-1)) == 1
    await connection.close()


def _said(roles: Roles, query: str) -> str:
    return psql(roles.migrator, query)


def _operate(environment: Mapping[str, str], roles: Roles) -> None:
    """What a person does at the command line."""
    assert "deploy.react" in _outbox(environment, roles, "status")
    assert "deploy.react" in _outbox(environment, roles, "dead-letters", "list")
    event = _said(roles, "SELECT event_id FROM dead_letter ORDER BY id LIMIT 1")
    assert "dead letter" in _outbox(environment, roles, "events", "show", event).lower()
    _outbox(environment, roles, "queues", "pause", "--all", "--why", "a test")
    _outbox(environment, roles, "queues", "resume", "--all")
    _outbox(environment, roles, "queues", "limit", "deploy", "--concurrency", "4", "--rate", "100/s")
    _outbox(environment, roles, "queues", "limit", "deploy", "--concurrency", "2")
    _outbox(environment, roles, "dead-letters", "discard", "1", "--why", "a test")
    _outbox(environment, roles, "dead-letters", "replay", "2", "3", "4", "--yes", "--why", "a test")
    assert "a test" in _outbox(environment, roles, "audit")
    assert "finished" in _outbox(environment, roles, "operations", "list")
    psql(roles.migrator, "UPDATE idempotency_key SET created_at = created_at - interval '1 year'")
    purged = _outbox(environment, roles, "purge", "--older-than", "0s")
    assert purged.split() == ["Removed", "2", "completed", "deliveries", "and", "3", "HTTP", "idempotency", "keys."]


def test_nobody_but_the_tables_owner_erases(roles: Roles, environment: dict[str, str]) -> None:
    psql(roles.app, _OPEN.replace("'{}', '{}'", """'{"who": "ann@example.com"}', '{}'"""))
    command = [sys.executable, "-m", "relay", "erase", "ann@example.com", "--why", "request 17", "--yes"]
    for url, code in ((roles.app, 1), (roles.relay, 1), (roles.migrator, 0)):
        given = {**environment, "DATABASE__URL": url}
        done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        if code == 1:
            assert "erasing takes the role that owns the tables" in done.stderr
        left = psql(roles.migrator, "SELECT count(*) FROM dead_letter WHERE payload::text LIKE '%ann%'")
        assert left == ("0" if url == roles.migrator else "1")
    migrator = psql(roles.migrator, "SELECT session_user")
    assert psql(roles.relay, "SELECT erased_role, dead_letters FROM outbox_erasure") == f"{migrator}|1"
    assert psql(roles.relay, "SELECT resolution, resolved_role FROM dead_letter") == f"discarded|{migrator}"


def test_lanes_take_no_other_rights(roles: Roles) -> None:
    """Each role moves them on by whatever it writes: what waits comes due."""
    columns = "event_id, event_type, version, consumer, queue, payload, headers, lane"
    values = "gen_random_uuid(), gen_random_uuid(), 'a', 1, 'a', 'q', '{}', '{}', 'l'"
    row = f"INSERT INTO outbox_message (id, {columns}, due_at) VALUES ({values}, outbox_parked())"
    due = "SELECT count(*) FROM outbox_message WHERE state = 'pending' AND due_at < now()"
    ends = "UPDATE outbox_message SET state = 'completed', completed_at = now()", "DELETE FROM outbox_message"
    for role, end in zip((roles.app, roles.relay), ends, strict=True):
        for _ in range(2):
            psql(role, row)
        assert _said(roles, due) == "1"
        psql(role, f"{end} WHERE due_at < now()")
        assert _said(roles, due) == "1"
        psql(role, "DELETE FROM outbox_message")
    more = "attempts, dispatches, created_at, errors, reason, position, blocks"
    dead = f"INSERT INTO dead_letter (message_id, {columns}, {more}) VALUES ({values}, 1, 1, now(), '[]', '', 1, true)"
    psql(roles.app, dead)
    psql(roles.app, row)
    assert _said(roles, due) == "0"
    psql(roles.relay, "UPDATE dead_letter SET resolution = 'discarded'")
    assert _said(roles, due) == "1"


def test_follow_ups_take_no_other_rights(roles: Roles) -> None:
    """Whoever ends the last delivery lets it come due."""
    columns = "event_id, event_type, version, consumer, queue, payload, headers"
    event, then = "01937e5c-8a4e-7cc0-98c4-dc0c0c073900", "01937e5c-8a4e-7cc0-98c4-dc0c0c073a00"
    waiting = f"""INSERT INTO outbox_message (id, {columns}, due_at) VALUES ('{then[:-2]}ff', '{then}', 'a', 1,
                  'outbox.fan_out', 'q', '{{}}', '{{"after": "{event}"}}', outbox_parked())"""
    values = f"""'{event[:-2]}01', '{event}', 'a', 1, 'a', 'q', '{{}}', '{{"then": "{then}"}}'"""
    due = "SELECT count(*) FROM outbox_message WHERE consumer = 'outbox.fan_out' AND due_at < now()"
    more = "attempts, dispatches, created_at, errors, reason"
    letter = f"INSERT INTO dead_letter (message_id, {columns}, {more}) VALUES ({values}, 1, 1, now(), '[]', '')"
    for role, first, last in (
        (
            roles.app,
            f"INSERT INTO outbox_message (id, {columns}) VALUES ({values})",
            "UPDATE outbox_message SET state = 'completed', completed_at = now()",
        ),
        (roles.relay, letter, "UPDATE dead_letter SET resolution = 'discarded'"),
    ):
        psql(roles.app, f"{waiting}; {first}")
        assert _said(roles, due) == "0"
        psql(role, f"{last} WHERE headers ? 'then'")
        assert _said(roles, due) == "1"
        psql(role, "DELETE FROM outbox_message")


def test_publishing_from_sql_takes_the_right_to_insert(roles: Roles) -> None:
    """And nothing more for one that has no order."""
    call = "SELECT outbox_publish('deploy.happened', '{}', 'deploy'"
    other = _said(roles, "SELECT current_database() || '_relay'")  # as a role of another service would be
    psql(roles.migrator, f'REVOKE ALL ON outbox_message FROM "{other}"; GRANT INSERT ON outbox_message TO "{other}"')
    for role, statement in (
        (roles.relay, f"{call})"),
        (roles.app, f"{call})"),
        (roles.app, f"{call}, order_key => 'a')"),
    ):
        psql(role, statement)
    psql(roles.migrator, f'REVOKE INSERT ON outbox_message FROM "{other}"')
    with pytest.raises(ServerError, match="permission denied for table outbox_message"):
        psql(roles.relay, f"{call})")
    definer = "RETURNS uuid SECURITY DEFINER SET search_path = public, pg_temp LANGUAGE sql"
    psql(roles.migrator, f"CREATE FUNCTION tell() {definer} AS $${call})$$")
    psql(roles.relay, "SELECT tell()")
    assert _said(roles, "SELECT count(*), count(position) FROM outbox_message") == "4|1"


async def test_the_relay_may_collect_every_part_of_its_metrics(roles: Roles, settings: Settings) -> None:
    parts = {"ledger", "counts", "broker"}
    async with watched(limited := _settings(settings, roles.relay)):
        page = await shows(limited, lambda page: page.values("outbox_collected_timestamp_seconds", "part") == parts)
    assert page("outbox_relays") == 1


REFUSED = [
    ("app", "CREATE TABLE mine ()"),
    ("app", "CREATE TEMPORARY TABLE mine ()"),
    ("app", "DROP TABLE effect"),
    ("app", "TRUNCATE effect"),
    ("app", "UPDATE outbox_message SET payload = '{}'"),
    ("app", "UPDATE outbox_message SET dispatches = 0"),
    ("app", "UPDATE dead_letter SET resolution = 'discarded'"),
    ("app", "DELETE FROM dead_letter"),
    ("app", "DELETE FROM accepted_event"),
    ("app", "UPDATE idempotency_key SET body = ''"),
    ("app", "DELETE FROM paused_queue"),
    ("app", "UPDATE limited_queue SET concurrency = 9"),
    ("app", "DELETE FROM outbox_minute"),
    ("app", "UPDATE outbox_process SET kind = 'relay'"),
    ("app", "UPDATE alembic_version SET version_num = ''"),
    ("app", "SELECT FROM outbox_erasure"),
    ("app", "SELECT FROM outbox_operation"),
    ("app", "UPDATE outbox_schedule SET paused_at = NULL"),
    ("relay", "CREATE TABLE mine ()"),
    ("relay", "SELECT FROM effect"),
    ("relay", "SELECT body FROM idempotency_key"),
    ("relay", "SELECT FROM accepted_event"),
    ("relay", "UPDATE outbox_message SET payload = '{}'"),
    ("relay", "UPDATE outbox_message SET claim_token = NULL"),
    ("relay", "UPDATE dead_letter SET payload = '{}'"),
    ("relay", "DELETE FROM dead_letter"),
    ("relay", "UPDATE dead_letter SET resolved_role = 'somebody'"),
    ("relay", "INSERT INTO dead_letter SELECT * FROM dead_letter"),
    ("relay", "INSERT INTO outbox_minute SELECT * FROM outbox_minute"),
    ("relay", "UPDATE outbox_minute SET count = 0"),
    ("relay", "INSERT INTO outbox_erasure (erased_by, why) VALUES ('', '')"),
    ("relay", "DELETE FROM outbox_erasure"),
    ("relay", "INSERT INTO outbox_operation (kind, asked_by, asked_role) VALUES ('pause', 'ann', 'bob')"),
    ("relay", "INSERT INTO outbox_operation (kind, asked_by, asked_at) VALUES ('pause', 'ann', now())"),
    ("relay", "UPDATE outbox_operation SET asked_by = 'bob'"),
    ("relay", "UPDATE outbox_operation SET why = 'so'"),
    ("relay", "UPDATE outbox_operation SET ids = '{}'"),
    ("viewer", "SELECT payload FROM outbox_message"),
    ("viewer", "SELECT * FROM outbox_message"),
    ("viewer", "SELECT message::text FROM outbox_message AS message"),
    ("viewer", "SELECT FROM outbox_message WHERE payload = '{}'"),
    ("viewer", "SELECT payload FROM dead_letter"),
    ("viewer", "SELECT * FROM dead_letter"),
    ("viewer", "UPDATE dead_letter SET resolution = 'discarded'"),
    ("viewer", "DELETE FROM outbox_message"),
    ("viewer", "SELECT outbox_publish('a.b', '{}', 'q')"),
    ("viewer", "INSERT INTO paused_queue (queue, paused_by) VALUES ('*', '')"),
    ("viewer", "DELETE FROM paused_queue"),
    ("viewer", "UPDATE outbox_operation SET state = 'stopped'"),
    ("viewer", "SELECT FROM effect"),
    ("viewer", "SELECT FROM idempotency_key"),
    ("viewer", "SELECT FROM accepted_event"),
    ("viewer", "CREATE TABLE mine ()"),
    ("relay", "UPDATE outbox_schedule SET payload = '{}'"),
    ("relay", "DELETE FROM outbox_schedule"),
]


def test_everything_else_is_refused(roles: Roles) -> None:
    for role, statement in REFUSED:
        with pytest.raises(ServerError, match=r"permission denied|must be owner"):
            psql(getattr(roles, role), statement)
            pytest.fail(f"{role} may {statement}")


_DIE = """
INSERT INTO dead_letter (message_id, event_id, event_type, version, consumer, queue, payload, headers, attempts,
    dispatches, created_at, errors, reason, resolution, resolved_at, resolved_by)
SELECT gen_random_uuid(), gen_random_uuid(), 'a.b', 1, 'c', 'q', '{{}}', '{{}}', 1, 1, now(), '[]', 'r', {}
"""
_OPEN = _DIE.format("NULL, NULL, NULL")
_RESOLVED = _DIE.format("'discarded', now(), 'ann'")


def test_a_resolved_dead_letter_stays_as_it_is(roles: Roles) -> None:
    psql(roles.app, _OPEN)
    psql(
        roles.relay, "UPDATE dead_letter SET resolution = 'discarded', resolved_at = '2001-01-01', resolved_by = 'ann'"
    )
    record = "SELECT resolved_by, resolved_role, resolved_at > died_at FROM dead_letter"
    relay = psql(roles.relay, "SELECT session_user")
    assert psql(roles.relay, record) == f"ann|{relay}|t"
    for role, statement in (
        ("relay", "UPDATE dead_letter SET resolved_by = 'bob'"),
        ("relay", "UPDATE dead_letter SET resolution = NULL, resolved_at = NULL"),
        ("app", _RESOLVED),
    ):
        with pytest.raises(ServerError, match="permission denied"):
            psql(getattr(roles, role), statement)
            pytest.fail(f"{role} may {statement}")
    assert psql(roles.relay, record) == f"ann|{relay}|t"
    psql(roles.migrator, "DELETE FROM dead_letter")
    psql(roles.migrator, _RESOLVED)


async def test_the_relays_role_edits_stops_and_goes_on(roles: Roles) -> None:
    psql(roles.app, _OPEN)
    psql(roles.app, _OPEN)
    connection = await asyncpg.connect(roles.relay)
    await read_json(connection)
    edited = await editing.replace(connection, 1, {"a": 1}, 1, fields=["a"], by="ann", why="a test")
    assert isinstance(edited, editing.Edited)
    await operations.record(connection, "reveal", {"dead_letter": 1}, by="ann", why="a test")
    number = await operations.plan(connection, "replay", [2], about={}, by="ann", why=None)
    assert await operations.take(connection, number, by="ann")
    assert await operations.stop(connection, number, by="bob")
    runner = await operations.take(connection, number, by="bob", rate=5)
    assert runner is not None
    assert (await carry_out(connection, number, runner)).done == [2]
    kinds = [each.kind for each in await audit.acts(connection, audit.AuditFilter(), 10)]
    assert kinds == ["resume", "stop", "replay", "reveal", "edit"]
    await connection.close()


def test_what_somebody_did_stays_on_record(roles: Roles) -> None:
    act = "INSERT INTO outbox_operation (kind, asked_by, state) VALUES ('replay', 'ann', '{}')"
    for state in ("planned", "running", "stopped", "finished"):
        psql(roles.relay, act.format(state))
    for statement in (
        "UPDATE outbox_operation SET done = 7 WHERE state = 'finished'",
        "UPDATE outbox_operation SET state = 'planned' WHERE state = 'finished'",
        *(f"DELETE FROM outbox_operation WHERE state = '{each}'" for each in ("running", "stopped", "finished")),
    ):
        with pytest.raises(ServerError, match="permission denied"):
            psql(roles.relay, statement)
            pytest.fail(f"the relay may {statement}")
    psql(roles.relay, "UPDATE outbox_operation SET done = 7 WHERE state = 'stopped'")
    psql(roles.relay, "DELETE FROM outbox_operation WHERE state = 'planned'")
    assert psql(roles.relay, "SELECT DISTINCT asked_role FROM outbox_operation") == psql(
        roles.relay, "SELECT session_user"
    )


def test_the_migrator_runs_it_before_somebody_made_the_viewer(roles: Roles) -> None:
    """As a deploy does on a database whose roles are from before there was one."""
    migrator, viewer = (psql(url, "SELECT quote_ident(session_user)") for url in (roles.migrator, roles.viewer))
    psql(roles.superuser, f"DROP OWNED BY {viewer}")
    psql(roles.superuser, f"DROP ROLE {viewer}")
    database = psql(roles.superuser, "SELECT quote_ident(current_database())")
    psql(roles.superuser, f"ALTER DATABASE {database} OWNER TO {migrator}")
    apply_roles(roles.migrator)
    assert psql(roles.app, "SELECT count(*) FROM outbox_message") == "0"
    assert psql(roles.superuser, f"SELECT to_regrole('{viewer}') IS NULL") == "t"
    apply_roles(roles.superuser)
    assert psql(roles.viewer, "SELECT count(id) FROM outbox_message") == "0"


def test_nobody_may_anything_until_the_second_run(empty_database: Roles) -> None:
    apply_roles(empty_database.admin)
    migrate(empty_database.migrator)
    psql(empty_database.migrator, _OPEN)
    for role in (empty_database.app, empty_database.relay):
        for statement in (
            "SELECT FROM outbox_message",
            "DELETE FROM dead_letter",
            "UPDATE alembic_version SET version_num = ''",
        ):
            with pytest.raises(ServerError, match="permission denied"):
                psql(role, statement)


def test_no_right_is_enough_to_delete_dead_letters(roles: Roles) -> None:
    psql(roles.app, _OPEN)
    psql(roles.migrator, "GRANT ALL ON dead_letter TO PUBLIC")
    for role in (roles.app, roles.relay):
        with pytest.raises(ServerError, match="permission denied"):
            psql(role, "DELETE FROM dead_letter")


def test_a_database_whose_name_needs_quotes(awkwardly_named_database: Roles) -> None:
    apply_roles(awkwardly_named_database.admin)
    migrate(awkwardly_named_database.migrator)
    apply_roles(awkwardly_named_database.admin)
    assert psql(awkwardly_named_database.app, "SELECT count(*) FROM outbox_message") == "0"


def test_a_name_too_long_for_its_roles_is_refused(servers: Where) -> None:
    name = "long_" + "x" * 50
    psql(servers.postgres, f"CREATE DATABASE {name}")
    try:
        with pytest.raises(AssertionError, match="54 bytes"):
            apply_roles(servers.postgres.replace("/postgres?", f"/{name}?"))
    finally:
        psql(servers.postgres, f"DROP DATABASE {name}")


def test_a_database_of_one_role_is_converted(migrated_database: Roles) -> None:
    for _ in range(2):
        apply_roles(migrated_database.superuser)
    psql(migrated_database.migrator, "ALTER TABLE outbox_message ADD COLUMN later int")
    with pytest.raises(ServerError, match="must be owner"):
        psql(migrated_database.app, "ALTER TABLE outbox_message DROP COLUMN later")
    assert psql(migrated_database.app, "SELECT count(*) FROM outbox_message") == "0"

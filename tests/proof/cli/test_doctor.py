"""`outbox doctor` finds each sickness that was made for real, names its cure, and finds a healthy set-up healthy."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
import redis
from pydantic import SecretStr

from relay.cli.doctor import database
from relay.cli.doctor.outside import check_encryption
from service.dev.places import postgres_binaries, server_account
from service.dev.postgres import Postgres, psql
from service.dev.servers import free_port
from service.dev.valkey import Valkey
from service.ledger import diagnosis
from tests.proof.connections.conftest import certificates
from tests.proof.connections.namespace import Namespace
from tests.proof.ledger.pooling import needs_pgbouncer, pgbouncer
from tests.servers.real_servers import copy_of
from tests.servers.standby import Standby
from tests.service.deploy.conftest import Roles, apply_roles, empty_database, roles
from tests.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from service.settings import Settings
    from tests.proof.cli.conftest import Outbox, Rows
    from tests.proof.connections.certificates import Certificates
    from tests.servers.real_servers import Where

    Found = tuple[str, str, str]
    Examine = Callable[[str], list[Found]]
    Start = Callable[[Sequence[str]], subprocess.Popen[str]]

pytestmark = pytest.mark.slow

__all__ = ["certificates", "empty_database", "roles"]


@pytest.fixture
def examine(outbox: Outbox) -> Examine:
    """What the doctor finds in one check, as (level, seen, cure)."""

    def examine(check: str) -> list[Found]:
        ran = outbox("doctor", "--json")
        assert ran.code == (1 if ran.json["problems"] else 0), ran.err
        return [(each["level"], each["seen"], each["cure"]) for each in ran.json["findings"] if each["check"] == check]

    return examine


def test_a_healthy_setup_has_nothing_wrong(
    outbox: Outbox,
    start: Start,
    servers: Where,
    server_folder: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = copy_of(Path(servers.seed), server_folder / "postgres")
    with Postgres(data) as postgres, Valkey(server_folder / "valkey", persistent=True) as valkey:
        apply_roles(postgres.url("service"))
        postgres.sql("GRANT pg_read_all_stats TO service_relay, service_app", "service")
        urls = {
            "DATABASE__URL": postgres.url("service").replace("postgres@", "service_relay@"),
            "BROKER__URL": valkey.url,
        }
        for key, value in urls.items():
            monkeypatch.setenv(key, value)
        environment |= urls
        relay = start(["relay"])
        until_sync(lambda: "relays: 1, worker" in outbox("doctor").out)
        ran = outbox("doctor", "--strict")
        assert ran.code == 0, ran.out
        assert ran.out.endswith("0 problems, 0 pieces of advice.\n")
        assert {each.split()[0] for each in ran.out.splitlines()[:-2] if each[0] != " "} == {"ok"}
        monkeypatch.setenv("DATABASE__URL", postgres.url("service").replace("postgres@", "service_app@"))
        of_workers = outbox("doctor", "--strict")
        assert of_workers.code == 0, of_workers.out
        assert "unknown  queues" in of_workers.out
        relay.terminate()
        relay.wait(60)


def test_it_says_what_to_do_within_80_columns(outbox: Outbox, rows: Rows) -> None:
    rows.message(3, queue="repeat('q', 90)", due_at="now() - interval '400 s'")
    ran = outbox("doctor")
    assert ran.code == 1
    assert max(map(len, ran.out.splitlines())) <= 80
    assert re.search(r"problem  settings +fsync = off: .*\n(?: .*\n)* +-> ALTER SYSTEM SET fsync = on\n", ran.out)


def test_advice_fails_only_when_told_to(
    outbox: Outbox, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.cli.doctor.database.check_database", _nothing)
    monkeypatch.setattr("relay.cli.doctor.outside.check_broker_and_queues", _nothing)
    monkeypatch.setenv("SMTP__URL", "smtp://mail.example:25")
    assert outbox("doctor").code == 0
    assert outbox("doctor", "--strict").code == 1


async def _nothing(_settings: Settings) -> list[object]:
    return []


@pytest.mark.parametrize(
    ("change", "level", "seen"),
    [
        ("DELETE FROM alembic_version WHERE version_num LIKE 'ledger%'", "problem", "missing: ledger_"),
        ("DELETE FROM alembic_version WHERE version_num LIKE 'domains%'", "problem", "missing: domains_"),
        ("DROP TABLE alembic_version", "problem", "none"),
        ("UPDATE alembic_version SET version_num = 'later' WHERE version_num LIKE 'ledger%'", "advice", "newer"),
    ],
)
def test_migrations(examine: Examine, rows: Rows, change: str, level: str, seen: str) -> None:
    rows.sql(change)
    [(found, what, cure)] = examine("migrations")
    assert (found, seen in what) == (level, True), what
    assert ("alembic upgrade heads" in cure) == (level == "problem")


def test_a_right_that_is_missing(examine: Examine, roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    for role, work in (("relay", "relay and commands"), ("app", "API and workers")):
        monkeypatch.setenv("DATABASE__URL", getattr(roles, role))
        assert examine("rights") == [("ok", f"those of {work}", "")]
        psql(roles.migrator, f'REVOKE UPDATE (state) ON outbox_message FROM "{_role(roles, role)}"')
        [(level, seen, cure)] = examine("rights")
        assert (level, seen) == ("problem", f"lacks for {work}: UPDATE (state) on outbox_message")
        assert "roles.sql" in cure


def _role(roles: Roles, role: str) -> str:
    return psql(getattr(roles, role), "SELECT session_user")


def test_rights_that_nobody_needs(examine: Examine, roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE__URL", roles.superuser)
    [(level, seen, cure)] = examine("rights")
    assert level == "advice"
    assert "SUPERUSER" in seen
    assert "roles.sql" in cure
    psql(roles.migrator, f'GRANT UPDATE (payload) ON outbox_message TO "{_role(roles, "relay")}"')
    monkeypatch.setenv("DATABASE__URL", roles.relay)
    assert [seen for _, seen, _ in examine("rights")] == ["more than any process needs: UPDATE (payload)"]


def test_the_rights_are_those_that_the_roles_have(roles: Roles) -> None:
    granted = """
    WITH tables AS (SELECT oid, relname, relacl FROM pg_class WHERE relkind = 'r' AND relname = ANY ('{{{1}}}'))
    SELECT relname, privilege_type, '*' FROM tables, aclexplode(relacl) WHERE grantee = '{0}'::regrole
    UNION ALL
    SELECT relname, privilege_type, attname FROM tables JOIN pg_attribute ON oid = attrelid, aclexplode(attacl)
    WHERE grantee = '{0}'::regrole
    """
    tables = ",".join({table for needs in diagnosis.RIGHTS.values() for table, _, _ in needs})
    for role, work in (("app", "API and workers"), ("relay", "relay and commands")):
        rows = psql(roles.superuser, granted.format(f'"{_role(roles, role)}"', tables)).splitlines()
        needed = {
            f"{table}|{right}|{column}"
            for table, rights, columns in diagnosis.RIGHTS[work]
            for right in rights.split()
            for column in columns.split()
        }
        assert set(rows) == needed


def test_what_it_may_not_see_it_says_and_goes_on(
    examine: Examine, outbox: Outbox, roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    psql(roles.migrator, f'REVOKE SELECT ON alembic_version FROM "{_role(roles, "relay")}"')
    monkeypatch.setenv("DATABASE__URL", roles.relay)
    [(level, seen, _)] = examine("migrations")
    assert (level, "permission denied" in seen) == ("unknown", True)
    [(level, seen, cure)] = examine("transactions")
    assert (level, "pg_read_all_stats" in cure) == ("unknown", True)
    assert examine("autovacuum")[0][0] == "ok"


@pytest.mark.parametrize(
    ("change", "level", "setting"),
    [
        ("ALTER DATABASE {0} SET statement_timeout = '100ms'", "problem", "statement_timeout = 100ms"),
        ("ALTER DATABASE {0} SET lock_timeout = 1500", "problem", "lock_timeout = 1500"),
        ("ALTER ROLE postgres IN DATABASE {0} SET statement_timeout = '20s'", "advice", "statement_timeout = 20s"),
        ("ALTER ROLE postgres IN DATABASE {0} SET synchronous_commit = off", "problem", "synchronous_commit = off"),
        ("ALTER DATABASE {0} SET default_transaction_read_only = on", "problem", "default_transaction_read_only = on"),
    ],
)
def test_a_setting_of_role_or_database_that_hurts(
    examine: Examine,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    level: str,
    setting: str,
) -> None:
    monkeypatch.setenv("OUTBOX__TIME_LIMIT", "60000")
    rows.sql(change.format(rows.sql("SELECT quote_ident(current_database())")))
    [(found, _, cure)] = [each for each in examine("settings") if each[1].startswith(f"{setting}: ")]
    assert found == level
    rows.sql(f"BEGIN READ WRITE; {cure}; COMMIT")
    assert cure not in {cure for _, _, cure in examine("settings")}


def test_a_long_enough_timeout_is_in_order(examine: Examine, rows: Rows) -> None:
    rows.sql(f"ALTER DATABASE {rows.sql('SELECT quote_ident(current_database())')} SET statement_timeout = '2min'")
    assert not [seen for _, seen, _ in examine("settings") if "statement_timeout" in seen]


def test_another_roles_settings_are_seen_if_it_writes_to_the_ledger(
    examine: Examine, roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, bystander = _role(roles, "app"), f"bystander_{uuid4().hex[:8]}"
    psql(roles.superuser, f"CREATE ROLE {bystander} LOGIN")
    try:
        for role in (app, bystander):
            psql(roles.superuser, f'ALTER ROLE "{role}" SET statement_timeout = 10')
        monkeypatch.setenv("DATABASE__URL", roles.relay)
        cures = [cure for _, seen, cure in examine("settings") if "statement_timeout" in seen]
        assert cures == [f"ALTER ROLE {app} RESET statement_timeout"]
    finally:
        psql(roles.superuser, f"DROP ROLE {bystander}")


def test_switches_that_nobody_should_touch(examine: Examine) -> None:
    cures = {cure for level, _, cure in examine("settings") if level == "problem"}
    assert cures >= {f"ALTER SYSTEM SET {each} = on" for each in ("fsync", "full_page_writes", "synchronous_commit")}


def test_too_few_connections(examine: Examine, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine("connections")[0][0] == "ok"
    monkeypatch.setenv("DATABASE__POOL_SIZE", "93")
    with _sessions(rows, 3, "SELECT 1"):
        [(level, seen, _)] = examine("connections")
        assert (level, "takes 195" in seen) == ("advice", True)
    monkeypatch.setenv("DATABASE__POOL_SIZE", "10")
    rows.sql(f"ALTER DATABASE {rows.sql('SELECT quote_ident(current_database())')} CONNECTION LIMIT 28")
    [(level, seen, cure)] = examine("connections")
    assert (level, seen.startswith("28 allowed")) == ("problem", True)
    assert "CONNECTION LIMIT" in cure


@contextmanager
def _sessions(rows: Rows, count: int, statement: str) -> Iterator[None]:
    """So many sessions that run this in a transaction and then wait."""
    mark = f"doctor-{uuid4().hex[:8]}"
    command = [str(postgres_binaries() / "psql"), "-Xq", rows._url + f"&application_name={mark}", "-c"]
    processes = [
        subprocess.Popen([*command, f"BEGIN; {statement}; SELECT pg_sleep(300)"], stdout=subprocess.DEVNULL)
        for _ in range(count)
    ]
    sleeping = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{mark}' AND wait_event = 'PgSleep'"
    try:
        until_sync(lambda: rows.sql(sleeping) == str(count))
        yield
    finally:
        rows.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '{mark}'")
        for process in processes:
            process.wait(60)


def test_an_old_transaction(examine: Examine, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    with _sessions(rows, 1, "SELECT txid_current()"):
        assert examine("transactions") == [("ok", "none is old", "")]
        monkeypatch.setattr(database, "OLD_TRANSACTION", timedelta(0))
        [(level, _, cure)] = [each for each in examine("transactions") if "doctor-" in each[1]]
        assert level == "advice"
        rows.sql(f"SELECT {cure.removeprefix('to end it: ')}")
        assert not [seen for _, seen, _ in examine("transactions") if "doctor-" in seen]


def test_a_prepared_transaction(examine: Examine, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "OLD_TRANSACTION", timedelta(0))
    rows.sql("BEGIN; SELECT txid_current(); PREPARE TRANSACTION 'left ''behind'")
    cures = [cure.removeprefix("to end it: ") for _, _, cure in examine("transactions") if "PREPARED" in cure]
    rows.sql("ROLLBACK PREPARED 'left ''behind'")  # with it, nobody could remove the database
    assert cures == ["ROLLBACK PREPARED 'left ''behind'"]
    assert not [cure for _, _, cure in examine("transactions") if "PREPARED" in cure]


def test_a_replication_slot_without_reader(examine: Examine, rows: Rows) -> None:
    name = f"doctor_{uuid4().hex[:8]}"
    rows.sql(f"SELECT pg_create_physical_replication_slot('{name}', true)")
    try:
        [(level, _, cure)] = [each for each in examine("replication") if name in each[1]]
        assert (level, cure) == ("advice", f"start its reader, or pg_drop_replication_slot('{name}')")
    finally:
        rows.sql(f"SELECT pg_drop_replication_slot('{name}')")
    assert not [seen for _, seen, _ in examine("replication") if name in seen]


def test_autovacuum(examine: Examine, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine("autovacuum") == [("ok", "keeps up with the ledger", "")]
    rows.sql("ALTER TABLE outbox_message SET (autovacuum_enabled = off)")
    [(level, seen, cure)] = examine("autovacuum")
    assert (level, seen.partition(":")[0]) == ("problem", "off")
    rows.sql(cure)
    assert examine("autovacuum")[0][0] == "ok"
    rows.sql("ALTER TABLE outbox_message SET (autovacuum_vacuum_threshold = 1000000000)")
    rows.message(2_000)
    rows.sql("DELETE FROM outbox_message")
    monkeypatch.setattr(database, "MANY_DEAD_ROWS", 1_000)
    until_sync(lambda: examine("autovacuum")[0][0] == "advice")
    [(_, seen, cure)] = examine("autovacuum")
    assert "dead: outbox_message has 0 rows, 2,000 dead" in seen
    rows.sql(cure)
    monkeypatch.setattr(database, "MANY_PAGES", 10)
    until_sync(lambda: examine("autovacuum")[0][1].startswith("empty"))
    rows.sql(examine("autovacuum")[0][2])
    assert examine("autovacuum")[0][0] == "ok"


def test_an_old_server(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "OLDEST_VERSION", 99)
    [(level, _, cure)] = examine("postgresql")
    assert (level, cure) == ("problem", "upgrade it to 99 or newer")


@pytest.mark.parametrize("off", [-90, 90])
def test_a_clock_that_is_wrong(examine: Examine, monkeypatch: pytest.MonkeyPatch, off: int) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + off)
    [(level, seen, cure)] = examine("clock")
    assert (level, "90 s apart" in seen, "NTP" in cure) == ("advice", True, True)


@pytest.mark.slow
def test_a_standby(examine: Examine, servers: Where, server_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = copy_of(Path(servers.seed), server_folder / "primary")
    with (
        Postgres(data, durable=False, tcp=True) as primary,
        Standby(primary, server_folder / "standby") as standby,
    ):
        monkeypatch.setenv("DATABASE__URL", standby.url("service"))
        [(level, seen, cure)] = examine("postgresql")
        assert (level, seen.endswith("it only reads"), "primary" in cure) == ("problem", True, True)
        assert examine("migrations")[0][0] == "ok"


@contextmanager
def _over_a_network(servers: Where, folder: Path, **settings: str) -> Iterator[Postgres]:
    """A PostgreSQL at 192.0.2.1, in a network that has nobody else."""
    data = copy_of(Path(servers.seed), folder / "postgres")
    with data.joinpath("pg_hba.conf").open("a") as rules:
        rules.write("host all all 192.0.2.1/32 trust\n")
    namespace = Namespace()
    with namespace.entered():
        namespace._run("ip", "address", "add", "192.0.2.1/32", "dev", "lo")
        with Postgres(data, durable=False, settings={"listen_addresses": "192.0.2.1", **settings}) as postgres:
            yield postgres


@pytest.mark.slow
def test_a_network_without_encryption(
    examine: Examine, servers: Where, server_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert examine("tls postgresql") == [("ok", "not encrypted, on one machine", "")]
    with _over_a_network(servers, server_folder) as postgres:
        monkeypatch.setenv("DATABASE__URL", f"postgresql://postgres@192.0.2.1:{postgres.port}/service")
        [(level, seen, cure)] = examine("tls postgresql")
    assert (level, seen) == ("advice", "not encrypted, over a network")
    assert "verify-full" in cure


@pytest.mark.slow
def test_encryption_that_trusts_whoever_answers(
    examine: Examine,
    servers: Where,
    server_folder: Path,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if psql(servers.postgres, "SHOW ssl_library") != "OpenSSL":
        pytest.skip("NOT TESTED: this PostgreSQL has no TLS; TEST_POSTGRES_BIN names another one")
    names = {"ssl_cert_file": "right.crt", "ssl_key_file": "right.key"}
    for name in names.values():
        copied = Path(shutil.copy(certificates.folder / name, server_folder))
        copied.chmod(0o600)
        if (account := server_account()) is not None:
            shutil.chown(copied, account.name)
    files = {key: str(server_folder / name) for key, name in names.items()}
    with _over_a_network(servers, server_folder, ssl="on", **files) as postgres:
        url = f"postgresql://postgres@192.0.2.1:{postgres.port}/service?sslmode="
        for mode, expected in (("require", "advice"), (f"verify-full&sslrootcert={certificates.ca}", "ok")):
            monkeypatch.setenv("DATABASE__URL", url + mode)
            [(level, seen, cure)] = examine("tls postgresql")
            assert (level, seen[:5], "verify-full" in cure) == (expected, "TLSv1", level == "advice")


@pytest.mark.parametrize(
    ("url", "level"),
    [
        ("redis://cache.example:6379/0", "advice"),
        ("amqp://u:geheim@mq.example/", "advice"),
        ("rediss://cache.example:6379/0?ssl_cert_reqs=none", "advice"),
        ("rediss://cache.example:6379/0", "ok"),
        ("amqps://u:geheim@mq.example/", "ok"),
        ("redis://[::1]:6379/0", "ok"),
        ("unix:///run/valkey.sock", "ok"),
    ],
)
def test_a_broker_by_its_url(settings: Settings, url: str, level: str) -> None:
    settings.broker.url = SecretStr(url)
    [found] = [each for each in check_encryption(settings) if each.check == "tls broker"]
    assert found.level == level
    assert "geheim" not in repr(found)


@pytest.mark.parametrize(
    ("url", "level"),
    [
        ("smtp://mail.example:25", "advice"),
        ("smtp://u:geheim@mail.example:25", "ok"),
        ("smtp+starttls://mail.example:587", "ok"),
        ("smtp://127.0.0.1:1025", "ok"),
    ],
)
def test_a_mail_server_by_its_url(settings: Settings, url: str, level: str) -> None:
    settings.smtp.url = SecretStr(url)
    [found] = [each for each in check_encryption(settings) if each.check == "tls smtp"]
    assert found.level == level


def test_valkey(examine: Examine, own_valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER__URL", own_valkey.url)
    with redis.Redis.from_url(own_valkey.url) as client:
        [(level, seen, cure)] = examine("broker")
        assert (level, "restart forgets" in seen, "appendonly yes" in cure) == ("advice", True, True)
        client.config_set("appendonly", "yes")
        assert examine("broker")[0][0] == "ok"
        for policy, expected in (("allkeys-lru", "problem"), ("volatile-ttl", "advice")):
            client.config_set("maxmemory-policy", policy)
            [(level, seen, cure)] = examine("broker")
            assert (level, policy in seen, "noeviction" in cure) == (expected, True, True)
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", int(client.info()["used_memory"] * 1.1))
        [(level, _, cure)] = examine("broker")
        assert (level, "raise maxmemory" in cure) == ("advice", True)
        client.config_set("maxmemory", 0)
        client.execute_command("ACL SETUSER default -info")
        assert examine("broker")[0][0] == "unknown"


def test_queues_that_wait(examine: Examine, rows: Rows) -> None:
    assert [level for level, _, _ in examine("queues")] == ["advice"]  # there is no relay, and nothing to do
    rows.message(1, queue="'late'", due_at="now() - interval '400 s'")
    rows.message(1, queue="'paused'", due_at="now() - interval '400 s'")
    rows.sql("INSERT INTO paused_queue (queue, paused_by) VALUES ('paused', 'me')")
    rows.message(1, queue="'limited'", due_at="now() - interval '400 s'")
    rows.sql("INSERT INTO limited_queue (queue, concurrency, limited_by) VALUES ('limited', 1, 'me')")
    rows.message(2, queue="'lonely'", state="'dispatched'", dispatches="3", due_at="now() + interval '1 hour'")
    found = examine("queues")
    assert [level for level, _, _ in found] == ["problem"] * 3
    assert "outbox relay" in found[0][2]
    assert "something in late has been due for 7m" in found[1][1]
    assert found[2][1:] == (
        "no worker takes what is in lonely",
        "start one: dramatiq service.worker:setup_broker -Q lonely",
    )


@pytest.mark.parametrize("broker", ["redis://:geheim@127.0.0.1:{}/0", "amqp://someone:geheim@127.0.0.1:{}/"])
def test_servers_that_are_away(outbox: Outbox, monkeypatch: pytest.MonkeyPatch, broker: str) -> None:
    monkeypatch.setenv("DATABASE__URL", f"postgresql://someone:geheim@127.0.0.1:{free_port()}/service")
    monkeypatch.setenv("BROKER__URL", broker.format(free_port()))
    began = time.monotonic()
    ran = outbox("doctor")
    assert ran.code == 1
    assert time.monotonic() - began < 60
    assert "geheim" not in ran.out + ran.err
    assert "cannot reach PostgreSQL" in ran.out
    assert "cannot use the broker" in ran.out
    assert [each.split()[:2] for each in ran.out.splitlines() if each.startswith("problem")] == [
        ["problem", "postgresql"],
        ["problem", "broker"],
    ]


def test_one_server_that_is_away_hides_nothing_of_the_other(
    examine: Examine, monkeypatch: pytest.MonkeyPatch, broker_url: str
) -> None:
    with monkeypatch.context() as away:
        away.setenv("BROKER__URL", f"redis://127.0.0.1:{free_port()}/0")
        assert examine("migrations")[0][0] == "ok"
    monkeypatch.setenv("DATABASE__URL", f"postgresql://postgres@127.0.0.1:{free_port()}/service")
    assert "restart" in examine("broker")[0][1]


@pytest.mark.parametrize("told", [False, True])
@needs_pgbouncer
@pytest.mark.slow
def test_behind_a_pooler(
    examine: Examine,
    servers: Where,
    server_folder: Path,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    told: bool,
) -> None:
    with pgbouncer(server_folder, database_url) as url:
        monkeypatch.setenv("DATABASE__URL", url)
        monkeypatch.setenv("DATABASE__POOLER", str(told).lower())
        [(level, seen, cure)] = examine("postgresql")
        assert "through a pooler" in seen
        assert (level, "the relay needs a URL" in cure) == (("ok", False) if told else ("problem", True))
        for check in ("migrations", "connections", "transactions", "replication", "autovacuum", "clock"):
            assert examine(check)[0][0] == "ok", check


def test_processes_that_are_well(examine: Examine, rows: Rows) -> None:
    [(level, seen, _)] = examine("processes")
    assert (level, "none has reported" in seen) == ("unknown", True)
    _process(rows, "relay", "1f3a")
    _process(rows, "worker", "1f3a", "{stock,email}")
    _process(rows, "worker", "0aaa", seen="now() - interval '46 s'")
    assert examine("processes") == [("ok", "relays: 1, worker processes: 1, all of 1f3a", "")]
    rows.message(1, queue="'stock'")
    assert not [seen for _, seen, _ in examine("queues") if "no worker" in seen]


def _process(rows: Rows, kind: str, version: str, queues: str = "{}", seen: str = "now()") -> None:
    rows.sql(
        "INSERT INTO outbox_process (id, kind, host, pid, queues, threads, version, seen_at) "
        f"VALUES (gen_random_uuid(), '{kind}', 'a-host', 7, '{queues}', 8, '{version}', {seen})"
    )


def test_versions_that_run_side_by_side(examine: Examine, rows: Rows) -> None:
    for version in ("1f3a", "1f3a", "2b4c"):
        _process(rows, "worker", version)
    _process(rows, "relay", "")
    [(level, seen, cure)] = examine("processes")
    assert (level, "deploy" in cure) == ("advice", True)
    assert seen == "versions side by side: 1f3a (2 workers), 2b4c (1 worker), unnamed (1 relay)"


def test_a_relay_that_hangs(examine: Examine, rows: Rows, start: Start) -> None:
    _process(rows, "worker", "", seen="now() + interval '1 hour'")
    relay = start(["relay"])
    until_sync(lambda: examine("processes") == [("ok", "relays: 1, worker processes: 1", "")])
    relay.send_signal(signal.SIGSTOP)
    rows.sql("UPDATE outbox_process SET seen_at = now() - interval '1 minute' WHERE kind = 'relay'")
    [(level, seen, cure)] = examine("processes")
    assert (level, seen) == ("advice", "relays: 1 connected, 0 reported within 45 s")
    assert "restart" in cure


def test_a_queue_that_no_worker_process_takes_from(examine: Examine, rows: Rows) -> None:
    for queue in ("stock", "email", "paused", "done"):
        rows.message(1, queue=f"'{queue}'", state="'completed'" if queue == "done" else "'pending'")
    rows.sql("INSERT INTO paused_queue (queue, paused_by) VALUES ('paused', 'me')")

    def unserved() -> list[str]:
        return [cure for level, seen, cure in examine("queues") if seen.startswith("no worker takes")]

    assert unserved() == [], "of a version that does not report, perhaps"
    _process(rows, "worker", "1f3a", "{email}")
    assert unserved() == ["start one: dramatiq service.worker:setup_broker -Q stock"]
    rows.sql("UPDATE outbox_process SET seen_at = now() - interval '1 minute'")
    _process(rows, "relay", "1f3a")
    assert [cure.rpartition(" ")[2] for cure in unserved()] == ["email", "stock"]
    rows.sql("INSERT INTO paused_queue (queue, paused_by) VALUES ('*', 'me')")
    assert unserved() == []

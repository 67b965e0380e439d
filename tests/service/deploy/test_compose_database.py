"""What `compose.yaml` does with its database, on a PostgreSQL that asks for passwords as that of the image does."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest
from redis import Redis
from redis.exceptions import RedisError

from service.dev.places import ROOT, postgres_binaries, scratch, valkey_binary
from service.dev.postgres import Postgres
from service.dev.servers import new_password
from tests.servers.real_servers import outside_environment
from tests.service.deploy.compose import parsed, whole
from tests.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow


class Host:
    """The files and the environment that each container has, with this machine's paths and ports."""

    def __init__(self, folder: Path, postgres: Postgres) -> None:
        self.folder = folder
        self.postgres = postgres
        self.passwords = {name: new_password() for name in whole()["secrets"]}

    def environment(self, service: str) -> dict[str, str]:
        """What `compose.yaml` sets, but for the `.env`."""
        given = parsed()[service].get("environment", {})
        address = f"127.0.0.1:{self.postgres.port}"
        moved = {key: value.replace("postgres:5432", address) for key, value in given.items() if "${" not in value}
        return outside_environment() | moved | {"SECRETS_DIR": str(self.secrets(service)), "ENV_FILE": ""}

    def secrets(self, service: str) -> Path:
        """The folder that it sees as `/run/secrets`."""
        mounted = self.folder / service
        mounted.mkdir(exist_ok=True)
        for each in parsed()[service].get("secrets", ()):
            long = each if isinstance(each, dict) else {"source": each, "target": each}
            (mounted / long["target"]).write_text(self.passwords[long["source"]] + "\n")
        return mounted

    def shell(self, service: str, script: str, **environment: str) -> str:
        """Run a script of its image, with PostgreSQL's programs, and return what it says."""
        moved = script.replace("$$", "$").replace("/run/secrets", str(self.secrets(service)))
        moved = moved.replace("/roles.sql", str(ROOT / "migrations" / "roles.sql"))
        path = f"{postgres_binaries()}:{os.environ['PATH']}"
        given = self.environment(service) | environment | {"PATH": path}
        done = subprocess.run(["sh", "-c", moved], env=given, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def initialise(self) -> str:
        """What the image runs when it makes the database, as the superuser on the socket."""
        sockets = self.postgres.socket_url().partition("host=")[2].partition("&")[0]
        script = (ROOT / "migrations" / "roles.sh").read_text()
        own = {"POSTGRES_USER": "postgres", "POSTGRES_DB": "service"}
        return self.shell("postgres", script, PGHOST=sockets, PGPORT=f"{self.postgres.port}", **own)

    def migrate(self) -> None:
        """Both halves."""
        self.python("migrate", "-m", *parsed()["migrate"]["command"])
        [shell, option, script] = parsed()["rights"]["command"]
        assert (shell, option) == ("sh", "-c")
        self.shell("rights", script, PGHOST="127.0.0.1", PGPORT=f"{self.postgres.port}")

    def python(self, service: str, *command: str, check: bool = True) -> str:
        """Run a command with the environment of the service."""
        environment = self.environment(service) | {"BROKER__URL": "redis://127.0.0.1:1/0"}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def host() -> Iterator[Host]:
    """A server that has a database and nothing in it."""
    with scratch() as folder, Postgres(folder / "postgres", durable=False, tcp=True) as postgres:
        postgres.ensure_database("service")
        yield Host(folder, postgres)


def test_a_new_database_gets_its_roles_its_tables_and_their_rights(host: Host) -> None:
    assert host.initialise() == ""
    for _ in range(2):  # as every deploy does
        host.migrate()
    for service, work in (("api", "API and workers"), ("relay", "relay and commands")):
        said = host.python(service, "-m", "relay", "doctor", check=False)
        assert f"rights          those of {work}" in said, f"{service}: {said}"
    assert host.postgres.sql("SELECT count(*) FROM pg_roles WHERE rolsuper", "service") == "1"


def test_a_database_of_before_is_taken_over(host: Host) -> None:
    """One superuser owned everything."""
    owner = outside_environment() | {
        "DATABASE__URL": host.postgres.url("service"), "BROKER__URL": "redis://127.0.0.1:1/0"
    }  # fmt: skip
    subprocess.run([sys.executable, "-m", "alembic", "upgrade", "heads"], cwd=ROOT, env=owner, check=True)
    host.initialise()
    host.migrate()
    assert "rights          those of relay and commands" in host.python("relay", "-m", "relay", "doctor", check=False)


def test_a_password_that_was_changed_counts_after_the_script_ran_again(host: Host) -> None:
    host.initialise()
    host.migrate()
    old = host.passwords["relay_password"]
    host.passwords["relay_password"] = "with ' and \\ and :x"
    host.initialise()
    assert "as role service_relay" in host.python("relay", "-m", "relay", "doctor", check=False)
    host.passwords["relay_password"] = old
    assert "refuses user" in host.python("relay", "-m", "relay", "doctor", check=False)


def test_valkey_takes_its_password_from_the_file(tmp_path: Path) -> None:
    password = new_password()
    (tmp_path / "broker_password").write_text(password)
    socket = tmp_path / "socket"
    stub = tmp_path / "docker-entrypoint.sh"
    stub.write_text(f'#!/bin/sh\nshift\nexec {valkey_binary()} "$@" --port 0 --dir {tmp_path} --unixsocket {socket}\n')
    stub.chmod(0o755)
    [shell, option, script] = parsed()["valkey"]["command"]
    moved = script.replace("$$", "$").replace("/run/secrets", str(tmp_path))
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen([shell, option, moved], env=path, stdout=subprocess.DEVNULL) as server:
        try:
            until_sync(socket.exists)
            with Redis(unix_socket_path=str(socket), password=password) as client:
                assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert password not in " ".join(psutil.Process(server.pid).cmdline())
            with Redis(unix_socket_path=str(socket)) as nobody, pytest.raises(RedisError):
                nobody.ping()
        finally:
            server.kill()

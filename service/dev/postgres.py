"""An embedded PostgreSQL: a data directory, a postmaster, a URL."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psutil

from service.dev.places import ServerError, postgres_binaries, server_account
from service.dev.servers import STOP_TIMEOUT, Server, free_port, new_password

if TYPE_CHECKING:
    from collections.abc import Mapping

_SETTINGS = {
    "max_connections": "200",
    "max_prepared_transactions": "10",
    "shared_buffers": "256MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
# For data that may be lost with the machine. A killed PostgreSQL then still loses up to 0.6 s of commits: a test that
# kills it passes synchronous_commit=on.
_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class Postgres(Server):
    """PostgreSQL in `data_dir`, which is initialised at the first start.

    Args:
        data_dir: Its data; the log stands beside it.
        durable: `False` is faster and survives a crash of PostgreSQL, but not of the machine.
        settings: Further settings, such as `{"log_statement": "all"}`.
        tcp: Listen on a free loopback port with a password, beside the socket that only this account can reach.
    """

    name = "PostgreSQL"
    stop_signals = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT, "smart": signal.SIGTERM}  # noqa: RUF012

    def __init__(
        self, data_dir: Path, *, durable: bool = True, settings: Mapping[str, str] | None = None, tcp: bool = False
    ) -> None:
        super().__init__(data_dir)
        self.settings = {**_SETTINGS, **({} if durable else _NOT_DURABLE), **(settings or {})}
        self.port = 0 if tcp else 5432  # without TCP it is only part of the socket's name
        self._password = new_password() if tcp else None

    def url(self, database: str = "postgres") -> str:
        """`postgresql://` URL of a database, by TCP if this server listens on it."""
        if self._password is not None:
            return f"postgresql://postgres:{self._password}@127.0.0.1:{self.port}/{database}"
        return self.socket_url(database)

    def socket_url(self, database: str = "postgres") -> str:
        """`postgresql://` URL of a database by the Unix socket."""
        return f"postgresql://postgres@/{database}?host={quote(str(self._sockets_in()), safe='/')}&port={self.port}"

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Run a statement and return its rows, columns separated by `|`."""
        return psql(self.socket_url(database), statement)

    def ensure_database(self, database: str) -> str:
        """Create the database if it does not exist, and return its URL."""
        if not self.sql(f"SELECT 1 FROM pg_database WHERE datname = '{database}'"):  # noqa: S608  not from outside
            self.sql(f'CREATE DATABASE "{database}"')
        return self.url(database)

    def _launch(self) -> subprocess.Popen[bytes]:
        self.stop_stray()
        self._initialise()
        self.port = self.port or free_port()  # as late as may be, so that nobody takes it meanwhile
        sockets = self._sockets_in()
        command = [str(postgres_binaries() / "postgres"), "-D", str(self.data_dir), "-k", str(sockets)]
        command += ["-h", "127.0.0.1" if self._password else "", "-p", str(self.port)]
        for key, value in self.settings.items():
            command += ["-c", f"{key}={value}"]
        return self._run(command, **_identity())

    def _ready(self) -> bool:
        lines = self._pid_file()
        if len(lines) < 8 or lines[0] != str(self.pid) or lines[7] != "ready":
            return False
        if self._password is not None:
            self.sql(f"ALTER ROLE postgres PASSWORD '{self._password}'")
        return True

    def _initialise(self) -> None:
        version = self.data_dir / "PG_VERSION"
        if version.exists():
            self._check_version(version.read_text().strip())
            return
        fresh = self.data_dir.with_name(f"{self.data_dir.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700, parents=True)
        if (account := server_account()) is not None:
            os.chown(fresh, account.uid, account.gid)
        options = ["--username=postgres", "--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8"]
        options += ["--no-sync", "--no-instructions"]
        if _version() >= 17:  # the same everywhere; before, only the system knew UTF-8
            options += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        else:
            options += ["--locale=C.UTF-8"]
        initdb = [str(postgres_binaries() / "initdb"), f"--pgdata={fresh}", *options]
        made = subprocess.run(initdb, stdin=subprocess.DEVNULL, capture_output=True, text=True, **_identity())
        if made.returncode != 0:
            shutil.rmtree(fresh, ignore_errors=True)
            raise ServerError(f"initdb failed: {' '.join(made.stderr.split()) or made.returncode}")
        with suppress(FileNotFoundError):
            self.data_dir.rmdir()
        fresh.rename(self.data_dir)

    def _check_version(self, found: str) -> None:
        if int(found) != (ours := _version()):
            raise ServerError(f"{self.data_dir} was made by PostgreSQL {found}, this is {ours}: run `make reset`")

    def _pid_file(self) -> list[str]:
        try:
            return [line.strip() for line in (self.data_dir / "postmaster.pid").read_text().splitlines()]
        except OSError:
            return []

    def _postmaster(self) -> psutil.Process | None:
        lines = self._pid_file()
        try:
            process = psutil.Process(int(lines[0]))
            return process if Path(process.cwd()) == self.data_dir.resolve() else None
        except (IndexError, ValueError, psutil.Error):
            return None

    def stop_stray(self) -> None:
        """Stop a postmaster of this data directory that outlived whoever started it."""
        stray = self._postmaster()
        if stray is not None:
            stray.send_signal(signal.SIGINT)
            stray.wait(STOP_TIMEOUT)

    def _sockets_in(self) -> Path:
        folder = self._socket_folder(f".s.PGSQL.{self.port}")
        if folder != self.data_dir and (account := server_account()) is not None:
            os.chown(folder, account.uid, account.gid)
        return folder


@cache
def _version() -> int:
    """The major version of the server that would be started."""
    command = [str(postgres_binaries() / "postgres"), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, **_identity()).stdout
    found = re.search(r"\d+", said)
    assert found is not None, said
    return int(found[0])


def _identity() -> dict[str, Any]:
    """How to run a PostgreSQL program: the account, and an environment without settings meant for other servers."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")} | {"LC_ALL": "C"}
    environment["TMPDIR"] = tempfile.gettempdir()
    identity: dict[str, Any] = {"env": environment, "cwd": "/", "umask": 0o077}
    if (account := server_account()) is not None:
        identity |= {"user": account.uid, "group": account.gid, "extra_groups": []}
    return identity


def psql(url: str, statement: str) -> str:
    """Run a statement through psql: a synchronous client for start-up and tests."""
    command = [str(postgres_binaries() / "psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", statement, url]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise ServerError(f"psql: {' '.join(done.stderr.split())}")
    return done.stdout.strip()

"""The servers of one test run: a PostgreSQL with one migrated template database, and a Valkey.

They are started once, by the process that controls the run, in a temporary folder; the workers are told where.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from service.dev.places import ROOT, scratch
from service.dev.postgres import Postgres
from service.dev.valkey import Valkey

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["TEMPLATE", "RealServers", "Where", "another_postgres", "copy_of", "migrate", "outside_environment"]

TEMPLATE = "service"
"""The migrated database that every test's database is copied from."""

_PREFIXES = (
    "DATABASE__", "BROKER__", "API__", "IDENTITY__", "OUTBOX__", "SMTP__", "CONSOLE__", "LOG_", "OTEL_", "DRAMATIQ_",
    "dramatiq_",
    "SECRETS_DIR", "ENVIRONMENT", "ACCEPT_RISKS", "FORWARDED_ALLOW_IPS",
)  # fmt: skip


@dataclass(frozen=True)
class Where:
    """Where the servers are, in a form that travels to the workers."""

    folder: str
    postgres: str
    """URL of the maintenance database."""
    valkey: str
    seed: str
    """A stopped PostgreSQL's data directory with the migrated database, to copy."""


def outside_environment() -> dict[str, str]:
    """The environment of this process without any setting of the service."""
    return {key: value for key, value in os.environ.items() if not key.startswith(_PREFIXES)}


def migrate(database_url: str, revision: str = "heads", environment: Mapping[str, str] | None = None) -> None:
    """Run Alembic's `upgrade` in a process of its own."""
    settings = {"DATABASE__URL": database_url, "BROKER__URL": "redis://127.0.0.1:1/0"}
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", revision],
        cwd=ROOT,
        env={**(environment or outside_environment()), **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


class RealServers:
    """Starts and stops them."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def start(self) -> Where:
        """Start both and migrate the template."""
        with ExitStack() as stack:
            folder = stack.enter_context(scratch(in_memory=True))
            seed = self._make_seed(folder / "seed")
            postgres = stack.enter_context(Postgres(copy_of(seed, folder / "postgres"), durable=False))
            valkey = stack.enter_context(Valkey(folder / "valkey"))
            self._stack = stack.pop_all()
        return Where(str(folder), postgres.url(), valkey.url, str(seed))

    def stop(self) -> None:
        """Stop both and remove their data."""
        self._stack.close()

    @staticmethod
    def _make_seed(data_dir: Path) -> Path:
        with Postgres(data_dir, durable=False) as postgres:
            migrate(postgres.ensure_database(TEMPLATE))
        return data_dir


def another_postgres(
    where: Where, data_dir: Path, *, tcp: bool = False, settings: Mapping[str, str] | None = None
) -> Postgres:
    """A further PostgreSQL with the migrated database, to be started: `another_postgres(...).url(TEMPLATE)`.

    A kill of it must not lose commits, so it waits for them.
    """
    copied = copy_of(Path(where.seed), data_dir)
    return Postgres(copied, durable=False, settings={"synchronous_commit": "on", **(settings or {})}, tcp=tcp)


def copy_of(seed: Path, data_dir: Path) -> Path:
    """Copy a stopped server's data directory, with its owner and permissions."""
    subprocess.run(["cp", "-a", str(seed), str(data_dir)], check=True)
    return data_dir

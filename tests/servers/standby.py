"""A PostgreSQL that follows another one until it is promoted."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from service.dev.places import postgres_binaries, server_account
from service.dev.postgres import Postgres, _identity
from tests.servers.real_servers import another_postgres

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers.real_servers import Where

__all__ = ["Standby", "synchronous_pair"]


class Standby(Postgres):
    """A streaming copy of `primary`, which runs; on TCP if that is.

    Args:
        primary: Whom to follow.
        data_dir: Its data, copied at the first start.
    """

    def __init__(self, primary: Postgres, data_dir: Path) -> None:
        super().__init__(data_dir, settings=primary.settings, tcp=primary._password is not None)
        self._password = primary._password  # a role's password is copied too
        self._primary = primary

    def promote(self) -> None:
        """Take over; returns when it accepts writes."""
        self.sql("SELECT pg_promote()")

    def _initialise(self) -> None:
        if (self.data_dir / "PG_VERSION").exists():
            return
        self.data_dir.mkdir(mode=0o700)
        if (account := server_account()) is not None:
            os.chown(self.data_dir, account.uid, account.gid)
        command = [str(postgres_binaries() / "pg_basebackup"), "-D", str(self.data_dir), "-U", "postgres", "-R"]
        command += ["-h", str(self._primary._sockets_in()), "-p", str(self._primary.port), "-X", "stream", "-c", "fast"]
        subprocess.run(command, check=True, capture_output=True, **_identity())

    def _ready(self) -> bool:
        lines = self._pid_file()
        return len(lines) > 7 and lines[0] == str(self.pid) and lines[7] in ("ready", "standby")


@contextmanager
def synchronous_pair(where: Where, folder: Path) -> Iterator[tuple[Postgres, Standby]]:
    """A PostgreSQL on TCP with the migrated database, and its standby, for which the first one's commits wait."""
    with (
        another_postgres(where, folder / "primary", tcp=True) as primary,
        Standby(primary, folder / "standby") as standby,
    ):
        primary.sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
        primary.sql("SELECT pg_reload_conf()")
        yield primary, standby

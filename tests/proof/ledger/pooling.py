"""A PgBouncer of the test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.engine import make_url

from service.dev.places import server_account
from service.dev.servers import free_port
from tests.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PROGRAM = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin")

needs_pgbouncer = pytest.mark.skipif(
    _PROGRAM is None, reason="NOT TESTED: PgBouncer is not installed (on Debian: apt install pgbouncer)"
)


@contextmanager
def pgbouncer(folder: Path, upstream: str) -> Iterator[str]:
    """A PgBouncer in transaction mode with two server connections; its URL."""
    url = make_url(upstream)
    port = free_port()
    folder.joinpath("users.txt").write_text('"postgres" ""\n')
    config = folder / "pgbouncer.ini"
    config.write_text(
        f"[databases]\n{url.database} = host={url.query['host']} port={url.query.get('port', 5432)} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        "pool_mode = transaction\ndefault_pool_size = 2\nmax_client_conn = 100\n"
        f"auth_file = {folder / 'users.txt'}\nlogfile = {folder / 'log'}\n"
    )
    account = server_account()
    for path in (folder, *folder.iterdir()):
        if account:
            shutil.chown(path, account.name)
    assert _PROGRAM
    user = account.name if account else None
    process = subprocess.Popen([_PROGRAM, str(config)], user=user, stderr=subprocess.DEVNULL)
    try:
        until_sync(lambda: (folder / "log").exists() and "process up" in (folder / "log").read_text())
        yield f"postgresql://postgres@127.0.0.1:{port}/{url.database}"
    finally:
        process.terminate()
        process.wait(60)

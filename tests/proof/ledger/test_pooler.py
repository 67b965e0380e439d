"""API and workers behind a real PgBouncer in transaction mode; the relay refuses it and says why."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from relay.process.loop import Relay
from service.database.engine import create_engine
from service.database.sessions import session_factory, transaction
from service.dev.places import server_account
from service.dev.servers import free_port
from service.errors import ConfigurationError
from service.outbox import publish
from tests.proof.ledger import domain
from tests.proof.ledger.looks import all_completed
from tests.proof.ledger.working import start_worker
from tests.servers.relaying import relaying
from tests.waiting import until, until_sync

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger
    from tests.servers.real_servers import Where

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin") is None,
        reason="NOT TESTED: PgBouncer is not installed (on Debian: apt install pgbouncer)",
    ),
]


@contextmanager
def pgbouncer(folder: Path, upstream: str) -> Iterator[str]:
    """A PgBouncer in transaction mode with two server connections; its URL."""
    from sqlalchemy.engine import make_url

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
    program = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin")
    assert program
    user = account.name if account else None
    process = subprocess.Popen([program, str(config)], user=user, stderr=subprocess.DEVNULL)
    try:
        until_sync(lambda: (folder / "log").exists() and "process up" in (folder / "log").read_text())
        yield f"postgresql://postgres@127.0.0.1:{port}/{url.database}"
    finally:
        process.terminate()
        process.wait(60)


async def test_api_and_workers_work_behind_it(
    ledger: Ledger,
    settings: Settings,
    environment: dict[str, str],
    server_folder: Path,
    database_url: str,
    tmp_path: Path,
) -> None:
    async with relaying(settings.model_copy(deep=True)):
        with pgbouncer(server_folder, database_url) as url:
            settings.database.url = type(settings.database.url)(url)
            settings.database.pooler = True
            worker = start_worker(
                environment | {"DATABASE__URL": url, "DATABASE__POOLER": "true"}, tmp_path / "log", "-p", "1", "-t", "8"
            )
            engine = create_engine(settings.database, application_name="api")
            try:
                await until(lambda: worker.says("ready for action"))
                sessions = session_factory(engine)

                async def post(number: int) -> None:
                    async with transaction(sessions) as session:
                        how = "fail" if number % 10 == 0 else ""
                        publish(session, domain.Happened(subject_id=uuid4(), how=how))

                await asyncio.gather(*[post(number) for number in range(60)])
                await until(lambda: all_completed(ledger))
            finally:
                await worker.stop()
                await engine.dispose()
    assert await ledger.connection.fetchval("SELECT count(*) FROM effect") == 54
    assert await ledger.connection.fetchval("SELECT count(*) FROM dead_letter") == 6
    assert not worker.says("claim_waits")


async def test_the_relay_refuses_it(settings: Settings, servers: Where, server_folder: Path, database_url: str) -> None:
    with pgbouncer(server_folder, database_url) as url:
        settings.database.url = type(settings.database.url)(url)
        with pytest.raises(ConfigurationError, match="direct connection"):
            await Relay(settings).run()

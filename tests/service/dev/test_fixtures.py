"""The fixtures keep tests apart."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import redis
from sqlalchemy import text

from service.dev.postgres import psql
from service.ledger.tables import PausedQueue
from service.settings import load_settings

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncSession

    from service.database.sessions import SessionFactory
    from service.dev.postgres import Postgres
    from service.dev.valkey import Valkey
    from service.settings import Settings

_COUNT = "SELECT count(*) FROM paused_queue"
_INSERT = "INSERT INTO paused_queue (queue, paused_by) VALUES ('*', 'test')"


@pytest.mark.parametrize("turn", [1, 2])
async def test_every_test_has_an_empty_migrated_database(
    sessions: SessionFactory, database_url: str, turn: int
) -> None:
    async with sessions() as session:
        assert await session.scalar(text(_COUNT)) == 0
        session.add(PausedQueue(queue="*", paused_by="test"))
        await session.commit()
    assert psql(database_url, _COUNT) == "1"


@pytest.mark.parametrize("turn", [1, 2])
async def test_a_rolled_back_session_leaves_nothing(
    rolled_back_session: AsyncSession, worker_database_url: str, turn: int
) -> None:
    assert await rolled_back_session.scalar(text(_COUNT)) == 0
    await rolled_back_session.execute(text(_INSERT))
    await rolled_back_session.commit()
    assert await rolled_back_session.scalar(text(_COUNT)) == 1
    assert psql(worker_database_url, _COUNT) == "0"


def test_the_environment_gives_a_process_the_same_settings(
    settings: Settings, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    given = load_settings()
    assert given.outbox == settings.outbox
    assert given.broker == settings.broker
    assert given.identity == settings.identity
    assert given.database.url == settings.database.url


def test_a_developers_env_file_reaches_no_process_of_a_test(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("OUTBOX__BATCH_SIZE=7\n")
    show = [
        sys.executable,
        "-c",
        "from service.settings import load_settings; print(load_settings().outbox.batch_size)",
    ]
    for given, size in ((environment, "500"), (environment | {"ENV_FILE": ".env"}, "7")):
        assert subprocess.run(show, cwd=tmp_path, env=given, capture_output=True, text=True).stdout.strip() == size


def test_own_servers_are_private_and_migrated(own_postgres: Postgres, own_valkey: Valkey, broker_url: str) -> None:
    own_postgres.sql(_INSERT, "service")
    own_postgres.kill()
    own_postgres.start()
    assert own_postgres.sql(_COUNT, "service") == "1"
    with redis.Redis.from_url(broker_url) as shared, redis.Redis.from_url(own_valkey.url) as own:
        shared.set("test-shared", "kept")
        own.flushall()
        assert shared.get("test-shared") == b"kept"
        shared.delete("test-shared")

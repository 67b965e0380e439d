"""One service forwards, another accepts; all of their processes are killed where it hurts, and each effect is one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import pytest

from service.database.engine import create_engine
from service.database.sessions import session_factory
from service.dev.servers import free_port
from tests.conftest import _create_database
from tests.proof.ledger import domain
from tests.proof.ledger.conftest import Ledger
from tests.proof.ledger.looks import all_completed
from tests.proof.ledger.services import crash
from tests.proof.ledger.services.sender import Ordered
from tests.servers.processes import Processes
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from service.settings import Settings
    from tests.servers.processes import Started
    from tests.servers.real_servers import Where

pytestmark = pytest.mark.slow

_SENDER = "tests.proof.ledger.services.sender:setup_broker"
_RECEIVER = "tests.proof.ledger.services.receiver:setup_broker"
_API = "tests.proof.ledger.services.receiver:create_app"


@pytest.fixture
def other_database_url(servers: Where) -> Iterator[str]:
    """The database of the service that accepts."""
    yield from _create_database(servers)


@pytest.fixture
def other_environment(environment: dict[str, str], other_database_url: str) -> dict[str, str]:
    """The settings of the service that accepts."""
    namespace = f"{environment['BROKER__NAMESPACE']}-receiver"
    return environment | {"DATABASE__URL": other_database_url, "BROKER__NAMESPACE": namespace}


@pytest.fixture
async def receiver(settings: Settings, other_database_url: str) -> AsyncIterator[Ledger]:
    """The ledger of the service that accepts."""
    theirs = settings.database.model_copy(update={"url": type(settings.database.url)(other_database_url)})
    engine = create_engine(theirs, application_name="tests")
    connection = await asyncpg.connect(other_database_url)
    await connection.execute(domain.SCHEMA)
    yield Ledger(connection, session_factory(engine))
    await connection.close()
    await engine.dispose()


@pytest.fixture
async def other_processes(other_environment: dict[str, str], tmp_path: Path) -> AsyncIterator[Processes]:
    """Starts the processes of the service that accepts."""
    folder = tmp_path / "receiver"
    folder.mkdir()
    processes = Processes(other_environment, folder)
    yield processes
    await processes.stop()


async def test_what_one_service_forwards_another_accepts_once(
    ledger: Ledger,
    receiver: Ledger,
    processes: Processes,
    other_processes: Processes,
    environment: dict[str, str],
    other_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """The receiver dies before its commit, the sender after it and before its own, the receiver in the effect."""
    port = free_port()
    environment |= {"CRASHES": str(tmp_path), "RECEIVER": f"http://127.0.0.1:{port}"}
    other_environment["CRASHES"] = str(tmp_path)
    api, sending, receiving, *_ = await asyncio.gather(
        other_processes.api(_API, port=port),
        processes.worker(_SENDER),
        other_processes.worker(_RECEIVER),
        processes.relay(),
        other_processes.relay(),
    )
    subjects = [uuid4() for _ in range(20)]
    for place in ("receiver-before-commit", "sender-before-completion", "receiver-in-effect"):
        crash.arm(tmp_path, place)
    for subject_id in subjects:
        await ledger.publish(Ordered(subject_id=subject_id))

    async def killed(process: Started, place: str) -> None:
        await until(lambda: crash.reached(tmp_path, place), what=place)
        await process.kill()

    await killed(api, "receiver-before-commit")
    await other_processes.api(_API, port=port)
    await killed(sending, "sender-before-completion")
    await killed(receiving, "receiver-in-effect")
    await asyncio.gather(processes.worker(_SENDER), other_processes.worker(_RECEIVER))
    await until(lambda: all_completed(ledger))
    await until(lambda: all_completed(receiver))

    effects = await receiver.connection.fetch("SELECT note FROM effect")
    assert sorted(row["note"] for row in effects) == sorted(map(str, subjects))
    accepted = await receiver.connection.fetchval("SELECT count(*) FROM accepted_event")
    rows = await receiver.connection.fetchval("SELECT count(*) FROM outbox_message")
    assert (accepted, rows) == (len(subjects), len(subjects))
    # That each of them did die with something in its hands.
    assert await ledger.connection.fetchval("SELECT max(attempts) FROM outbox_message") > 1
    assert await receiver.connection.fetchval("SELECT max(attempts) FROM outbox_message") == 2

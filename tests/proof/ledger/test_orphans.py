"""Worker processes whose main process is killed: nobody would stop them, or start those of newer code instead."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING
from uuid import uuid4

import psutil
import pytest

from tests.proof.ledger import domain
from tests.proof.ledger.looks import is_state
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger
    from tests.servers.processes import Processes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
async def test_they_stop_as_if_they_had_been_told_to(
    ledger: Ledger, processes: Processes, settings: Settings, tmp_path: Path, start: str
) -> None:
    """Python's way to start them differs by its version: 3.14 has a server fork them."""
    (tmp_path / "sitecustomize.py").write_text(f"import multiprocessing\nmultiprocessing.set_start_method({start!r})\n")
    async with relaying(settings):
        worker = await processes.worker(
            "tests.proof.ledger.app:setup_broker",
            "-p",
            "2",
            "-t",
            "4",
            PYTHONPATH=str(tmp_path),
            OUTBOX__TIME_LIMIT="60000",
        )
        family = psutil.Process(worker.process.pid).children(recursive=True)
        ids = {how: (await ledger.publish(domain.Happened(subject_id=uuid4(), how=how)))[0] for how in ("slow", "hang")}
        for each in ids.values():
            await until(lambda each=each: is_state(ledger, each, "running"), timeout=30)  # type: ignore[misc]
        os.kill(worker.process.pid, signal.SIGKILL)
        await until(lambda: not any(each.is_running() for each in family), timeout=60)
    assert await ledger.state(ids["slow"]) == "completed"
    hung = await ledger.row(ids["hang"])
    assert hung is not None
    assert (hung["attempts"], hung["state"]) in ((0, "pending"), (0, "dispatched"))

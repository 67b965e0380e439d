"""The hook that `docs/traces.md` shows tells Sentry of the runs that failed, and nothing of their payloads."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from service.database.sessions import transaction
from service.outbox import publish
from service.telemetry.logs import trace_context
from tests.service.traces.app import SECRET, Sent
from tests.waiting import until

if TYPE_CHECKING:
    from service.database.sessions import SessionFactory
    from tests.servers.posted import Posted
    from tests.servers.processes import Processes


@pytest.mark.slow
async def test_sentry_is_told_where_a_run_failed_and_not_what_it_worked_on(
    environment: dict[str, str], processes: Processes, collector: Posted, sessions: SessionFactory
) -> None:
    environment["SENTRY_DSN"] = collector.url.replace("//", "//key@") + "/1"
    await processes.relay()
    await processes.worker("tests.service.traces.sentry:setup_broker")
    with trace_context({"correlation_id": "parcel-form/42"}):
        async with transaction(sessions) as session:
            publish(session, Sent(parcel_id=uuid4(), secret=SECRET, announced_once="/nowhere"))
    await until(lambda: len(collector.envelopes()) == 2, what="both events")
    died, failed = sorted(collector.envelopes(), key=lambda event: str(event["level"]))
    assert (died["level"], died["exception"]["values"][0]["type"]) == ("error", "Fail")
    assert (failed["level"], failed["exception"]["values"][0]["type"]) == ("warning", "RuntimeError")
    assert failed["fingerprint"] == ["parcels.weigh", "RuntimeError"]
    assert failed["tags"].items() >= {"attempt": "1", "correlation_id": "parcel-form/42"}.items()
    assert "RuntimeError: the scales are stuck on [payload]" in failed["extra"]["traceback"]
    assert SECRET not in str(collector.bodies)

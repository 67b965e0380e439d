"""One request, traced by a real collector over API, relay and worker; and what it costs when there is none."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from service.dev.postgres import psql
from service.dev.servers import free_port
from tests.service.traces.app import SECRET
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers.posted import Posted, Span
    from tests.servers.processes import Processes, Started

APP = "tests.service.traces.app"
CALLER_TRACE, CALLER_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLER = {
    "traceparent": f"00-{CALLER_TRACE}-{CALLER_SPAN}-01",
    "tracestate": "shop=1",
    "X-Correlation-ID": "parcel-form/42",
}
OPEN = "SELECT count(*) FROM outbox_message WHERE state <> 'completed'"
LONG_AGO = "UPDATE outbox_message SET created_at = created_at - interval '16 min' WHERE consumer = 'parcels.bill'"


def lines(*processes: Started) -> list[dict[str, Any]]:
    """What they logged, in our format."""
    written = "\n".join(each.log.read_text() for each in processes)
    return [json.loads(line) for line in written.splitlines() if line.startswith("{")]


def said(process: Started, event: str) -> list[dict[str, Any]]:
    return [line for line in lines(process) if line["event"] == event]


class Story:
    """A parcel from the request to the replay of its announcement, told by three processes."""

    def __init__(self, spans: list[Span], api: Started, worker: Started) -> None:
        self.spans, self.api, self.worker = spans, api, worker
        self._found = defaultdict(list)
        for each in sorted(spans, key=lambda span: span.began):
            self._found[each.name, each.attributes.get("messaging.consumer.group.name")].append(each)

    def one(self, name: str, consumer: str | None = None) -> Span:
        [span] = self.all(name, consumer)
        return span

    def all(self, name: str, consumer: str | None = None) -> list[Span]:
        return self._found[name, consumer]


@pytest.fixture
async def story(environment: dict[str, str], processes: Processes, collector: Posted, tmp_path: Path) -> Story:
    # So late that nothing is exported but by processes that end.
    environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "3600000"}
    api = await processes.api(f"{APP}:create_app")
    file = tmp_path / "somebody is at home"
    database = environment["DATABASE__URL"]
    async with httpx.AsyncClient(base_url=api.url, headers=CALLER) as client:
        assert (await client.post("/parcels", json={"announced_once": str(file)})).status_code == 201
        assert (await client.post("/broken")).status_code == 500
        assert (await client.get("/health/ready")).status_code == 200
    psql(database, LONG_AGO)
    await processes.relay()
    worker = await processes.worker(f"{APP}:setup_broker")
    await until(lambda: psql(database, "SELECT count(*) FROM dead_letter") == "1", what="the dead letter")
    await until(lambda: psql(database, OPEN) == "0", what="all the others")
    file.touch()
    command = (sys.executable, "-m", "relay", "dead-letters", "replay", "--consumer", "parcels.announce", "--yes")
    replay = await asyncio.create_subprocess_exec(*command, env=environment, stdout=DEVNULL)
    assert await replay.wait() == 0
    await until(lambda: psql(database, OPEN) == "0", what="the replay")
    await worker.stop()
    await api.stop()
    return Story(collector.spans(), api, worker)


@pytest.mark.slow
async def test_a_request_is_traced_from_its_caller_to_its_last_effect(story: Story) -> None:
    request, sent, packed = (
        story.one("POST /parcels"),
        story.one("create parcel.sent"),
        story.one("create parcel.packed"),
    )
    pack, load = story.one("process parcel.sent", "parcels.pack"), story.one("process parcel.packed", "parcels.load")
    path = [(request, CALLER_SPAN), (sent, request.id), (pack, sent.id), (packed, pack.id), (load, packed.id)]
    assert [(span.name, span.parent) for span, _ in path] == [(span.name, parent) for span, parent in path]
    assert {span.trace for span, _ in path} == {CALLER_TRACE}
    assert [span.kind for span, _ in path] == ["server", "producer", "consumer", "producer", "consumer"]
    assert [span.process for span, _ in path] == ["api", "api", "worker", "worker", "worker"]
    assert pack.links == ((CALLER_TRACE, sent.id),)
    assert load.links == ((CALLER_TRACE, packed.id),)

    # Retries, replays, and what is late on purpose or by far are traces of their own.
    first, second = story.all("process parcel.sent", "parcels.weigh")
    assert (first.trace, first.parent, first.links) == (CALLER_TRACE, sent.id, ((CALLER_TRACE, sent.id),))
    died, replayed = story.all("process parcel.sent", "parcels.announce")
    assert (died.trace, died.parent) == (CALLER_TRACE, sent.id)
    late = story.one("process parcel.reminded", "parcels.remind")
    old = story.one("process parcel.sent", "parcels.bill")
    apart = ((second, sent), (replayed, sent), (old, sent), (late, story.one("create parcel.reminded")))
    for span, origin in apart:
        assert span.trace != CALLER_TRACE
        assert span.parent == ""
        assert span.links == ((CALLER_TRACE, origin.id),)
    assert len({span.trace for span, _ in apart}) == 4

    # What became of each, by the conventions, and nothing of the payload or the errors.
    endings = [
        (span.attributes["messaging.outbox.outcome"], span.attributes.get("error.type"), span.failed)
        for span in (first, second, died, replayed)
    ]
    assert endings == [
        ("failed", "RuntimeError", True),
        ("completed", None, False),
        ("dead", "Fail", True),
        ("completed", None, False),
    ]
    assert [span.attributes["messaging.outbox.attempt"] for span in (first, second, died, replayed)] == [1, 2, 1, 1]
    assert (
        pack.attributes.items()
        >= {
            "messaging.system": "outbox",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": "parcel.sent",
            "messaging.message.conversation_id": "parcel-form/42",
            "messaging.consumer.group.name": "parcels.pack",
            "messaging.outbox.queue": "parcels",
            "messaging.outbox.event_id": sent.attributes["messaging.message.id"],
        }.items()
    )
    broken = story.one("POST /broken")
    assert (broken.failed, broken.attributes["error.type"]) == (True, "500")
    assert SECRET not in "".join(span.text for span in story.spans)
    assert not [span for span in story.spans if "health" in span.name]

    # Every line has the ids of the span that it is logged in, and all lines of the request and what it caused are
    # found by its correlation id.
    found = [line for line in lines(story.api, story.worker) if line.get("correlation_id") == "parcel-form/42"]
    logged = {(line["event"], line.get("consumer"), line["trace_id"], line["span_id"]) for line in found}
    assert logged >= {
        ("http.request", None, request.trace, request.id),
        ("parcel.packed", "parcels.pack", pack.trace, pack.id),
        ("outbox.completed", "parcels.pack", pack.trace, pack.id),
        ("outbox.completed", "parcels.load", load.trace, load.id),
        ("parcel.weighed", "parcels.weigh", first.trace, first.id),
        ("outbox.failed", "parcels.weigh", first.trace, first.id),
        ("parcel.weighed", "parcels.weigh", second.trace, second.id),
        ("outbox.completed", "parcels.weigh", second.trace, second.id),
        ("outbox.dead_lettered", "parcels.announce", died.trace, died.id),
        ("outbox.completed", "parcels.announce", replayed.trace, replayed.id),
        ("outbox.completed", "parcels.remind", late.trace, late.id),
    }


async def delivered(environment: dict[str, str], api: Started, tmp_path: Path) -> None:
    """A parcel goes all its ways."""
    (tmp_path / "file").touch()
    async with httpx.AsyncClient(base_url=api.url, headers=CALLER) as client:
        answer = await client.post("/parcels", json={"announced_once": str(tmp_path / "file")})
    assert answer.status_code == 201
    await until(lambda: psql(environment["DATABASE__URL"], OPEN) == "0", what="all of it")


@pytest.mark.slow
async def test_a_collector_that_is_silent_keeps_nobody_from_working_or_ending(
    environment: dict[str, str], processes: Processes, silent: str, tmp_path: Path
) -> None:
    eager = {"OTEL_BSP_SCHEDULE_DELAY": "1", "OTEL_BSP_MAX_QUEUE_SIZE": "1", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "1"}
    environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": silent, "OTEL_EXPORTER_OTLP_TIMEOUT": "3600"} | eager
    api = await processes.api(f"{APP}:create_app")
    await processes.relay()
    worker = await processes.worker(f"{APP}:setup_broker")
    await delivered(environment, api, tmp_path)
    for process in (worker, api):
        await process.stop()
        [line] = [line for line in lines(process) if line["logger"].startswith("opentelemetry")]
        assert line["event"] == "Queue full, dropping Span."


@pytest.mark.slow
async def test_a_collector_that_is_away_is_told_of_once_without_a_traceback(
    environment: dict[str, str], processes: Processes, tmp_path: Path
) -> None:
    environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}", "OTEL_BSP_SCHEDULE_DELAY": "1"}
    api = await processes.api(f"{APP}:create_app")
    await processes.relay()
    await processes.worker(f"{APP}:setup_broker")
    for _ in range(3):
        await delivered(environment, api, tmp_path)
    await until(lambda: api.says("Connection refused"))
    assert api.log.read_text().count("Connection refused") == 1
    assert not api.says("Traceback")


@pytest.mark.slow
async def test_without_the_extra_one_line_says_so_and_all_works(
    environment: dict[str, str], processes: Processes, collector: Posted, tmp_path: Path
) -> None:
    environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.url
    api = await processes.api(f"{APP}:create_app_without_sdk")
    await processes.relay()
    worker = await processes.worker(f"{APP}:setup_broker_without_sdk")
    await delivered(environment, api, tmp_path)
    for process in (api, worker):
        [line] = said(process, "tracing.not_started")
        assert line["level"] == "warning"
        assert "the extra `otel` is not installed" in line["reason"]
    headers = psql(environment["DATABASE__URL"], "SELECT DISTINCT headers ->> 'traceparent' FROM outbox_message")
    assert headers == CALLER["traceparent"]

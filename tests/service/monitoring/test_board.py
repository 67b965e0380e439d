"""Every panel of the board shows something, from a real Prometheus that scraped a real API, relay and worker."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from ruamel.yaml import YAML

from service.dev.board import board
from service.dev.servers import free_port
from tests.servers.processes import Processes
from tests.servers.prometheus import Prometheus, needs_prometheus
from tests.service.docs.pages import DOCS
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

MONITORING = DOCS / "monitoring"
BOARD = MONITORING / "board.json"


def panels() -> Iterator[dict[str, Any]]:
    for panel in json.loads(BOARD.read_text())["panels"]:
        if panel["type"] != "row":
            yield panel


def queries() -> Iterator[tuple[str, str]]:
    """Each with its panel's title."""
    for panel in panels():
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])


def configured(folder: Path, ports: dict[str, list[int]]) -> Path:
    """The configuration of compose.yaml's Prometheus, for these ports of each job and with a quicker clock."""
    yaml = YAML(typ="safe", pure=True)
    configuration = yaml.load((MONITORING / "prometheus.yml").read_text())
    assert {each["job_name"] for each in configuration["scrape_configs"]} == ports.keys()
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(MONITORING / name) for name in configuration["rule_files"]]
    configuration["scrape_configs"] = [
        {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in of]}]}
        for job, of in ports.items()
    ]
    with (folder / "prometheus.yml").open("w") as file:
        yaml.dump(configuration, file)
    return folder / "prometheus.yml"


@pytest.fixture
async def watched(environment: dict[str, str], tmp_path: Path) -> AsyncIterator[tuple[str, Prometheus]]:
    """An API's URL, and a Prometheus that scrapes it and two relays; there is a worker, too."""
    processes = Processes(environment, tmp_path)
    ports = {"api": [free_port()], "relay": [free_port(), free_port()]}
    try:
        api = await processes.api("tests.service.monitoring.app:create_app", METRICS__PORT=str(ports["api"][0]))
        for port in ports["relay"]:
            await processes.relay(METRICS__PORT=str(port))
        await processes.worker("tests.service.monitoring.app:setup_broker")
        with Prometheus(configured(tmp_path, ports)) as prometheus:
            yield api.url, prometheus
    finally:
        await processes.stop()


def test_it_is_what_its_source_makes_of_it() -> None:
    assert BOARD.read_text() == board(), "run: .venv/bin/python -m service.dev.board > docs/monitoring/board.json"


def test_no_panel_overlaps_another() -> None:
    fields = [
        (x, y)
        for panel in json.loads(BOARD.read_text())["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(fields) == len(set(fields))


@pytest.mark.slow
@needs_prometheus
async def test_every_panel_shows_something(watched: tuple[str, Prometheus]) -> None:
    api, prometheus = watched
    # A connection on which a background task has failed is closed.
    alone = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=api, timeout=30, limits=alone) as client:

        async def look() -> bool:
            for how in ("well", "well", "fail", "die"):
                (await client.post(f"/watched/{how}")).raise_for_status()
            empty = [query for query in queries() if not shown(prometheus, query[1])]
            assert not empty, empty
            return True

        await until(look, every=0.5, timeout=240, what="data for each panel")
    firing = {alert["labels"]["alertname"] for alert in prometheus.ask("alerts")["alerts"]}
    assert "OutboxDeadLetters" in firing
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert prometheus.values("sum(max without (instance) (outbox_relays))") == [2]


def shown(prometheus: Prometheus, expression: str) -> list[float]:
    """What a panel shows just now."""
    values = prometheus.values(expression.replace("$__rate_interval", "30s"))
    return [value for value in values if not math.isnan(value)]


def test_its_variables_are_replaced() -> None:
    assert {name for _, query in queries() for name in re.findall(r"\$\w+", query)} == {"$__rate_interval"}

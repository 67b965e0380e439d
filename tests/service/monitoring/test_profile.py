"""The profile `monitoring` of compose.yaml agrees with the files that it mounts, and with what it watches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from service.dev.places import ROOT
from tests.service.deploy.compose import parsed
from tests.service.docs.pages import DOCS

MONITORING = DOCS / "monitoring"


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    return parsed()


def read(name: str) -> Any:
    return YAML(typ="safe", pure=True).load((MONITORING / name).read_text())


def mounts(service: dict[str, Any]) -> dict[Path, str]:
    """What it sees of this repository, and where."""
    parts = [volume.split(":") for volume in service["volumes"] if volume.startswith(".")]
    assert all(how == ["ro"] for _, _, *how in parts)
    return {ROOT / source: target for source, target, _ in parts}


def test_nothing_of_it_runs_without_the_profile(services: dict[str, dict[str, Any]]) -> None:
    watching = {name for name, each in services.items() if each.get("profiles") == ["monitoring"]}
    assert watching == {"prometheus", "grafana", "jaeger"}
    assert not any(watching & set(each.get("depends_on", ())) for each in services.values())


def test_prometheus_scrapes_what_serves_metrics(services: dict[str, dict[str, Any]]) -> None:
    assert mounts(services["prometheus"]) == {MONITORING: "/etc/prometheus"}
    serving = {
        name: each["environment"]["METRICS__PORT"]
        for name, each in services.items()
        if each.get("environment", {}).get("METRICS__HOST") == "0.0.0.0"
    }
    scraped = {
        name: str(found["port"])
        for job in read("prometheus.yml")["scrape_configs"]
        for found in job["dns_sd_configs"]
        for name in found["names"]
    }
    assert serving == scraped
    assert serving.keys() == {"api", "relay"}


def test_grafana_finds_the_board_and_its_sources(services: dict[str, dict[str, Any]]) -> None:
    mounted = mounts(services["grafana"])
    assert all(path.is_file() for path in mounted)
    [provider] = read("grafana-boards.yml")["providers"]
    board = mounted[MONITORING / "board.json"]
    assert Path(board).parent == Path(provider["options"]["path"])
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == board
    for name, kind in (("grafana-boards.yml", "dashboards"), ("grafana-datasources.yml", "datasources")):
        assert Path(mounted[MONITORING / name]).parent == Path("/etc/grafana/provisioning") / kind
    for source in read("grafana-datasources.yml")["datasources"]:
        assert source["url"].removeprefix("http://").partition(":")[0] in services


def test_nobody_can_log_in_to_grafana(services: dict[str, dict[str, Any]]) -> None:
    settings = services["grafana"]["environment"]
    assert settings["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert settings["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert settings["GF_AUTH_BASIC_ENABLED"] == "false"
    assert settings["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"

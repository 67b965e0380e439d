"""`compose.yaml` and the image agree with the code they run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from dramatiq.cli import make_argument_parser
from uvicorn.importer import import_from_string
from uvicorn.main import main as uvicorn_command

import service.domains
from service.dev.env_example import example
from service.dev.places import ROOT
from service.http.protocol import BoundedProtocol
from service.outbox.consumers import registered_consumers
from service.settings import ApiSettings, OutboxSettings
from service.telemetry import probe
from tests.service.deploy.compose import COMPOSE, parsed, whole

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    return parsed()


@pytest.fixture(scope="module")
def workers(services: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The arguments of each worker, as Dramatiq reads them."""
    commands = {name: service.get("command", [""]) for name, service in services.items()}
    parser = make_argument_parser()
    return {name: parser.parse_args(line[1:]) for name, line in commands.items() if line[0] == "dramatiq"}


def _ours(services: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: service for name, service in services.items() if "build" in service}


def _seconds(duration: str) -> int:
    assert duration.endswith("s")
    return int(duration.removesuffix("s"))


@pytest.fixture(scope="module")
def queues() -> set[str]:
    """The queues of the domains' consumers."""
    service.domains.discover()
    return {each.queue for each in registered_consumers() if each.fn.__module__.startswith("service.domains.")}


def test_every_worker_serves_a_queue_of_the_domains(workers: dict[str, Any], queues: set[str]) -> None:
    if not queues:
        pytest.skip("there is no consumer yet")
    for name, worker in workers.items():
        assert worker.queues is None or queues.intersection(worker.queues), (
            f"{name} in compose.yaml serves {worker.queues}, which no consumer names: "
            "give it queues that there are, or remove it"
        )


def test_some_worker_serves_every_queue_of_the_domains(workers: dict[str, Any]) -> None:
    service.domains.discover()
    served = {queue for worker in workers.values() for queue in worker.queues or ()}
    if any(worker.queues is None for worker in workers.values()):  # it serves all there are
        return
    for consumer in registered_consumers():
        if consumer.fn.__module__.startswith("service.domains."):
            assert consumer.queue in served, (
                f"no worker in compose.yaml serves queue {consumer.queue!r} of {consumer.name}: "
                "add it to the -Q of one, or a worker for it"
            )


def test_a_stopping_worker_has_time_for_what_it_runs(workers: dict[str, Any], services: dict[str, Any]) -> None:
    for name, worker in workers.items():
        dramatiq_gives_up = worker.worker_shutdown_timeout / 1000
        assert OutboxSettings().shutdown_grace < dramatiq_gives_up
        assert 2 * dramatiq_gives_up < _seconds(services[name]["stop_grace_period"])
        assert services[name]["restart"] == "unless-stopped"


def test_a_stopping_api_has_time_for_its_requests(services: dict[str, Any]) -> None:
    command = re.search(r'^CMD \["uvicorn", (.*)\]$', (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert command is not None
    arguments = re.findall(r'"([^"]*)"', command[1])
    options = uvicorn_command.make_context("uvicorn", arguments).params
    assert options["app"] == "service.api:create_app"
    assert options["factory"]
    assert import_from_string(options["http"]) is BoundedProtocol
    assert options["host"] == "0.0.0.0"
    assert "command" not in services["api"]
    assert ApiSettings().request_timeout < options["timeout_graceful_shutdown"]
    assert options["timeout_graceful_shutdown"] < _seconds(services["api"]["stop_grace_period"])


def test_relay_and_workers_are_probed_and_can_write_the_signs_for_it(services: dict[str, Any]) -> None:
    folder = re.search(r"^ENV PROBE_FOLDER=(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert folder is not None
    assert probe.FOLDER == "PROBE_FOLDER"
    probed = [each for each in services.values() if each.get("command", [""])[0] in ("dramatiq", "outbox")]
    assert len(probed) >= 2
    for each in probed:
        assert each["healthcheck"]["test"] == ["CMD", "python", "-m", probe.__name__]
        assert str(Path(folder[1]).parent) in each["tmpfs"]
        assert _seconds(each["healthcheck"]["interval"]) * 3 > probe.PATIENCE


def test_nothing_is_open_to_the_network(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_variable_is_in_the_example_and_no_password_is_one() -> None:
    variables = re.findall(r"\$\{(\w+)", COMPOSE)
    assert variables
    for name in variables:
        assert f"#{name}=" in example(), name
        assert "PASSWORD" not in name


def test_no_process_is_given_more_than_its_own_role(services: dict[str, dict[str, Any]]) -> None:
    roles = {"api": "app", "relay": "relay", "console": "relay", "migrate": "migrator"}
    for name, each in _ours(services).items():
        role = roles.get(name, "app")
        url = each["environment"]["DATABASE__URL"]
        assert url.startswith(f"postgresql://service_{role}@"), f"{name}: {url}"
        secrets = {secret["source"]: secret["target"] for secret in each["secrets"]}
        assert secrets.pop(f"{role}_password") == "database__password"
        others = {"api": {}, "migrate": {}, "console": {"viewer_password": "console__viewer_password"}}
        assert secrets == others.get(name, {"broker_password": "broker__password"}), name
    for name, each in services.items():
        if name != "postgres":
            assert "superuser_password" not in str(each), name


def test_no_password_is_in_an_environment_or_a_command_line(services: dict[str, dict[str, Any]]) -> None:
    for name, each in services.items():
        for variable, value in each.get("environment", {}).items():
            assert "PASS" not in variable or variable.endswith("_FILE"), f"{name}: {variable}"
            assert not re.search(r"://[^/@]*:[^/@]+@", value), f"{name}: {variable}"
        assert "--requirepass" not in str(each.get("command")), name


def test_every_service_has_networks_limits_and_logs_that_end(services: dict[str, dict[str, Any]]) -> None:
    for name, each in services.items():
        assert each["networks"], f"{name} would be in the default network with everybody else"
        assert each["mem_limit"], name
        assert {"max-size", "max-file"} <= each["logging"]["options"].keys(), name


def test_the_servers_are_reached_by_those_that_need_them_alone(services: dict[str, dict[str, Any]]) -> None:
    networks = whole()["networks"]
    assert all(networks[name] == {"internal": True} for name in ("database", "broker"))
    assert services["postgres"]["networks"] == ["database"]
    assert services["valkey"]["networks"] == services["rabbitmq"]["networks"] == ["broker"]
    for name, each in services.items():
        needs_broker = "broker_password" in str(each.get("secrets"))
        assert ("broker" in each["networks"]) == needs_broker, name


def test_every_image_is_named_exactly(services: dict[str, dict[str, Any]]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    images = [each["image"] for each in services.values() if "build" not in each]
    images += re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert len(images) >= 6
    for image in images:
        assert re.search(r":v?\d+\.\d+(\.\d+)?(-[\w.-]+)?$|@sha256:[0-9a-f]{64}$", image), image


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_secrets_writes_each_password_once(tmp_path: Path) -> None:
    for name in ("Makefile", "compose.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    made = []
    for _ in range(2):
        subprocess.run(["make", "secrets"], cwd=tmp_path, check=True, capture_output=True)
        made.append({path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()})
    assert made[0] == made[1]
    assert {f"./secrets/{name}" for name in made[0]} == {each["file"] for each in whole()["secrets"].values()}
    assert len(set(made[0].values())) == len(made[0])
    assert all(len(password) == 48 for password in made[0].values())
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "secrets" / "app_password").stat().st_mode & 0o777 == 0o644, "no container could read it"


def test_the_services_of_ours_share_an_image_and_start_after_the_migration(services: dict[str, Any]) -> None:
    ours = _ours(services)
    assert {"api", "relay", "migrate"} < set(ours)
    assert len({each["image"] for each in ours.values()}) == 1
    for name, each in ours.items():
        assert each["stop_grace_period" if name != "migrate" else "restart"]
        waits_for = each["depends_on"]
        if name == "migrate":
            assert waits_for == {"postgres": {"condition": "service_healthy"}}
        else:
            assert waits_for["rights"] == {"condition": "service_completed_successfully"}
            assert ("valkey" in waits_for) == (name not in ("api", "console"))

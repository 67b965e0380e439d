"""What `make dev` starts, and what it says of that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.dev import up

if TYPE_CHECKING:
    import pytest


def test_each_process_that_has_metrics_serves_them_on_a_port_of_its_own_that_is_told(
    environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    environment |= {"SMTP__URL": "smtp://127.0.0.1:1025"}
    processes = up._processes(environment, 8000)
    ports = {each.name: each.environment["METRICS__PORT"] for each in processes if "METRICS__PORT" in each.environment}
    assert ports.keys() == {"api", "relay-1", "relay-2"}
    assert len(set(ports.values())) == 3
    up._give_environment(processes)  # as after a change of `.env`
    assert [each.environment["METRICS__PORT"] for each in processes if each.name in ports] == list(ports.values())
    up._say_where(8000, environment, processes)
    said = capsys.readouterr().out
    for name, port in ports.items():
        assert f"http://127.0.0.1:{port}/metrics   ({name})" in said

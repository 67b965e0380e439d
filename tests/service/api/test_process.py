"""The API as the process that production runs."""

from __future__ import annotations

import json
import signal
import subprocess
import urllib.request
from typing import TYPE_CHECKING

from service.dev.places import ROOT
from service.dev.stack import api_command
from tests.servers.real_servers import outside_environment
from tests.waiting import until_sync

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = api_command(0)


def test_a_missing_setting_ends_the_process_with_one_line(tmp_path: Path) -> None:
    environment = outside_environment() | {"BROKER__URL": "http://user:hidden@host", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(COMMAND, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    lines = ended.stderr.strip().splitlines()
    assert ended.returncode == 2
    assert len(lines) == 1
    assert "DATABASE__URL: is not set" in lines[0]
    assert "BROKER__URL: expected" in lines[0]
    assert "hidden" not in lines[0]


def test_the_process_serves_logs_json_and_stops(environment: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(COMMAND, cwd=ROOT, env=environment, stderr=stderr)
    try:
        until_sync(lambda: "running on" in log.read_text(), what="the API")
        line = next(each for each in _lines(log) if "running on" in each)
        url = next(word for word in json.loads(line)["event"].split() if word.startswith("http://"))
        with urllib.request.urlopen(f"{url}/openapi.json") as response:
            assert response.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
    events = [json.loads(each) for each in _lines(log)]
    assert [each["path"] for each in events if each["event"] == "http.request"] == ["/openapi.json"]


def _lines(log: Path) -> list[str]:
    return log.read_text().splitlines()

"""A Prometheus of the test's own, and the questions that it answers."""

from __future__ import annotations

import shutil
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from service.dev.servers import Server, free_port

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Prometheus", "needs_prometheus", "promtool"]

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="NOT TESTED: Prometheus is not installed (on Debian: apt install prometheus)",
)


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it; its output is in `stdout`, complaints included."""
    return subprocess.run(["promtool", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


class Prometheus(Server):
    """Prometheus with this configuration; data and log stand beside it."""

    name = "Prometheus"
    stop_signals = {"fast": signal.SIGTERM}  # noqa: RUF012

    def __init__(self, configuration: Path) -> None:
        super().__init__(configuration.with_suffix(".log"))
        self._configuration = configuration
        self._url = f"http://127.0.0.1:{free_port()}"

    def ask(self, what: str, **parameters: str) -> Any:
        """The data that its API answers with: `ask("query", query="up")`."""
        answer = httpx.get(f"{self._url}/api/v1/{what}", params=parameters, timeout=30, trust_env=False).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def values(self, query: str) -> list[float]:
        """What the query returns now."""
        return [float(sample["value"][1]) for sample in self.ask("query", query=query)["result"]]

    def _launch(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={self._configuration}",
                    f"--storage.tsdb.path={self._configuration.with_suffix('.data')}",
                    f"--web.listen-address={self._url.removeprefix('http://')}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self._url}/-/ready", timeout=2, trust_env=False).is_success
        except httpx.HTTPError:
            return False

"""The standard variables decide whether there are traces, and nothing that is wrong with them ends a process."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from service.dev.places import ROOT
from service.telemetry import tracing

if TYPE_CHECKING:
    from collections.abc import MutableMapping

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}

_IMPORTED = """
import sys
import service.api, service.worker, relay.process.loop
from service.telemetry.tracing import start_tracing, stop_tracing
start_tracing("api", "")
stop_tracing()
print(*(name for name in sys.modules if name.startswith(("opentelemetry.sdk.trace", "opentelemetry.exporter"))))
"""

_STOPPED = """
import time
from service.telemetry.tracing import created, start_tracing, stop_tracing
start_tracing("api", "")
created("parcel.sent", "1", {})
began = time.monotonic()
stop_tracing()
print(time.monotonic() - began)
"""


def started(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> list[MutableMapping[str, object]]:
    """What is logged at the start of a process with these variables, which shall not trace."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with capture_logs() as logged:
        tracing.start_tracing("api", "")
    assert tracing._tracer is None
    return logged


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_SERVICE_NAME": "shop"},
        ENDPOINT | {"OTEL_SDK_DISABLED": "True"},
        ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_these_ask_for_no_traces(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    assert started(monkeypatch, variables) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"},
        {"OTEL_TRACES_EXPORTER": "zipkin"},
        {"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "some"},
        {"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "0"},
    ],
)
def test_what_is_wrong_is_told_and_the_process_goes_on(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str]) -> None:
    [line] = started(monkeypatch, ENDPOINT | wrong)
    assert (line["event"], line["log_level"]) == ("tracing.not_started", "error")
    assert line["reason"]


@pytest.mark.slow
def test_without_them_what_makes_spans_is_not_imported() -> None:
    ran = subprocess.run([sys.executable, "-c", _IMPORTED], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr


@pytest.mark.slow
def test_what_is_left_has_two_seconds_to_be_exported(monkeypatch: pytest.MonkeyPatch, silent: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", silent)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3600")
    ran = subprocess.run([sys.executable, "-c", _STOPPED], cwd=ROOT, capture_output=True, text=True)
    assert 2 <= float(ran.stdout.split()[-1]) < 20, "the SDK would wait for half a minute"

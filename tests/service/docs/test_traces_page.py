"""`docs/traces.md` names the attributes that spans have, variables that the SDK knows, and spans that there are."""

from __future__ import annotations

import re

import pytest
from opentelemetry import environment_variables
from opentelemetry.sdk import environment_variables as sdk_variables

import service.domains
from service.dev.places import ROOT
from service.outbox.consumers import consumer_named, registered_consumers
from tests.service.docs.pages import TRACES, blocks

_OF_EVERY_SPAN = {"messaging.system", "messaging.operation.name", "messaging.operation.type"}


def test_it_has_every_attribute_of_our_spans() -> None:
    code = "".join(
        (ROOT / "service" / name).read_text() for name in ("telemetry/tracing.py", "outbox/running/runner.py")
    )
    set_ = set(re.findall(r'"(messaging\.[a-z_.]+|error\.type)"', code))
    told = set(re.findall(r"`(messaging\.[a-z_.]+|error\.type)`", TRACES.read_text()))
    assert told | _OF_EVERY_SPAN == set_


def test_the_variables_are_those_of_the_sdk() -> None:
    known = {name for module in (environment_variables, sdk_variables) for name in vars(module)}
    named = set(re.findall(r"OTEL_[A-Z_]*[A-Z]", TRACES.read_text()))
    shortened = {f"OTEL_EXPORTER_OTLP{each}" for each in re.findall(r"`(_[A-Z]+)`", TRACES.read_text())}
    assert len(named | shortened) > 10
    assert named | shortened <= known


@pytest.mark.skipif(
    not (ROOT / "service" / "domains" / "orders" / "__init__.py").exists(), reason="the example is gone"
)
def test_the_trace_that_it_shows_is_of_the_example() -> None:
    service.domains.discover()
    [trace] = blocks(TRACES, language="text")
    runs = re.findall(r"process (\S+) +(orders\.\w+)", trace.text)
    assert len(runs) == 4
    for event_type, name in runs:
        consumer = consumer_named(name)
        assert consumer is not None
        assert consumer.event.event_type == event_type
    events = {consumer.event.event_type for consumer in registered_consumers()}
    assert set(re.findall(r"create (\S+)", trace.text)) <= events

"""`docs/metrics.md` names the metrics that the code has, with their labels, and its queries ask for no others."""

from __future__ import annotations

import re

from service.telemetry import metrics
from tests.service.docs.pages import METRICS, blocks

_ROW = re.compile(r"^\| `(\w+)` \| ?([\w, ]*?) \| .+ \|$", re.MULTILINE)
_NAME = re.compile(r"\b((?:outbox|http|db|event)_[a-z_]+)")


def test_the_page_has_every_metric_with_its_labels() -> None:
    told = {name: labels.split(", ") if labels else [] for name, labels in _ROW.findall(METRICS.read_text())}
    assert told == {each.name: each.labels.split() for each in metrics.METRICS}


def test_the_queries_ask_for_what_there_is() -> None:
    [queries] = blocks(METRICS, language="promql")
    names = {each.name for each in metrics.METRICS}
    asked = {re.sub("_(bucket|count|sum)$", "", name) for name in _NAME.findall(queries.text)}
    assert len(asked) > 5
    assert asked <= names

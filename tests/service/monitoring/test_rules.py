"""Each alert has a case in which it fires and one in which it does not, a section that says what to do, and a link."""

from __future__ import annotations

import re
from typing import Any

import pytest
from ruamel.yaml import YAML

from service.dev.places import ROOT
from service.telemetry.metrics import METRICS
from tests.servers.prometheus import needs_prometheus, promtool
from tests.service.docs.pages import DOCS

MONITORING = DOCS / "monitoring"
ALERTS_PAGE = DOCS / "alerts.md"


def parsed(name: str) -> Any:
    return YAML(typ="safe", pure=True).load((MONITORING / name).read_text())


RULES = [rule for group in parsed("outbox.rules.yml")["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}


@needs_prometheus
def test_the_alerts_fire_and_do_not_fire_as_their_cases_say() -> None:
    done = promtool("test", "rules", str(MONITORING / "outbox.test.yml"))
    assert done.returncode == 0, done.stdout


@needs_prometheus
def test_the_configuration_is_valid() -> None:
    done = promtool("check", "config", str(MONITORING / "prometheus.yml"))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ALERTS)
def test_it_has_a_case_in_which_it_fires_and_one_in_which_it_does_not(name: str) -> None:
    cases = [case for test in parsed("outbox.test.yml")["tests"] for case in test["alert_rule_test"]]
    assert {bool(case["exp_alerts"]) for case in cases if case["alertname"] == name} == {True, False}


@pytest.mark.parametrize("name", ALERTS)
def test_it_leads_to_its_section(name: str) -> None:
    page, _, anchor = ALERTS[name]["annotations"]["runbook"].partition("#")
    assert ROOT / page == ALERTS_PAGE
    assert anchor == name.lower()
    assert ALERTS[name]["labels"]["severity"] in ("page", "ticket")


def test_there_is_a_section_for_each_alert_and_for_no_other() -> None:
    assert re.findall(r"^### (Outbox\w+)$", ALERTS_PAGE.read_text(), re.MULTILINE) == list(ALERTS)


def test_they_ask_for_what_is_served_and_count_no_relay_twice() -> None:
    served = {each.name for each in METRICS}
    for rule in RULES:
        asked = set(re.findall(r"\b(?<!:)((?:outbox|http|db|event)_[a-z_]+)", rule["expr"]))
        assert asked <= served
        assert not asked or "max without (instance) (" in rule["expr"]

"""Walked through completely, lanes keep what they promise; without any of their protections they do not."""

from __future__ import annotations

import pytest

from tests.proof.lanes.model import NOT_BY_COMMIT, OUT_OF_ORDER, STUCK, TWO_RUNNING, Design, Lane


@pytest.mark.parametrize(
    ("design", "states"),
    [
        (Design(), 500),
        (Design(skips=True), 500),
        (Design(cancels=1), 500),
        (Design(skips=True, cancels=1), 500),
        (Design(events=4, deaths=2), 5_000),
        (Design(events=4, deaths=2, skips=True), 5_000),
    ],
)
def test_the_design_holds(design: Design, states: int) -> None:
    lane = Lane(design)
    assert lane.walk() == set()
    assert lane.states > states


@pytest.mark.parametrize(
    ("design", "problems"),
    [
        (Design(publisher_locks=False), {TWO_RUNNING, OUT_OF_ORDER, NOT_BY_COMMIT, STUCK}),
        (Design(ending_locks=False), {STUCK}),
        (Design(looks_later=False), {TWO_RUNNING, OUT_OF_ORDER, STUCK}),
        (Design(position_later=False), {TWO_RUNNING, OUT_OF_ORDER, NOT_BY_COMMIT, STUCK}),
        (Design(resolving_locks=False), {STUCK}),
        (Design(resolving_locks=False, skips=True), {TWO_RUNNING, OUT_OF_ORDER, STUCK}),
        (Design(dead_letter_counts=False), {TWO_RUNNING, OUT_OF_ORDER}),
        (Design(cancelled_leaves=False, cancels=1), {TWO_RUNNING, OUT_OF_ORDER}),
        (Design(passes_over=False, cancels=1), {STUCK}),
    ],
)
def test_it_does_not_without_a_protection(design: Design, problems: set[str]) -> None:
    assert Lane(design).walk() == problems

"""The checker sees what is lost, what happened twice, and what a fault explains."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.proof.chaos.checker import Fault, Request, Tables, judge
from tests.proof.chaos.sink import Copy

pytestmark = pytest.mark.slow

SUBJECT = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
ASKED = Request("key", SUBJECT, "", sent=100.0, accepted=101.0)
BOOKED = Copy(at=102.0, key="a", subject=SUBJECT, consumer="chaos.confirm", attempt=1, pid=7, began=101.9)
COMPUTED = Copy(at=102.0, key="b", subject=SUBJECT, consumer="chaos.compute", attempt=1, pid=7, began=101.9)
AGAIN = replace(BOOKED, at=105.0, attempt=2, pid=8, began=104.9)


def tables(things: int = 1, bookings: int = 1, total: int | None = None, dead: bool = False, left: int = 0) -> Tables:
    return Tables(
        things=Counter({SUBJECT: things}) if things else Counter(),
        bookings=Counter({SUBJECT: bookings}) if bookings else Counter(),
        shard_total=bookings if total is None else total,
        dead={SUBJECT} if dead else set(),
        open_rows=left,
    )


def test_a_kept_promise_is_clean() -> None:
    verdict = judge([ASKED], tables(), [BOOKED, COMPUTED])
    assert verdict.clean
    assert (verdict.accepted, verdict.effects) == (1, 3)


def test_what_was_never_accepted_may_be_missing() -> None:
    assert judge([replace(ASKED, accepted=None)], tables(things=0, bookings=0), []).clean


@pytest.mark.parametrize(
    ("records", "received"),
    [
        (tables(things=0, bookings=0), [BOOKED, COMPUTED]),
        (tables(bookings=0), [BOOKED, COMPUTED]),
        (tables(), [BOOKED]),
        (tables(), [COMPUTED]),
    ],
)
def test_a_missing_effect_is_lost(records: Tables, received: list[Copy]) -> None:
    verdict = judge([ASKED], records, received)
    assert len(verdict.lost) == 1 + (not records.things)
    assert not verdict.clean


@pytest.mark.parametrize("records", [tables(things=2), tables(bookings=2), tables(total=2), tables(total=0)])
def test_an_effect_in_the_database_is_never_repeated(records: Tables) -> None:
    assert judge([ASKED], records, [BOOKED, COMPUTED], [Fault("everything broke", 0, 1000)]).duplicated


def test_an_effect_that_nobody_asked_for_is_blamed() -> None:
    assert judge([], tables(), []).duplicated
    assert judge([ASKED], tables(), [BOOKED, COMPUTED, replace(BOOKED, subject=OTHER)]).duplicated


def test_a_repeated_effect_outside_needs_a_reason() -> None:
    received = [BOOKED, COMPUTED, AGAIN]
    assert judge([ASKED], tables(), received).duplicated
    explained = judge([ASKED], tables(), received, [Fault("killed", 102.5, 103, frozenset([7]))])
    assert explained.clean
    assert explained.excused == 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault("killed another worker", 102.5, 103, frozenset([9])),
        Fault("killed long before", 50, 60, frozenset([7])),
        Fault("killed afterwards", 110, 111, frozenset([7, 8])),
        Fault("killed when the first was long completed", 103.5, 103.5, frozenset([7])),
        Fault("killed before the first began", 101.5, 101.5, frozenset([7])),
        Fault("killed is no reason to be a second", 104.95, 104.95, frozenset([8])),
        Fault("too short to lose a lease", 104.5, 104.95, frozenset([8])),
    ],
)
def test_a_fault_elsewhere_is_no_reason(fault: Fault) -> None:
    assert judge([ASKED], tables(), [BOOKED, COMPUTED, AGAIN], [fault]).duplicated


def test_a_run_that_stood_still_may_come_second() -> None:
    late = replace(AGAIN, began=101.0)
    frozen = Fault("frozen", 101.5, 104.9, frozenset([8]))
    assert judge([ASKED], tables(), [BOOKED, COMPUTED, late], [frozen]).clean
    assert judge([ASKED], tables(), [BOOKED, COMPUTED, replace(late, at=107, began=106.0)], [frozen]).duplicated


def test_a_crash_explains_one_copy_and_no_more() -> None:
    more = [replace(AGAIN, at=102.1, began=102.0, pid=7), replace(AGAIN, at=102.2, began=102.1)]
    killed = Fault("killed", 102.2, 102.2, frozenset([7]))
    assert judge([ASKED], tables(), [BOOKED, COMPUTED, more[0]], [killed]).clean
    assert len(judge([ASKED], tables(), [BOOKED, COMPUTED, *more], [killed]).duplicated) == 1
    assert judge([ASKED], tables(), [BOOKED, COMPUTED, *more], [replace(killed, began=102, ended=105)]).clean


def test_an_effect_keeps_its_key() -> None:
    received = [BOOKED, COMPUTED, replace(AGAIN, key="another")]
    killed = Fault("killed", 102.5, 103, frozenset([7]))
    assert judge([ASKED], tables(), received, [killed]).duplicated
    assert judge([ASKED], tables(), received, [replace(killed, rewinds=True)]).clean


def test_only_poison_may_die() -> None:
    assert judge([ASKED], tables(dead=True), [BOOKED, COMPUTED]).wrongly_dead
    poison = replace(ASKED, poison=True)
    assert judge([poison], tables(bookings=0, dead=True), []).clean
    assert judge([poison], tables(bookings=0), []).lost
    assert judge([poison], tables(bookings=1, dead=True), []).duplicated


def test_open_rows_are_unfinished() -> None:
    assert not judge([ASKED], tables(left=1), [BOOKED, COMPUTED]).clean


@pytest.mark.parametrize(
    ("turns", "numbers", "found"),
    [
        ([(0, 1, 0), (1, 1, 0), (0, 2, 1)], {0: 2, 1: 1}, []),
        ([(0, 2, 0), (0, 1, 2)], {0: 2}, ["out of order, 2 after 0", "out of order, 1 after 2", "1 turns of 2"]),
        ([(0, 1, 0), (0, 2, 0)], {0: 2}, ["2 at the same time as 1"]),
        ([(0, 1, 0)], {0: 2}, ["1 turns of 2"]),
    ],
)
def test_what_is_out_of_order_is_seen(
    turns: list[tuple[int, int, int]], numbers: dict[int, int], found: list[str]
) -> None:
    records = tables()
    records.turns, records.numbers = turns, numbers
    verdict = judge([ASKED], records, [BOOKED, COMPUTED])
    assert verdict.disordered == [f"key 0: {each}" for each in found]
    assert verdict.clean == (not found)


def test_a_stranded_lane_is_seen() -> None:
    records = tables()
    records.stranded = ["chaos.take_turn:0"]
    assert judge([ASKED], records, [BOOKED, COMPUTED]).disordered == ["chaos.take_turn:0: stranded"]

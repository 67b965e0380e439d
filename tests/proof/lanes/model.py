"""One lane as a machine of states, walked through completely: whoever may do something next does it.

Publishers, a worker that ends the row whose turn it is, a person with a dead letter, and somebody who cancels what
waits: each of them in a transaction at READ COMMITTED, in steps between which the others may do theirs. What is not
committed is seen by nobody else; a row that one has changed is waited for.

What must stay true is in `service/ledger/lanes.py`; `Design` can take each protection out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

TWO_RUNNING = "two at a time"
OUT_OF_ORDER = "out of order"
NOT_BY_COMMIT = "positions are not in the order of commits"
STUCK = "stuck"

PARKED, DUE, DONE, DEAD, CLOSED = "parked", "due", "done", "dead", "closed"
"""`CLOSED` has no place in the lane any more: cancelled, discarded, or replayed to its end."""


@dataclass(frozen=True)
class Design:
    """A lane, by default as it is built.

    Attributes:
        skips: Whether it goes on without a dead letter.
        publisher_locks: The publisher holds the lane's lock.
        ending_locks: So does whoever completes a delivery or lets it die.
        resolving_locks: So does whoever replays or discards.
        looks_later: What is looked at under the lock is seen as it is after the lock was granted.
        position_later: The position is taken under the lock.
        dead_letter_counts: A publisher looks for a dead letter that blocks.
        cancelled_leaves: What is cancelled while it waits loses its place.
        passes_over: Whoever waited for a row that was cancelled meanwhile looks for the one behind it.
        events: How many are published.
        deaths: How many deliveries die.
        cancels: How many are cancelled.
    """

    skips: bool = False
    publisher_locks: bool = True
    ending_locks: bool = True
    resolving_locks: bool = True
    looks_later: bool = True
    position_later: bool = True
    dead_letter_counts: bool = True
    cancelled_leaves: bool = True
    passes_over: bool = True
    events: int = 3
    deaths: int = 1
    cancels: int = 0


class Row(NamedTuple):
    position: int
    state: str


class Actor(NamedTuple):
    """Where a transaction is: at `step`, with what it works on and what it has seen."""

    step: str
    position: int = 0
    how: str = ""
    seen: int | bool | None = None


NEW, OVER, IDLE = Actor("new"), Actor("over"), Actor("idle")


class World(NamedTuple):
    """All that is committed, who holds the lock, and where everybody is."""

    rows: tuple[Row, ...]
    lock: str
    publishers: tuple[Actor, ...]
    ender: Actor
    person: Actor
    canceller: Actor
    deaths: int
    cancels: int
    next_position: int
    committed: tuple[int, ...]

    def state(self, position: int) -> str | None:
        return next((row.state for row in self.rows if row.position == position), None)

    def having(self, *states: str) -> list[int]:
        return [row.position for row in self.rows if row.state in states]

    def with_states(self, **of: str) -> tuple[Row, ...]:
        """The rows with other states, by `p<position>`."""
        rows = {row.position: row.state for row in self.rows} | {int(key[1:]): state for key, state in of.items()}
        return tuple(Row(*each) for each in sorted(rows.items()) if each[1] != CLOSED)


class Lane:
    """Walks through all states that a design can come to; `problems` says what is wrong in any of them."""

    def __init__(self, design: Design) -> None:
        self._design = design
        self.problems: set[str] = set()
        self.states = 0

    def walk(self) -> set[str]:
        """Every state once; the problems found."""
        design = self._design
        first = World((), "", (NEW,) * design.events, IDLE, IDLE, IDLE, design.deaths, design.cancels, 1, ())
        seen, waiting = {first}, deque([first])
        while waiting:
            world = waiting.popleft()
            self._judge(world)
            for after in self._next(world):
                if after not in seen:
                    seen.add(after)
                    waiting.append(after)
        self.states = len(seen)
        return self.problems

    def _judge(self, world: World) -> None:
        due, blocking = world.having(DUE), [] if self._design.skips else world.having(DEAD)
        if len(due) > 1:
            self.problems.add(TWO_RUNNING)
        if any(other < position for position in due for other in [*world.having(PARKED, DUE), *blocking]):
            self.problems.add(OUT_OF_ORDER)
        if list(world.committed) != sorted(world.committed):
            self.problems.add(NOT_BY_COMMIT)
        everybody = (*world.publishers, world.ender, world.person, world.canceller)
        quiet = all(actor in (NEW, OVER, IDLE) for actor in everybody)
        if quiet and world.having(PARKED) and not due and not blocking:
            self.problems.add(STUCK)

    def _next(self, world: World) -> Iterator[World]:
        for number, actor in enumerate(world.publishers):
            for after, publisher in self._publish(world, number, actor):
                publishers = (*world.publishers[:number], publisher, *world.publishers[number + 1 :])
                yield after._replace(publishers=publishers)
        yield from self._end(world)
        yield from self._resolve(world)
        yield from self._cancel(world)

    # The publisher: lock, look, position, commit.

    def _publish(self, world: World, number: int, actor: Actor) -> Iterator[tuple[World, Actor]]:
        design, me = self._design, f"publisher {number}"
        match actor.step:
            case "new" if not design.publisher_locks:
                looked = Actor("looked", world.next_position, seen=self._busy(world))
                yield world._replace(next_position=world.next_position + 1), looked
            case "new" if not design.looks_later:
                yield world, Actor("waits", seen=self._busy(world))
            case "new" if not design.position_later:
                yield world._replace(next_position=world.next_position + 1), Actor("waits", world.next_position)
            case "new" if not world.lock:
                yield world._replace(lock=me), Actor("locked")
            case "waits" if not world.lock:
                yield world._replace(lock=me), actor._replace(step="locked")
            case "locked":
                position, after = actor.position, world
                if not position:
                    position, after = world.next_position, world._replace(next_position=world.next_position + 1)
                seen = self._busy(world) if design.looks_later else actor.seen
                yield after, Actor("looked", position, seen=seen)
            case "looked":
                after = _unlocked(world, me)
                state = PARKED if actor.seen else DUE
                rows = world.with_states(**{f"p{actor.position}": state})
                yield after._replace(rows=rows, committed=(*world.committed, actor.position)), OVER
                yield after, OVER  # rolled back

    def _busy(self, world: World) -> bool:
        """By the newest row that has a position, and by a dead letter."""
        newest = max((row for row in world.rows if row.state != DEAD), default=None)
        blocked = self._design.dead_letter_counts and not self._design.skips and bool(world.having(DEAD))
        return blocked or (newest is not None and newest.state in (PARKED, DUE))

    def _behind(self, world: World, position: int) -> int | None:
        return min((each for each in world.having(PARKED) if each > position), default=None)

    def _held(self, world: World, position: int | None) -> bool:
        """Whether somebody is about to cancel that row, so that others wait for him."""
        return world.canceller.step == "marked" and world.canceller.position == position

    # The worker: lock, look for the next one, commit.

    def _end(self, world: World) -> Iterator[World]:
        design, ender = self._design, world.ender
        match ender.step:
            case "idle":
                for begun in _begin(world, DUE, (DONE, DEAD)[: 1 + (world.deaths > 0)]):
                    yield from _locked(world._replace(ender=begun), "ender", locks=design.ending_locks)
            case "locked" if world.state(ender.position) != DUE:  # somebody else's by now
                yield _unlocked(world, "ender")._replace(ender=IDLE)
            case "locked":
                goes_on = ender.how == DONE or design.skips
                found = self._behind(world, ender.position) if goes_on else None
                if not self._held(world, found):
                    yield world._replace(ender=ender._replace(step="looked", seen=found))
                elif not design.passes_over:
                    yield world._replace(ender=ender._replace(step="waits", seen=found))
            case "waits" if not self._held(world, ender.seen):
                yield world._replace(ender=ender._replace(step="looked"))
            case "looked":
                after = _unlocked(world, "ender")._replace(ender=IDLE)
                if world.state(ender.position) == DUE:
                    states = {f"p{ender.position}": ender.how} | _let_go(world, ender.seen)
                    rows, dead = world.with_states(**states), ender.how == DEAD
                    yield after._replace(rows=rows, deaths=world.deaths - dead)
                yield after  # rolled back

    # The person: lock, look, commit.

    def _resolve(self, world: World) -> Iterator[World]:
        design, person = self._design, world.person
        match person.step:
            case "idle":
                for begun in _begin(world, DEAD, ("replay", "discard")):
                    yield from _locked(world._replace(person=begun), "person", locks=design.resolving_locks)
            case "locked" if person.how == "replay" and design.skips:
                after = world._replace(next_position=world.next_position + 1)
                looked = person._replace(step="append", seen=self._busy(world))
                yield after._replace(person=looked)
            case "locked":
                goes_on = person.how == "discard" and not design.skips
                found = self._behind(world, person.position) if goes_on else None
                if not self._held(world, found):
                    yield world._replace(person=person._replace(step="looked", seen=found))
            case "append":
                end = world.next_position - 1
                states = {f"p{person.position}": CLOSED, f"p{end}": PARKED if person.seen else DUE}
                yield self._resolved(world, states)
            case "looked":
                state = DUE if person.how == "replay" else CLOSED
                yield self._resolved(world, {f"p{person.position}": state} | _let_go(world, person.seen))

    def _resolved(self, world: World, states: dict[str, str]) -> World:
        return _unlocked(world, "person")._replace(rows=world.with_states(**states), person=IDLE)

    # Somebody cancels what waits: without the lock, but the row is his until he commits.

    def _cancel(self, world: World) -> Iterator[World]:
        canceller = world.canceller
        if canceller == IDLE and world.cancels:
            chosen = {actor.seen for actor in (world.ender, world.person) if actor.step == "looked"}
            for position in set(world.having(PARKED)) - chosen:
                yield world._replace(canceller=Actor("marked", position), cancels=world.cancels - 1)
        elif canceller.step == "marked":
            state = CLOSED if self._design.cancelled_leaves else DONE
            rows = world.with_states(**{f"p{canceller.position}": state})
            yield world._replace(rows=rows, canceller=IDLE)
            yield world._replace(canceller=IDLE)  # rolled back


def _begin(world: World, state: str, hows: tuple[str, ...]) -> Iterator[Actor]:
    """Whatever somebody may do with a row of this state."""
    return (Actor("locked", position, how) for position in world.having(state) for how in hows)


def _locked(world: World, who: str, *, locks: bool) -> Iterator[World]:
    """It goes on from here once it has the lock."""
    if not locks:
        yield world
    elif not world.lock:
        yield world._replace(lock=who)


def _unlocked(world: World, who: str) -> World:
    return world._replace(lock="") if world.lock == who else world


def _let_go(world: World, position: int | bool | None) -> dict[str, str]:
    """The next one comes due, if it still waits."""
    return {f"p{position}": DUE} if position and world.state(int(position)) == PARKED else {}

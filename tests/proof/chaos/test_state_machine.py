"""The row's state machine against a model, rule by rule, on a real PostgreSQL.

Relays, workers, copies of messages, claims whose reply was lost, zombies that go on with a token of long ago, people
who replay: Hypothesis chooses who does what next, and the statements of the service and of the relay must answer as the
model does. Time is the database's: a row comes due when a rule moves its `due_at` into the past.

One class, however long: a rule is worth what it meets among all the others.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from service.ledger import delivering
from service.ledger.delivering import SUSPECT_FROM
from service.ledger.dispatching import NO_FLOOR, Pauses, take_due
from service.ledger.replaying import resolve
from tests.proof.chaos.bugs import BUGS
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from asyncpg.transaction import Transaction

    from service.database.driver import Connection

pytestmark = pytest.mark.slow

T = TypeVar("T")
MINUTE = timedelta(seconds=60)
_NEVER = datetime.min.replace(tzinfo=UTC)
PAUSES = Pauses(MINUTE, MINUTE, MINUTE)
ERROR = {"type": "Error", "message": "", "traceback": ""}
UNKNOWN = {"type": "Unknown", "message": "", "traceback": ""}
_INSERT = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers)
VALUES ($1, $1, 'model.happened', 1, 'model.react', 'model', '{}', '{}')
"""


@dataclass
class Row:
    """What the model knows of a row. `due` is whether the relay must act on it."""

    state: str = "pending"
    token: UUID | None = None
    attempts: int = 0
    dispatches: int = 0
    due: bool = True
    effects: int = 0
    tokens: list[UUID] = field(default_factory=list)

    @property
    def outlived(self) -> list[UUID]:
        """Claims of which another has the row now."""
        return [each for each in self.tokens if each != self.token] if self.state in ("running", "dispatched") else []

    @property
    def suspect(self) -> bool:
        """Whether it may have killed its worker, once its lease has ended."""
        return self.state == "running" and self.attempts >= SUSPECT_FROM

    def mine(self, token: UUID, *states: str) -> bool:
        """Whether a statement of this claim may change the row."""
        return self.token == token and self.state in states


class Machine(RuleBasedStateMachine):
    """One database and one row at a time is not enough: two rows, so that nobody touches the wrong one."""

    url: str
    loop: asyncio.AbstractEventLoop

    def __init__(self) -> None:
        super().__init__()
        self.connection: Connection = self.run(asyncpg.connect(self.url))
        self.relay: Connection = self.run(asyncpg.connect(self.url))
        self.run(self.connection.execute("TRUNCATE outbox_message, dead_letter"))
        self.rows: dict[UUID, Row] = {}
        for _ in range(2):
            delivery_id = uuid4()
            self.run(self.connection.execute(_INSERT, delivery_id))
            self.rows[delivery_id] = Row()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(coroutine)

    def teardown(self) -> None:
        self.run(self.connection.close())
        self.run(self.relay.close())

    def pick(self, number: int) -> tuple[UUID, Row]:
        return list(self.rows.items())[number]

    def claim_of(self, delivery_id: UUID, token: UUID) -> delivering.Claim:
        return delivering.Claim(delivery_id, token, delivery_id, "", 1, "", "", "{}", {}, 1, 1, 0.0, _NEVER)

    def a_token(self, data: st.DataObject, row: Row) -> UUID:
        """The latest claim's, or that of a zombie."""
        return data.draw(st.sampled_from(row.tokens)) if row.tokens else uuid4()

    # -- time

    @rule(number=st.integers(0, 1))
    def time_passes(self, number: int) -> None:
        delivery_id, row = self.pick(number)
        if row.state in ("pending", "dispatched", "running"):
            self.run(
                self.connection.execute(
                    "UPDATE outbox_message SET due_at = clock_timestamp() - interval '1 second' WHERE id = $1",
                    delivery_id,
                )
            )
            row.due = True

    # -- the relay

    @rule(commits=st.booleans(), spares=st.booleans())
    def dispatch(self, commits: bool, spares: bool) -> None:
        """Hand over what is due, set apart what was lost again; or publish, and die before the commit."""
        transaction, taken = self._take(spares=spares)
        self._end(transaction, taken, commits=commits)

    def _take(self, *, spares: bool) -> tuple[Transaction, set[UUID]]:
        taken = {
            delivery_id
            for delivery_id, row in self.rows.items()
            if row.due and (row.state in ("pending", "dispatched") or (row.state == "running" and not spares))
        }
        transaction = self.relay.transaction()
        self.run(transaction.start())
        batch = self.run(take_due(self.relay, "model", NO_FLOOR, 10, PAUSES, expired_leases=not spares))
        handed_over = {UUID(each.delivery_id) for each in (batch.deliveries if batch else [])}
        assert handed_over == {delivery_id for delivery_id in taken if not self.rows[delivery_id].suspect}
        assert (batch.suspects if batch else 0) == len(taken) - len(handed_over)
        return transaction, taken

    def _end(self, transaction: Transaction, taken: set[UUID], *, commits: bool) -> None:
        self.run(transaction.commit() if commits else transaction.rollback())
        for delivery_id in taken if commits else ():
            row = self.rows[delivery_id]
            row.due = False
            if row.suspect:
                row.state = "pending"
            else:
                row.state, row.dispatches = "dispatched", row.dispatches + 1

    @rule(commits=st.booleans())
    def dispatch_slowly(self, commits: bool) -> None:
        """A message reaches a worker before the relay's commit: it passes over the row, then waits and has it."""
        self.time_passes(0)
        transaction, taken = self._take(spares=False)
        claims: list[tuple[UUID, UUID, asyncio.Task[delivering.Claim | None]]] = []
        for delivery_id in [each for each, row in self.rows.items() if each in taken and not row.suspect][:1]:
            token = uuid4()
            assert self.run(delivering.claim_free(self.connection, [(delivery_id, token)], MINUTE)) == []
            claim = self.loop.create_task(delivering.claim(self.connection, delivery_id, token, MINUTE))
            claims.append((delivery_id, token, claim))
            self.run(until(self._somebody_waits, what="the claim to wait for the relay"))
        self._end(transaction, taken, commits=commits)
        for delivery_id, token, claim in claims:
            self._check_claim(delivery_id, token, self.run(_result(claim)))

    async def _somebody_waits(self) -> bool:
        return bool(
            await self.relay.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
        )

    @rule()
    def dispatch_late(self) -> None:
        """Everything came due meanwhile: after an outage, or with no relay for a while."""
        for number in (0, 1):
            self.time_passes(number)
        self.dispatch(commits=True, spares=False)

    # -- workers, each of which may be a zombie

    @rule(number=st.integers(0, 1))
    def claim(self, number: int) -> None:
        """A message arrives, wanted or not: a copy, one from before a flush, one before its own dispatch committed."""
        self._claim(self.pick(number)[0], uuid4())

    @rule(data=st.data())
    def claim_together(self, data: st.DataObject) -> None:
        """Messages of both rows arrive at once, new ones or ones whose claim's reply was lost."""
        asked = {
            delivery_id: self.a_token(data, row) if data.draw(st.booleans()) else uuid4()
            for delivery_id, row in self.rows.items()
        }
        found = self.run(delivering.claim_free(self.connection, list(asked.items()), MINUTE))
        claims = {claim.id: claim for claim in found}
        assert all(claim.token == asked[claim.id] for claim in found)
        for delivery_id, token in asked.items():
            self._check_claim(delivery_id, token, claims.get(delivery_id))

    @precondition(lambda self: any(row.state == "running" for row in self.rows.values()))
    @rule()
    def lose_to_another(self) -> None:
        """Its lease ends while it stands still, and another worker gets a copy of the message."""
        number = next(number for number in (0, 1) if self.pick(number)[1].state == "running")
        self.time_passes(number)
        self._claim(self.pick(number)[0], uuid4())

    @rule(number=st.integers(0, 1), data=st.data())
    def claim_again(self, number: int, data: st.DataObject) -> None:
        """The reply was lost, and the worker asks again with its token."""
        delivery_id, row = self.pick(number)
        self._claim(delivery_id, self.a_token(data, row))

    def _claim(self, delivery_id: UUID, token: UUID) -> None:
        self._check_claim(delivery_id, token, self.run(delivering.claim(self.connection, delivery_id, token, MINUTE)))

    def _check_claim(self, delivery_id: UUID, token: UUID, claimed: delivering.Claim | None) -> None:
        row = self.rows[delivery_id]
        repeated = row.mine(token, "running")
        free = row.state in ("pending", "running") and row.due and not row.suspect
        allowed = row.state == "dispatched" or free or repeated
        assert (claimed is not None) == allowed
        if claimed is not None:
            row.attempts += not repeated
            assert claimed.attempts == row.attempts
            row.state, row.token, row.due = "running", token, False
            row.tokens.append(token)

    @rule(number=st.integers(0, 1), data=st.data(), reply_lost=st.booleans())
    def complete(self, number: int, data: st.DataObject, reply_lost: bool) -> None:
        """Tick off and take effect; if the reply is lost, the same worker tries it all again."""
        delivery_id, row = self.pick(number)
        claim = self.claim_of(delivery_id, self.a_token(data, row))
        for _ in range(1 + reply_lost):
            allowed = row.mine(claim.token, "running", "dispatched")
            assert self.run(delivering.complete(self.connection, claim)) == allowed
            if allowed:
                row.state, row.due = "completed", False
                row.effects += 1

    @rule(number=st.integers(0, 1), data=st.data())
    def complete_in_transaction(self, number: int, data: st.DataObject) -> None:
        delivery_id, row = self.pick(number)
        claim = self.claim_of(delivery_id, self.a_token(data, row))
        allowed = row.mine(claim.token, "running", "dispatched")
        transaction = self.connection.transaction()
        self.run(transaction.start())
        self.run(self.connection.execute(f"SET LOCAL outbox.transaction = '{claim.token}'"))
        unbroken, completed = self.run(delivering.complete_in_transaction(self.connection, claim))
        assert unbroken
        assert completed == allowed
        self.run(transaction.commit())
        if allowed:
            row.state, row.due = "completed", False
            row.effects += 1

    @rule(number=st.integers(0, 1), data=st.data())
    def fail(self, number: int, data: st.DataObject) -> None:
        delivery_id, row = self.pick(number)
        claim = self.claim_of(delivery_id, self.a_token(data, row))
        allowed = row.mine(claim.token, "running")
        assert self.run(delivering.fail(self.connection, claim, ERROR, MINUTE)) == allowed
        if allowed:
            row.state, row.due, row.token = "pending", False, None

    @rule(number=st.integers(0, 1), data=st.data())
    def release(self, number: int, data: st.DataObject) -> None:
        delivery_id, row = self.pick(number)
        claim = self.claim_of(delivery_id, self.a_token(data, row))
        allowed = row.mine(claim.token, "running")
        self.run(delivering.release(self.connection, claim))
        if allowed:
            row.state, row.due, row.attempts, row.token = "pending", True, row.attempts - 1, None

    @rule(number=st.integers(0, 1), data=st.data(), overdue=st.booleans())
    def release_unknown(self, number: int, data: st.DataObject, overdue: bool) -> None:
        """A worker that does not know the consumer puts the row back, until that has gone on for too long."""
        delivery_id, row = self.pick(number)
        claim = self.claim_of(delivery_id, self.a_token(data, row))
        allowed = row.mine(claim.token, "running")
        patience = -MINUTE if overdue else MINUTE * 60
        answer = delivering.postpone(self.connection, claim, UNKNOWN, MINUTE, patience)
        assert self.run(answer) == (allowed and overdue)
        if allowed:
            row.state, row.due, row.attempts = "pending", False, row.attempts - 1
        if allowed and overdue:
            died = delivering.die(self.connection, claim, UNKNOWN, "nobody knows it", states=("pending",))
            assert self.run(died) is not None
            row.state = "dead"

    @rule(number=st.integers(0, 1), data=st.data())
    def heartbeat(self, number: int, data: st.DataObject) -> None:
        delivery_id, row = self.pick(number)
        self._beat(delivery_id, self.a_token(data, row))

    @precondition(lambda self: any(row.outlived for row in self.rows.values()))
    @rule()
    def beat_for_another(self) -> None:
        """A zombie's heart beats when the lease of whoever has its row by now has ended."""
        number = next(number for number in (0, 1) if self.pick(number)[1].outlived)
        self.time_passes(number)
        delivery_id, row = self.pick(number)
        self._beat(delivery_id, row.outlived[0])

    def _beat(self, delivery_id: UUID, token: UUID) -> None:
        row = self.rows[delivery_id]
        self.run(delivering.heartbeat(self.connection, [(delivery_id, token, MINUTE * 60)], MINUTE))
        if row.mine(token, "running", "dispatched"):
            row.state, row.due = "running", False

    # -- the end, and people

    @rule(number=st.integers(0, 1), data=st.data())
    def die(self, number: int, data: st.DataObject) -> None:
        delivery_id, row = self.pick(number)
        claim = self.claim_of(delivery_id, self.a_token(data, row))
        allowed = row.mine(claim.token, "running")
        assert (self.run(delivering.die(self.connection, claim, ERROR, "the rule says so")) is not None) == allowed
        if allowed:
            row.state, row.due = "dead", False

    @rule(twice=st.booleans())
    def replay(self, twice: bool) -> None:
        """Everything that is dead, once or by two people."""
        ids = [each["id"] for each in self.run(self.connection.fetch("SELECT id FROM dead_letter"))]
        for _ in range(1 + twice):
            expected = [row for row in self.rows.values() if row.state == "dead"]
            headway = self.run(resolve(self.connection, "replay", ids, by="model", why=None))
            assert len(headway.done) == len(expected)
            for row in expected:
                row.state, row.due, row.attempts, row.dispatches, row.token = "pending", True, 0, 0, None

    @precondition(lambda self: any(row.state == "dead" for row in self.rows.values()))
    @rule()
    def discard(self) -> None:
        """Everything that is dead; a replay that comes later finds nothing."""
        ids = [each["id"] for each in self.run(self.connection.fetch("SELECT id FROM dead_letter"))]
        dead = [row for row in self.rows.values() if row.state == "dead"]
        assert len(self.run(resolve(self.connection, "discard", ids, by="model", why=None)).done) == len(dead)
        for row in dead:
            row.state = "discarded"

    @precondition(lambda self: any(row.state == "completed" for row in self.rows.values()))
    @rule()
    def purge(self) -> None:
        self.run(self.connection.execute("DELETE FROM outbox_message WHERE state = 'completed'"))
        for row in self.rows.values():
            if row.state == "completed":
                row.state = "purged"

    # -- what is always true

    @invariant()
    def rows_are_as_the_model_says(self) -> None:
        found = {
            row["id"]: (row["state"], row["attempts"], row["dispatches"], row["claim_token"], row["due"])
            for row in self.run(
                self.connection.fetch(
                    "SELECT *, due_at <= clock_timestamp() AND state <> 'completed' AS due FROM outbox_message"
                )
            )
        }
        expected = {
            delivery_id: (row.state, row.attempts, row.dispatches, row.token, row.due)
            for delivery_id, row in self.rows.items()
            if row.state not in ("dead", "discarded", "purged")
        }
        assert found == expected

    @invariant()
    def no_effect_happens_twice(self) -> None:
        assert all(row.effects <= 1 for row in self.rows.values())

    @invariant()
    def the_dead_are_kept(self) -> None:
        open_letters = self.run(self.connection.fetchval("SELECT count(*) FROM dead_letter WHERE resolution IS NULL"))
        assert open_letters == sum(row.state == "dead" for row in self.rows.values())


async def _result(task: asyncio.Task[T]) -> T:
    return await asyncio.wait_for(task, 10)


@pytest.fixture
def machine(database_url: str) -> Iterator[type[Machine]]:
    """The machine, bound to this test's database."""
    with asyncio.Runner() as runner:

        class Bound(Machine):
            url = database_url
            loop = runner.get_loop()

        yield Bound


SETTINGS = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_the_statements_answer_as_the_model_does(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=SETTINGS)


@pytest.mark.parametrize("bug", ["no_fence", "narrow_claim", "heartbeat_without_token"])
def test_a_planted_bug_contradicts_the_model(machine: type[Machine], monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    for name, statement in list(vars(delivering).items()):
        if isinstance(statement, str):
            monkeypatch.setattr(delivering, name, statement)  # as it is, to be restored
    BUGS[bug]()
    first = settings(SETTINGS, phases=(Phase.generate,), report_multiple_bugs=False)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=first)

"""Replays and discards of many are stopped, killed and gone on with; and who did what is on record."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
import pytest

from service.ledger import operations
from service.ledger.replaying import carry_out, resolve
from tests.waiting import until, until_sync

if TYPE_CHECKING:
    import subprocess
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from service.database.driver import Connection
    from tests.proof.cli.conftest import Outbox, Rows

    Start = Callable[[Sequence[str]], subprocess.Popen[str]]

T = TypeVar("T")

_REPLAYED = "SELECT count(*) FROM dead_letter WHERE resolution = 'replayed'"
_MESSAGES = "SELECT count(*) FROM outbox_message"
_COUNTS = "SELECT state, total, done, refused FROM outbox_operation"
_LONG_AGO = "UPDATE outbox_operation SET seen_at = seen_at - interval '1 minute' WHERE state = 'running'"
_SLOWLY = ("dead-letters", "replay", "--all", "--yes", "--rate", "40", "--by", "ann", "--why", "repaired")


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    connection.terminate()


def _ask(url: str, question: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
    async def ask() -> T:
        connection = await asyncpg.connect(url)
        try:
            return await question(connection)
        finally:
            await connection.close()

    return asyncio.run(ask())


_COMMANDS = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'outbox-cli'
"""


def _killed_in_the_middle(start: Start, rows: Rows) -> int:
    """A replay of 1,000 dies; how many of them were replayed."""
    rows.dead_letter(1_000)
    process = start(_SLOWLY)
    until_sync(lambda: int(rows.sql(_MESSAGES)) > 0)
    process.kill()
    process.wait()
    # The statement that was under way commits, or does not.
    until_sync(lambda: rows.sql(_COMMANDS) == "0")
    return int(rows.sql(_MESSAGES))


def test_a_replay_that_is_killed_says_how_far_it_came_and_goes_on(start: Start, outbox: Outbox, rows: Rows) -> None:
    done = _killed_in_the_middle(start, rows)
    assert 0 < done < 1_000
    assert rows.sql(_COUNTS) == f"running|1000|{done}|0"
    assert rows.sql(_REPLAYED) == str(done)
    rows.dead_letter(2)
    ran = outbox("operations", "resume", "1")
    assert (ran.code, "operation 1 is running" in ran.err) == (1, True), "its process may be there"
    rows.sql(_LONG_AGO)
    [listed] = outbox("operations", "list", "--unfinished", "--json").json["operations"]
    assert (listed["state"], listed["done"], listed["total"]) == ("interrupted", done, 1_000)
    assert "interrupted" in outbox("operations", "list").out
    assert "outbox operations resume 1" in outbox("operations", "show", "1").out
    ran = outbox("operations", "resume", "1", "--rate", "100000", "--by", "bob")
    assert (ran.code, ran.out) == (0, f"Replayed {1_000 - done} dead letters.\n")
    assert rows.sql(f"{_COUNTS} WHERE kind = 'replay'") == "finished|1000|1000|0"
    assert rows.sql(_REPLAYED) == "1000", "and not what died later"
    assert rows.sql("SELECT DISTINCT resolved_by, resolved_why FROM dead_letter WHERE id < 1001") == "ann|repaired"
    ran = outbox("operations", "resume", "1")
    assert (ran.code, "operation 1 is finished" in ran.err) == (4, True)


def test_an_interrupted_one_can_be_resumed_at_once(start: Start, outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter(1_000)
    process = start(_SLOWLY)
    until_sync(lambda: int(rows.sql(_MESSAGES)) > 0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "outbox operations resume 1" in err
    done = rows.sql(_MESSAGES)
    assert rows.sql(_COUNTS) == f"stopped|1000|{done}|0"
    assert outbox("operations", "resume", "1", "--rate", "100000").code == 0
    assert rows.sql(_MESSAGES) == "1000"


def test_somebody_else_stops_one(start: Start, outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter(1_000)
    process = start(_SLOWLY)
    until_sync(lambda: int(rows.sql(_MESSAGES)) > 0)
    ran = outbox("operations", "stop", "1", "--by", "bob", "--why", "too fast")
    assert (ran.code, ran.out) == (0, "Stopped operation 1.\n")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Somebody else stopped it" in err
    assert rows.sql(_MESSAGES) == rows.sql("SELECT done FROM outbox_operation WHERE kind = 'replay'")
    ran = outbox("operations", "stop", "1")
    assert (ran.code, "was not running: it is stopped" in ran.err) == (4, True)
    assert rows.sql("SELECT asked_by, why, about FROM outbox_operation WHERE kind = 'stop'") == (
        'bob|too fast|{"operation": 1}'
    )


@pytest.mark.slow
async def test_of_two_processes_one_goes_on(connection: Connection, rows: Rows) -> None:
    """The first one stood still for so long that it was taken for dead."""
    rows.dead_letter(3)
    number = await operations.plan(connection, "replay", [1, 2, 3], about={}, by="ann", why=None, rate=1)
    first = await operations.take(connection, number, by="ann")
    assert first is not None
    assert await operations.take(connection, number, by="bob") is None
    rows.sql(_LONG_AGO)
    second = await operations.take(connection, number, by="bob")
    assert second is not None
    headway = await carry_out(connection, number, first)
    assert (headway.done, headway.stopped) == ([], True)
    assert (await carry_out(connection, number, second)).done == [1, 2, 3]


@pytest.mark.slow
async def test_a_stop_ends_a_long_rest(connection: Connection, rows: Rows, database_url: str) -> None:
    rows.dead_letter(2)
    slow = asyncio.create_task(resolve(connection, "discard", [1, 2], by="ann", why=None, rate=0.001))
    await until(lambda: rows.sql("SELECT done FROM outbox_operation") == "1")
    other = await asyncpg.connect(database_url)
    assert await operations.stop(other, 1, by="bob")
    await other.close()
    headway = await slow
    assert (headway.done, headway.stopped) == ([1], True)


async def test_a_batch_and_its_count_are_one_transaction(connection: Connection, rows: Rows) -> None:
    rows.dead_letter(300)
    rows.sql("ALTER TABLE outbox_operation ADD CHECK (done < 250)")
    with pytest.raises(asyncpg.CheckViolationError):
        await resolve(connection, "replay", range(1, 301), by="ann", why=None)
    assert rows.sql(_COUNTS) == "running|300|200|0"
    assert rows.sql(_MESSAGES) == "200"


def test_those_left_alone_are_counted_and_told(database_url: str, outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter(3)
    outbox("dead-letters", "discard", "2", "--by", "ann")
    headway = _ask(database_url, lambda connection: resolve(connection, "replay", [1, 2, 3], by="bob", why=None))
    assert headway.refused == [2]
    assert "dead letter 2 was discarded by ann at 20" in outbox("operations", "show", "2").out
    shown = outbox("operations", "show", "2", "--json").json
    assert (shown["done"], shown["refused"], shown["refused_ids"]) == (2, 1, [2])


def test_what_was_only_looked_at_is_nobodys_act(database_url: str, outbox: Outbox, rows: Rows) -> None:
    def plan(connection: Connection) -> Coroutine[Any, Any, int]:
        return operations.plan(connection, "replay", [1, 2], about={}, by="ann", why=None)

    rows.dead_letter(2)
    _ask(database_url, plan)
    assert outbox("operations", "list").out == "There are none.\n"
    assert outbox("audit").out == "Nobody did anything.\n"
    rows.sql("UPDATE outbox_operation SET asked_at = asked_at - interval '2 days'")
    number = _ask(database_url, plan)
    assert rows.sql("SELECT id FROM outbox_operation") == str(number), "forgotten after a day"
    assert outbox("operations", "resume", str(number), "--by", "ann").code == 0
    assert rows.sql("SELECT kind FROM outbox_operation") == "replay", "it began, and was not resumed"


def test_more_than_one_operation_takes_is_said(outbox: Outbox, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "MOST", 2)
    rows.dead_letter(3)
    ran = outbox("dead-letters", "replay", "--all", "--yes")
    assert (ran.code, ran.out) == (1, "Replayed 2 dead letters.\n")
    assert "the same command goes on with them" in ran.err
    assert outbox("dead-letters", "replay", "--all", "--yes").out == "Replayed dead letter 3.\n"


def test_the_audit_says_who_did_what_and_why(outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter(3)
    outbox("queues", "pause", "email", "--by", "ann", "--why", "mail server down")
    outbox("queues", "pause", "email", "--by", "bob")  # it was
    outbox("queues", "resume", "email", "--by", "bob", "--why", "it is back")
    filters = ("--consumer", "orders.send_confirmation", "--error", "550")
    outbox("dead-letters", "replay", *filters, "--yes", "--by", "bob")
    rows.message(state="'completed'", completed_at="now()", payload="""'{"who": "carol@example.com"}'""")
    outbox("erase", "carol@example.com", "--why", "request 17", "--by", "eve", "--yes")
    acts = outbox("audit", "--json").json["acts"]
    assert [(each["by"], each["did"], each["why"]) for each in acts] == [
        ("eve", "erased 1 deliveries", "request 17"),
        ("bob", "replayed 3 dead letters (operation 3, finished): error 550, consumer orders.send_confirmation", None),
        ("bob", "resumed queue email", "it is back"),
        ("ann", "paused queue email", "mail server down"),
    ]
    assert {each["role"] for each in acts} == {"postgres"}
    assert [each["kind"] for each in outbox("audit", "--by", "AN", "--json").json["acts"]] == ["pause"]
    assert [each["by"] for each in outbox("audit", "--kind", "erase", "--json").json["acts"]] == ["eve"]
    assert outbox("audit", "--until", "1h").out == "Nobody did anything.\n"
    assert "Operation 1: paused queue email\n" in outbox("operations", "show", "1").out
    ran = outbox("audit", "--limit", "1")
    assert (len(ran.out.splitlines()), "The latest 1" in ran.err) == (2, True)
    assert max(map(len, outbox("audit").out.splitlines())) <= 80


def test_no_payload_is_in_an_operation(outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter(2, payload="""'{"secret": "0193-in-the-payload"}'""")
    outbox("dead-letters", "replay", "--all", "--yes")
    assert "in-the-payload" not in json.dumps(outbox("operations", "show", "1", "--json").json)
    assert rows.sql("SELECT count(*) FROM outbox_operation o WHERE o::text LIKE '%in-the-payload%'") == "0"


@pytest.mark.parametrize("verb", ["show", "resume", "stop"])
def test_an_unknown_one_is_named(outbox: Outbox, verb: str) -> None:
    for number in ("9", "9" * 30):
        ran = outbox("operations", verb, number)
        assert (ran.code, f"there is no operation {number}" in ran.err) == (4, True)

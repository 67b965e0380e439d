"""People: they replay while deliveries run, twice at once, thousands, discard and purge meanwhile, and deploy."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from uuid import UUID, uuid4

from tests.proof.chaos.checker import Request
from tests.proof.chaos.scenario import scenario
from tests.proof.chaos.world import LONGER_THAN_A_LEASE, SHORT, Plan, World
from tests.waiting import until

_OLD = {"worker-1": {"CHAOS_OLD": "1"}}
_LIBFAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"

_DIE = """
WITH dead AS (DELETE FROM outbox_message WHERE consumer = $1 AND state <> 'completed' RETURNING *)
INSERT INTO dead_letter (message_id, event_id, event_type, version, consumer, queue, payload, headers, attempts,
                         dispatches, created_at, errors, reason)
SELECT id, event_id, event_type, version, consumer, queue, payload, headers, attempts, dispatches, created_at, errors,
       'moved by the suite' FROM dead
"""


async def outbox(world: World, *arguments: str, expected: tuple[int, ...] = (0,)) -> str:
    """Run the command line, as a person would."""
    program = str(Path(sys.executable).with_name("outbox"))
    process = await asyncio.create_subprocess_exec(
        program, *arguments, env=world.environment("operator"),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            out, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode in expected, (arguments, process.returncode, out[-300:], errors[-500:])
    return out.decode()


async def _insert_dead_letters(world: World, count: int) -> list[str]:
    """Dead letters of accepted requests, whose effect has yet to happen; their subjects."""
    subjects = [str(UUID(int=world.dice.getrandbits(128), version=4)) for _ in range(count)]
    ids = [UUID(int=world.dice.getrandbits(128), version=4) for _ in range(count)]
    await world.sql("INSERT INTO thing SELECT unnest($1::uuid[]), ''", subjects)
    for consumer, queue, step in (("chaos.book", "stock", 1), ("chaos.compute", "mail", 2)):
        await world.sql(
            """INSERT INTO dead_letter (message_id, event_id, event_type, version, consumer, queue, payload, headers,
                                        attempts, dispatches, created_at, errors, reason)
               SELECT message, event, 'chaos.made', 1, $3, $4, jsonb_build_object('subject_id', subject, 'how', ''),
                      '{}', 11, 11, clock_timestamp(), '[]', 'failed 11 times'
               FROM unnest($1::uuid[], $2::uuid[], $5::uuid[]) AS given (event, message, subject)""",
            ids, [UUID(int=each.int ^ step) for each in ids], consumer, queue, subjects,
        )  # fmt: skip
    return subjects


def _accept(world: World, subjects: list[str]) -> None:
    world.ledger.requests += [Request(str(uuid4()), each, "", world.began, world.began) for each in subjects]


_REPLAY_ALL = ("dead-letters", "replay", "--all", "--yes", "--json")


async def _purge_until(world: World, over: asyncio.Event) -> int:
    """Purge what was completed a moment ago, again and again; how many rows are gone."""
    removed = 0
    while not over.is_set():
        answer = json.loads(await outbox(world, "purge", "--older-than", "1s", "--json"))
        removed += answer.get("messages", 0)
    return removed


@scenario(within=60)
async def replays_at_once(world: World) -> None:
    """Two thousand dead letters are replayed by three people at once, while what is completed is purged at once."""
    _accept(world, await _insert_dead_letters(world, 1000))
    over = asyncio.Event()
    purging = asyncio.create_task(_purge_until(world, over))
    try:
        await asyncio.gather(*(outbox(world, *_REPLAY_ALL) for _ in range(3)))
        await world.wait(2)
    finally:
        over.set()
        removed = await purging
    assert removed > 0, "the purge found nothing to race for"
    resolutions = await world.sql("SELECT count(*) FROM dead_letter WHERE resolution IS DISTINCT FROM 'replayed'")
    assert resolutions[0][0] == 0, resolutions
    await world.sql("DELETE FROM dead_letter WHERE resolution = 'replayed'")


@scenario(within=60)
async def replay_races_discard(world: World) -> None:
    """Some replay what others discard: each dead letter is one or the other, and its effect happens or does not."""
    subjects = await _insert_dead_letters(world, 300)
    _accept(world, subjects)
    # Only the first effect of each is raced for; the second is replayed in peace.
    await outbox(world, "dead-letters", "replay", "--consumer", "chaos.compute", "--yes")
    which = ("--consumer", "chaos.book", "--yes", "--json")
    replayed, discarded = await asyncio.gather(
        outbox(world, "dead-letters", "replay", *which), outbox(world, "dead-letters", "discard", *which)
    )
    done = [set(json.loads(each)["done"]) for each in (replayed, discarded)]
    assert not done[0] & done[1], "replayed and discarded"
    rows = await world.sql(
        "SELECT payload ->> 'subject_id' AS subject, resolution FROM dead_letter WHERE consumer = 'chaos.book'"
    )
    assert len(rows) == len(done[0] | done[1]) == 300
    given_up = {row["subject"] for row in rows if row["resolution"] == "discarded"}
    world.ledger.requests = [each for each in world.ledger.requests if each.subject not in given_up]
    await world.sql("DELETE FROM thing WHERE subject_id = ANY($1::uuid[])", list(given_up))
    world.sink_ignores = given_up
    await world.sql("DELETE FROM dead_letter WHERE resolution IS NOT NULL")


@scenario(within=40)
async def replay_while_live(world: World) -> None:
    """Rows that a worker is running, or has in its queue, die and are replayed at that moment, again and again."""
    for _ in range(6):
        await world.wait(0.7)
        await world.sql(_DIE, "chaos.book")
        await outbox(world, *_REPLAY_ALL)
    await world.sql("DELETE FROM dead_letter WHERE resolution IS NOT NULL")


# A command takes seconds on a machine with much to do, and who stood still must not have to end when it goes on.
_ZOMBIE = Plan(gaps="worker.mid_effect=stop:1", struck="worker-1", settings={**SHORT, "OUTBOX__TIME_LIMIT": "30000"})


async def _stand_still(world: World) -> None:
    """Make a process of worker-1 stop in mid-effect."""
    before = world.struck()["worker.mid_effect"]
    world.arm("worker.mid_effect", once=True)
    await until(lambda: world.struck()["worker.mid_effect"] > before, what="a zombie")


async def _go_on(world: World) -> None:
    """Let it go on, and see that it finds its row to be somebody else's."""
    before = world.fleet.log("worker-1").count("outbox.lease_lost")
    world.resume()
    await until(lambda: world.fleet.log("worker-1").count("outbox.lease_lost") > before, what="a lost lease")


@scenario(_ZOMBIE)
async def zombies_of_replayed_rows(world: World) -> None:
    """A worker stands still in mid-effect; its row dies, is replayed and completed; then it goes on."""
    for _ in range(3):
        await _stand_still(world)
        await world.sql(_DIE, "chaos.book")
        await outbox(world, *_REPLAY_ALL)
        await world.wait(1.5)
        await _go_on(world)
    await world.sql("DELETE FROM dead_letter WHERE resolution IS NOT NULL")


@scenario(_ZOMBIE)
async def zombies_of_purged_rows(world: World) -> None:
    """A worker stands still in mid-effect; its row is completed by another and purged; then it goes on."""
    for _ in range(2):
        await _stand_still(world)
        await world.wait(LONGER_THAN_A_LEASE)
        await world.sql("DELETE FROM outbox_message WHERE state = 'completed'")
        await _go_on(world)
        await world.wait(1)


@scenario(_ZOMBIE)
async def discard_races_work(world: World) -> None:
    """Rows that workers run, or have before them, die and are discarded; none of them takes effect after that."""
    given_up: set[str] = set()
    for _ in range(3):
        await _stand_still(world)
        await world.sql(_DIE, "chaos.book")
        await outbox(world, "dead-letters", "discard", "--all", "--yes")
        await _go_on(world)
        await world.wait(1)
    await world.ledger.stop_load()
    rows = await world.sql("SELECT payload ->> 'subject_id' AS subject, resolution FROM dead_letter")
    assert {row["resolution"] for row in rows} == {"discarded"}
    given_up = {row["subject"] for row in rows}
    booked = await world.sql("SELECT subject_id FROM booking WHERE subject_id = ANY($1::uuid[])", list(given_up))
    assert booked == [], "a discarded delivery took effect"
    world.ledger.requests = [each for each in world.ledger.requests if each.subject not in given_up]
    world.sink_ignores = given_up
    await world.sql("DELETE FROM thing WHERE subject_id = ANY($1::uuid[])", list(given_up))
    await world.sql("DELETE FROM dead_letter WHERE resolution IS NOT NULL")


@scenario(attempts=1)
async def rolling_restart(world: World) -> None:
    """Every process is stopped and started in turn, under load; nothing excuses a repeated effect."""
    for name in world.fleet.names():
        await world.fleet.stop(name)
        await world.fleet.start(name)


@scenario(attempts=1)
async def terminated_anyhow(world: World) -> None:
    """SIGTERM to workers and relays at random; they end in good order, so nothing excuses a repeated effect."""
    for _ in range(8):
        world.fleet.terminate(world.dice.choice([*world.fleet.names("worker"), *world.fleet.names("relay")]))
        await world.wait(1.2)


@scenario(Plan(extra=_OLD), within=30, attempts=1)
async def older_worker(world: World) -> None:
    """For a while, one worker is from before a consumer that the API and the other worker know."""
    await world.wait(6)
    await world.fleet.stop("worker-1")


def _faked(offset: str) -> dict[str, str]:
    return {"LD_PRELOAD": _LIBFAKETIME, "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "CHAOS_FAKED": "1"}


_CLOCKS = {
    "api-1": _faked("+1h"),
    "api-2": _faked("-1h"),
    "relay-1": _faked("-1h"),
    "worker-1": _faked("-1h"),
    "worker-2": _faked("+1h"),
}


@scenario(Plan(extra=_CLOCKS), within=40, needs=lambda: Path(_LIBFAKETIME).exists())
async def clocks_an_hour_apart(world: World) -> None:
    """API, relays and workers disagree about the time by up to two hours, and a worker dies."""
    await world.wait(4)
    world.fleet.kill("worker-2")
    await world.wait(4)


SIX_HOURS_PASS = """
UPDATE outbox_message SET due_at = due_at - interval '6 hours', created_at = created_at - interval '6 hours',
                          dispatched_at = dispatched_at - interval '6 hours'
WHERE state <> 'completed'
"""


@scenario(Plan(settings={**SHORT, "OUTBOX__HIGH_WATER_MARK": "50"}), rate=40, within=40, attempts=1)
async def workers_off_for_two_days(world: World) -> None:
    """No worker runs while requests come in and two days pass, by the rows' own times."""
    async with world.workers_away(("stock", "mail"), least=20):
        for _ in range(8):
            await world.wait(1)
            await world.sql(SIX_HOURS_PASS)
        # Each relay counts for itself what it hands over.
        assert world.held.most_waiting <= 2 * 50, f"{world.held.most_waiting} messages wait above the high-water mark"
        assert 1 <= world.held.most_copies <= 4, f"{world.held.most_copies} copies of one row in the broker"
        await world.ledger.stop_load()

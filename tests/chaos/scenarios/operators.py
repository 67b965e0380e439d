"""People: they replay while deliveries run, twice at once, thousands, discard and purge meanwhile, and deploy."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from uuid import UUID, uuid4

from tests.chaos.checker import Request
from tests.chaos.scenario import scenario
from tests.chaos.world import SHORT, Plan, World

_OLD = {"worker-1": {"CHAOS_OLD": "1"}}
_LIBFAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"

_DIE = """
WITH dead AS (DELETE FROM outbox_message WHERE consumer = $1 AND state <> 'completed' RETURNING *)
INSERT INTO dead_letter (message_id, event_id, event_type, version, consumer, queue, payload, headers, attempts,
                         dispatches, created_at, errors, reason)
SELECT id, event_id, event_type, version, consumer, queue, payload, headers, attempts, dispatches, created_at, errors,
       'moved by the suite' FROM dead
"""


async def _outbox(world: World, *arguments: str, expected: tuple[int, ...] = (0,)) -> str:
    """Run the command line, as a person would."""
    program = str(Path(sys.executable).with_name("outbox"))
    process = await asyncio.create_subprocess_exec(
        program, *arguments, env=world.environment("operator"),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, stdin=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    out, errors = await process.communicate()
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


@scenario(within=60)
async def replays_at_once(world: World) -> None:
    """Two thousand dead letters are replayed by three people at once, while the purge runs."""
    _accept(world, await _insert_dead_letters(world, 1000))
    await asyncio.gather(*(_outbox(world, *_REPLAY_ALL) for _ in range(3)), _outbox(world, "purge"))
    resolutions = await world.sql("SELECT count(*) FROM dead_letter WHERE resolution IS DISTINCT FROM 'replayed'")
    assert resolutions[0][0] == 0, resolutions
    await world.sql("DELETE FROM dead_letter WHERE resolution = 'replayed'")


@scenario(within=60)
async def replay_races_discard(world: World) -> None:
    """Some replay what others discard: each dead letter is one or the other, and its effect happens or does not."""
    subjects = await _insert_dead_letters(world, 300)
    _accept(world, subjects)
    # Only the first effect of each is raced for; the second is replayed in peace.
    await _outbox(world, "dead-letters", "replay", "--consumer", "chaos.compute", "--yes")
    which = ("--consumer", "chaos.book", "--yes", "--json")
    replayed, discarded = await asyncio.gather(
        _outbox(world, "dead-letters", "replay", *which), _outbox(world, "dead-letters", "discard", *which)
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
        await _outbox(world, *_REPLAY_ALL)
    await world.sql("DELETE FROM dead_letter WHERE resolution IS NOT NULL")


_ZOMBIE = Plan(gaps="worker.mid_effect=stop:0.2", struck="worker-1")


@scenario(_ZOMBIE, within=40)
async def zombies_of_replayed_rows(world: World) -> None:
    """A worker stands still in mid-effect; its row dies, is replayed and completed; then it goes on."""
    world.arm()
    for _ in range(3):
        await world.wait(1.5)
        await world.sql(_DIE, "chaos.book")
        await _outbox(world, *_REPLAY_ALL)
        await world.wait(1.5)
        world.fleet.resume()
    await world.sql("DELETE FROM dead_letter WHERE resolution IS NOT NULL")


@scenario(_ZOMBIE, within=40)
async def zombies_of_purged_rows(world: World) -> None:
    """A worker stands still in mid-effect; its row is completed by another and purged; then it goes on."""
    world.arm()
    for _ in range(3):
        await world.wait(4)
        await world.sql("DELETE FROM outbox_message WHERE state = 'completed'")
        world.fleet.resume()


@scenario(Plan(apis=2), within=30)
async def rolling_restart(world: World) -> None:
    """Every process is stopped and started in turn, under load; nothing excuses a repeated effect."""
    for name in world.fleet.names():
        await world.fleet.stop(name)
        await world.fleet.start(name)


@scenario(within=30)
async def terminated_anyhow(world: World) -> None:
    """SIGTERM to workers and relays at random; they end in good order, so nothing excuses a repeated effect."""
    for _ in range(8):
        world.fleet.terminate(world.dice.choice([*world.fleet.names("worker"), *world.fleet.names("relay")]))
        await world.wait(1.2)


@scenario(Plan(extra=_OLD), within=45)
async def older_worker(world: World) -> None:
    """For a while, one worker is from before a consumer that the API and the other worker know."""
    await world.wait(6)
    await world.fleet.stop("worker-1")


def _faked(offset: str) -> dict[str, str]:
    return {"LD_PRELOAD": _LIBFAKETIME, "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "CHAOS_FAKED": "1"}


_CLOCKS = {"api-1": _faked("+1h"), "relay-1": _faked("-1h"), "worker-1": _faked("-1h"), "worker-2": _faked("+1h")}


@scenario(Plan(extra=_CLOCKS), within=40, needs=lambda: Path(_LIBFAKETIME).exists())
async def clocks_an_hour_apart(world: World) -> None:
    """API, relays and workers disagree about the time by up to two hours, and a worker dies."""
    await world.wait(4)
    world.fleet.kill("worker-2")
    await world.wait(4)


@scenario(Plan(settings={**SHORT, "OUTBOX__HIGH_WATER_MARK": "50"}), rate=40, within=60)
async def workers_off_for_two_days(world: World) -> None:
    """No worker runs while requests come in and two days pass, by the rows' own times."""
    workers = world.fleet.names("worker")
    await world.fleet.stop(*workers)
    for _ in range(8):
        await world.wait(1)
        await world.sql(
            """UPDATE outbox_message SET due_at = due_at - interval '6 hours',
                      created_at = created_at - interval '6 hours', dispatched_at = dispatched_at - interval '6 hours'
               WHERE state <> 'completed'"""
        )
    await world.ledger.stop_load()
    await world.fleet.start(*workers)

"""The demo from the first line it prints to the verdict."""

from __future__ import annotations

import asyncio
import shutil
import time
from typing import TYPE_CHECKING

from service.dev.demo.example import Load
from service.dev.demo.faults import kill_relay, kill_worker, wipe_broker
from service.dev.demo.stage import REJECTED, Stage, shortened, stage
from service.dev.demo.verdict import Holdings, Verdict, count, judge, latencies
from service.dev.places import ServerError, clone_data, scratch
from service.dev.sink import read_mails

if TYPE_CHECKING:
    from pathlib import Path

_ORDERS = 320
_QUIET_WITHIN = 60.0

_started = time.monotonic()


def _say(line: str = "") -> None:
    print(f"{time.monotonic() - _started:5.1f} s  {line}" if line else "", flush=True)


def run() -> int:
    """Play the demo; the exit status is 0 only if nothing was lost and nothing happened twice."""
    with scratch() as folder:
        try:
            passed = asyncio.run(_play(folder))
        except BaseException:
            _keep_logs(folder)
            raise
        if not passed:
            _keep_logs(folder)
    _say("everything is stopped")
    return 0 if passed else 1


def _keep_logs(folder: Path) -> None:
    kept = clone_data() / "demo-logs"
    kept.mkdir(exist_ok=True)
    for log in folder.glob("*.log"):
        shutil.copyfile(log, kept / log.name)
    print(f"the logs are in {kept}", flush=True)


async def _play(folder: Path) -> bool:
    print("Settings shortened for the demo, so that recovery takes seconds:")
    print("\n".join(f"  {line}" for line in shortened()), flush=True)
    _say("starting PostgreSQL and Valkey")
    async with stage(folder, _say) as made:
        _say(f"ready: {made.url}")
        load = Load(made.url, made.token, _ORDERS)
        progress = asyncio.create_task(_show_progress(made, load))
        try:
            await _break_things(made, load)
            await _until_quiet(made)
        finally:
            progress.cancel()
        _show_counts(load, await count(made))
        dead_before = await _repair_and_replay(made)
        return await _report(made, load, dead_before)


async def _break_things(made: Stage, load: Load) -> None:
    orders = asyncio.create_task(load.run())
    try:
        await _until_accepted(load, orders, 50)
        died = await kill_worker(made, "worker-1")
        _say(f"worker-1: SIGKILL while {died} deliveries ran in it; started again")
        await _until_accepted(load, orders, 110)
        await kill_relay(made, "relay-1")
        _say("relay-1: SIGKILL with a batch marked and not committed, which PostgreSQL rolled back; started again")
        await _until_accepted(load, orders, 170)
        load.hurry = True
        wiped = await wipe_broker(made)
        load.hurry = False
        command = "FLUSHALL" if made.own_broker else "deleted this demo's keys (the broker is yours)"
        _say(f"broker: {command} while {wiped} messages waited in it")
        await orders
    finally:
        orders.cancel()
    if load.refusals:
        raise ServerError(f"{len(load.refusals)} orders were not accepted, the first: {load.refusals[0]}")


async def _until_accepted(load: Load, orders: asyncio.Task[None], wanted: int) -> None:
    while len(load.accepted) < wanted and not orders.done():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    if orders.done():
        await orders


async def _show_progress(made: Stage, load: Load) -> None:
    while True:
        await asyncio.sleep(2)
        _show_counts(load, await count(made))


def _show_counts(load: Load, counts: Holdings) -> None:
    _say(
        f"orders {len(load.accepted):>3}/{load.wanted}  deliveries done {counts.completed:>4}, open {counts.open:>3}, "
        f"dead {counts.dead}"
    )


async def _until_quiet(made: Stage) -> None:
    deadline = time.monotonic() + _QUIET_WITHIN
    while (await count(made)).open and time.monotonic() < deadline:
        made.check()
        await asyncio.sleep(0.1)


async def _repair_and_replay(made: Stage) -> int:
    dead = (await count(made)).dead
    _say(f"{dead} e-mails to *{REJECTED} were refused for good and are dead letters:")
    await _show_command(made, "dead-letters", "list", "--limit", "3")
    made.reject_file.unlink()
    _say("the mail server is repaired")
    await _show_command(made, "dead-letters", "replay", "--all", "--yes", "--why", "mail server repaired", last=3)
    await _until_quiet(made)
    return dead


async def _show_command(made: Stage, *arguments: str, last: int = 30) -> None:
    shown = " ".join(f"'{argument}'" if " " in argument else argument for argument in arguments)
    _say(f"$ outbox {shown}")
    for line in (await made.outbox(*arguments)).splitlines()[-last:]:
        print(f"         {line}", flush=True)


async def _report(made: Stage, load: Load, dead_before: int) -> bool:
    counts, verdict = await count(made), await judge(made, load, read_mails(made.mails))
    half, most = await latencies(made, interrupted=False)
    _, most_of_all = await latencies(made, interrupted=True)
    _say()
    rows = [
        ("orders accepted", f"{len(load.accepted)}", "answered 201 over HTTP, all in PostgreSQL"),
        ("events published", f"{counts.events}", f"{counts.completed} deliveries"),
        (
            "effects: stock",
            f"{counts.confirmed + counts.rejected}",
            f"{counts.confirmed} confirmed, {counts.rejected} rejected",
        ),
        ("effects: sales", f"{counts.counted}", "orders counted"),
        ("stock taken", f"{load.stock - counts.stock_left}", f"items; the confirmed orders hold {counts.sold}"),
        ("distinct e-mails", f"{verdict.mails}", "by Message-ID, read from the mail server"),
        (
            "re-sent e-mails",
            f"{verdict.resent}",
            "same Message-ID: their worker died before it had noted that they were sent",
        ),
        ("dead letters", f"{dead_before} -> {counts.dead}", "before and after the replay"),
        (
            "handed over again",
            f"{counts.handed_over_again}",
            "deliveries whose worker or message was lost, or that waited too long",
        ),
        (
            "commit to start",
            f"{half:.0f} ms",
            f"p50, p99 {most:.0f} ms; with the interrupted ones p99 {most_of_all:.0f} ms",
        ),
    ]
    for name, number, meaning in rows:
        print(f"  {name:<18} {number:>9}  {meaning}")
    _show_findings(verdict)
    print(f"\n  lost={len(verdict.lost)} duplicated={len(verdict.duplicated)}\n", flush=True)
    return verdict.passed


def _show_findings(verdict: Verdict) -> None:
    for finding in [*verdict.lost[:10], *verdict.duplicated[:10]]:
        print(f"  ! {finding}")

"""The first page: whether all is well, and how each consumer goes."""

from __future__ import annotations

import asyncio
from itertools import groupby

from fastapi import APIRouter, Request, Response

from service.console.ledger_looks import LedgerLooks, Pace
from service.console.permissions import Viewer
from service.console.rendering import page
from service.http.callers import PUBLIC
from service.ledger.counting import Counts
from service.ledger.pausing import EVERY_QUEUE
from service.ledger.statistics import ALIVE, SeenProcess

router = APIRouter()

LATE = 300.0
"""Seconds for which something may be due before it is marked."""


@router.get("/")
async def show_overview(request: Request, caller: Viewer) -> Response:
    """Lamps, and the consumers by queue."""
    looks: LedgerLooks = request.app.state.looks
    counts, paces, processes = await asyncio.gather(looks.counts.get(), looks.paces.get(), looks.processes.get())
    alive = [each for each in processes.value or () if is_alive(each)]
    return page(
        request,
        "overview.html",
        counts=counts,
        queues=_queues(counts.value.consumers if counts.value else {}, paces.value or {}),
        pauses={each.queue: each for each in counts.value.paused} if counts.value else {},
        every_queue=EVERY_QUEUE,
        alive=alive,
        served={queue for each in alive for queue in each.queues},
        late=LATE,
    )


@router.get("/health/live", dependencies=[PUBLIC])
async def live() -> dict[str, str]:
    """Whether the process answers."""
    return {"status": "ok"}


def is_alive(process: SeenProcess) -> bool:
    """Whether it reported lately, by PostgreSQL's clock."""
    return process.unseen_for < ALIVE


def _queues(
    consumers: dict[tuple[str, str], Counts], paces: dict[tuple[str, str], Pace]
) -> list[tuple[str, list[tuple[str, Counts, Pace]]]]:
    names = sorted(consumers.keys() | paces.keys())
    return [
        (queue, [(name, consumers.get((queue, name), Counts()), paces.get((queue, name), Pace())) for _, name in each])
        for queue, each in groupby(names, key=lambda name: name[0])
    ]

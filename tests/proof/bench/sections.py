"""The benchmark's sections: which sides are measured in turns, how often, and what is to be reached."""

from __future__ import annotations

import importlib.util
import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tests.proof.bench import cold, cost, drain, effects, flat, in_order, latency, limited, onlookers, writers
from tests.proof.bench.figures import Figure
from tests.proof.bench.peers import PROMISES, QUEUES, RELAYS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.proof.bench.stage import Stage

__all__ = ["SECTIONS", "Result"]


@dataclass
class Result:
    """What was measured so far."""

    figures: list[Figure] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    plots: dict[str, dict[str, Any]] = field(default_factory=dict)
    unmeasured: list[str] = field(default_factory=list)
    """Sections that were given up: a process did not come up, or something took too long."""
    wrong: list[str] = field(default_factory=list)
    """Sections whose rows, messages or effects did not add up."""

    def add(self, *figures: Figure) -> None:
        """Add lines to the table."""
        self.figures.extend(figures)


class Section(Protocol):
    """Measures and adds to the result."""

    async def __call__(self, stage: Stage, result: Result, *, quick: bool) -> None: ...


Sides = dict[str, "Callable[[], Awaitable[float]]"]


async def _in_turns(sides: Sides, rounds: int) -> dict[str, list[float]]:
    """Every side once a round, in another order each time."""
    values: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name in random.sample(list(sides), len(sides)):
            values[name].append(await sides[name]())
    return values


def _peers_installed() -> bool:
    return importlib.util.find_spec("txoutbox") is not None


async def relay(stage: Stage, result: Result, *, quick: bool) -> None:
    """The drain to Valkey."""
    sides: Sides = {
        "relay": lambda: drain.relay(stage, 50_000 if quick else 100_000),
        "claim": lambda: drain.claim_alone(stage, 50_000 if quick else 100_000),
        "loop": lambda: drain.loop(stage, 5_000 if quick else 10_000),
    }
    values = await _in_turns(sides, 2 if quick else 4)
    ours = values["relay"]
    name, unit = "relay drain, PostgreSQL to Valkey", "rows/s"
    result.add(
        Figure(name, unit, ours, "loop of SELECT, enqueue, UPDATE", values["loop"], at_least=15),
        Figure(name, unit, ours, "its statement alone, no broker", values["claim"], at_least=0.6),
    )
    result.plots["relay-peers"] = {
        "this relay": Figure("", "", ours).value,
        "the loop of tutorials": Figure("", "", values["loop"]).value,
    }


async def relay_peers(stage: Stage, result: Result, *, quick: bool) -> None:
    """The drain to Valkey beside two other libraries' relays."""
    if not _peers_installed():
        return
    sides: Sides = {"relay": lambda: drain.relay(stage, 50_000)}
    for name in RELAYS:
        sides[f"{name}, tuned"] = lambda name=name: drain.peer(stage, name, 3_000 if quick else 15_000, tuned=True)  # type: ignore[misc]
        if not quick:
            sides[name] = lambda name=name: drain.peer(stage, name, 5_000, tuned=False)  # type: ignore[misc]
    values = await _in_turns(sides, 1 if quick else 2)
    ours = values.pop("relay")
    targets = {"txoutbox, tuned": 4.0, "faststream_outbox, tuned": 15.0}
    for name, theirs in values.items():
        result.add(
            Figure("relay drain, PostgreSQL to Valkey", "rows/s", ours, name, theirs, at_least=targets.get(name))
        )
    plot = result.plots.setdefault("relay-peers", {"this relay": Figure("", "", ours).value})
    plot |= {name: Figure("", "", theirs).value for name, theirs in values.items()}


async def rabbitmq(stage: Stage, result: Result, *, quick: bool) -> None:
    """The drain to RabbitMQ."""
    if stage.rabbitmq is None:
        result.texts.append("RabbitMQ is not installed here: its figures are missing.")
        return
    sides: Sides = {
        "relay": lambda: drain.relay(stage, 10_000 if quick else 30_000, "rabbitmq"),
        "loop": lambda: drain.loop(stage, 2_000 if quick else 5_000, "rabbitmq"),
    }
    values = await _in_turns(sides, 1 if quick else 3)
    against = "loop with confirm_delivery=True"
    result.add(
        Figure("relay drain to RabbitMQ, confirmed", "rows/s", values["relay"], against, values["loop"], at_least=3.5)
    )


async def commits(stage: Stage, result: Result, *, quick: bool) -> None:
    """What the wake-up costs those who commit."""
    seconds = 3 if quick else 5
    for writers_ in (16, 64):
        sides: Sides = {
            "gated": lambda n=writers_: writers.commits(stage, n, seconds, gated=True),  # type: ignore[misc]
            "without": lambda n=writers_: writers.commits(stage, n, seconds, gated=False),  # type: ignore[misc]
        }
        values = await _in_turns(sides, 1 if quick else 3)
        name = f"commits of {writers_} writers, with wake-up"
        result.add(
            Figure(name, "commits/s", values["gated"], "no trigger, relay polls", values["without"], at_least=0.85)
        )


async def api(stage: Stage, result: Result, *, quick: bool) -> None:
    """What publishing costs a request."""
    paths = ["/order/0", "/order/1", "/order/2", "/order/4", "/row/0", "/row/1", "/plain/row"]
    values = await writers.requests(stage, paths, 2 if quick else 5, 1_600 if quick else 3_200)
    versus = "the same handler without"
    for consumers, target in ((1, 0.9), (2, None), (4, None)):
        name = f"POST of an order with an event, consumers: {consumers}"
        ours = values[f"/order/{consumers}"]
        result.add(Figure(name, "requests/s", ours, versus, values["/order/0"], at_least=target))
    name = "POST of one row, the least a handler can do, with an event"
    result.add(Figure(name, "requests/s", values["/row/1"], versus, values["/row/0"]))
    name, versus = "POST of one row, without an event", "plain FastAPI and SQLAlchemy"
    result.add(Figure(name, "requests/s", values["/row/0"], versus, values["/plain/row"], at_least=0.8))


async def callers(stage: Stage, result: Result, *, quick: bool) -> None:
    """What it costs a request to say who is calling."""
    values = await writers.requests(stage, ["/order/1", "/mine/1"], 3 if quick else 7, 1_600 if quick else 3_200)
    name, versus = "POST of an order with an event, with a token that was verified before", "without a token"
    result.add(Figure(name, "requests/s", values["/mine/1"], versus, values["/order/1"], at_least=0.95))


async def idle_latency(stage: Stage, result: Result, *, quick: bool) -> None:
    """From commit to the start of the consumer, nothing else to do."""
    count = 100 if quick else 250
    curves: dict[str, Any] = {}
    for broker in ("valkey", *(("rabbitmq",) if stage.rabbitmq else ())):
        ours = await latency.idle(stage, count, broker)
        base = await latency.idle_baseline(stage, count, broker)
        name, versus = f"commit to start, idle, {broker}", "no ledger, stock broker"
        result.add(
            Figure(f"{name}, p50", "ms", [ours.p50], versus, [base.p50], at_most=10),
            Figure(f"{name}, p99", "ms", [ours.p99], versus, [base.p99], at_most=50),
        )
        curves[f"this, {broker}"] = {"p50": ours.p50, "p99": ours.p99, "worst": ours.worst}
        curves[f"stock Dramatiq, {broker}, no database"] = {"p50": base.p50, "p99": base.p99, "worst": base.worst}
    result.plots["latency"] = curves


async def worker(stage: Stage, result: Result, *, quick: bool) -> None:
    """Effects a second of one worker process, and the latency at 60 % of that."""
    count = 4_000 if quick else 6_000
    sides: Sides = {
        "ledger": lambda: effects.ledger(stage, count, 8, relaying=False),
        "raw": lambda: effects.ledger(stage, count, 8, relaying=False, kind="raw"),
        "batch": lambda: effects.ledger(stage, count * 10, 8, relaying=False, kind="batch"),
        "plain": lambda: effects.plain(stage, count, 8),
        "whole path": lambda: effects.ledger(stage, count, 8, relaying=True),
    }
    values = await _in_turns(sides, 1 if quick else 3)
    name = "effects of one worker process, 8 threads"
    result.add(Figure(name, "effects/s", values["ledger"], "same actor, no ledger", values["plain"], at_least=0.75))
    name = "effects by asyncpg's connection, one process"
    result.add(Figure(name, "effects/s", values["raw"], "by a session", values["ledger"], at_least=1.1))
    name = "effects of a consumer with batch=100, one process"
    result.add(Figure(name, "effects/s", values["batch"], "one by one", values["ledger"], at_least=12))
    whole = Figure("effects with the relay at work beside it", "effects/s", values["whole path"])
    result.add(whole)
    await _waiting(stage, result, count // 4, 1 if quick else 3)
    found = await latency.under_load(stage, whole.value * 0.6, 4 if quick else 10)
    result.add(Figure("commit to start at 60 % of that, p99", "ms", [found.p99], at_most=100),
               Figure("commit to start at 60 % of that, p50", "ms", [found.p50]))  # fmt: skip


async def _waiting(stage: Stage, result: Result, count: int, rounds: int) -> None:
    def wait(concurrency: int) -> Awaitable[float]:
        settings = {"OUTBOX__CONCURRENCY": str(concurrency)}
        return effects.ledger(stage, count, 8, relaying=False, kind="wait", **settings)

    waits = await _in_turns({"many": lambda: wait(100), "few": lambda: wait(8)}, rounds)
    name = "effects of consumers that wait 100 ms, one process"
    result.add(Figure(name, "effects/s", waits["many"], "8 at a time", waits["few"], at_least=8))


async def scaling(stage: Stage, result: Result, *, quick: bool) -> None:
    """The same over RabbitMQ, and by two processes."""
    count, rounds = (4_000, 2) if quick else (6_000, 4)
    if stage.rabbitmq is not None:
        sides: Sides = {
            each: lambda each=each: effects.ledger(stage, count, 8, relaying=False, broker=each)  # type: ignore[misc]
            for each in ("rabbitmq", "valkey")
        }
        values = await _in_turns(sides, rounds)
        name = "effects of one worker process, over RabbitMQ"
        result.add(Figure(name, "effects/s", values["rabbitmq"], "over Valkey", values["valkey"], at_least=0.9))
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(rounds):
        for number in random.sample((1, 2), 2):
            found[number].append(await effects.processes(stage, count, number))
    (rates, costs), (rates_of_one, costs_of_one) = (list(zip(*found[number], strict=True)) for number in (2, 1))
    name = "effects of two worker processes"
    result.add(
        Figure(name, "effects/s", list(rates), "of one", list(rates_of_one), at_least=0.95),
        Figure(
            f"{name}, PostgreSQL's CPU for each", "µs", list(costs), "of one", list(costs_of_one), at_most_times=1.1
        ),
    )


async def queue_peers(stage: Stage, result: Result, *, quick: bool) -> None:
    """Effects a second beside two queues in PostgreSQL."""
    if not _peers_installed():
        return
    count = 2_000 if quick else 6_000
    sides: Sides = {"this": lambda: effects.ledger(stage, count, 8, relaying=True)}
    for name in QUEUES:
        sides[f"{name}, tuned"] = lambda name=name: effects.peer(stage, name, count, 8, tuned=True)  # type: ignore[misc]
        if not quick:
            sides[name] = lambda name=name: effects.peer(stage, name, count, 8, tuned=False)  # type: ignore[misc]
    values = await _in_turns(sides, 1 if quick else 2)
    ours = values.pop("this")
    for name, theirs in values.items():
        result.add(Figure("effects with transactional enqueue", "effects/s", ours, name, theirs))
    result.plots["queue-peers"] = {"this, relay and worker": Figure("", "", ours).value}
    result.plots["queue-peers"] |= {name: Figure("", "", theirs).value for name, theirs in values.items()}
    result.texts.append("\n".join(f"{name}: {PROMISES[name]}" for name in (*RELAYS, *QUEUES)))


async def backlog(stage: Stage, result: Result, *, quick: bool) -> None:
    """The drain as the backlog grows."""
    # The short ones take a tenth of a second, so there are more of them.
    lengths = {10_000: 3, 100_000: 1} if quick else {10_000: 4, 100_000: 2, 1_000_000: 2}
    todo = [length for length, times in lengths.items() for _ in range(times)]
    values: dict[int, list[float]] = defaultdict(list)
    for length in random.sample(todo, len(todo)):
        values[length].append(await flat.backlog(stage, length))
    short, *_, long = lengths
    name = f"drain of a backlog of {long:,}"
    result.add(Figure(name, "rows/s", values[long], f"of {short:,}", values[short], at_least=0.85))
    result.plots["backlog"] = {str(each): Figure("", "", values[each]).value for each in lengths}


async def cold_queue(stage: Stage, result: Result, *, quick: bool) -> None:
    """How long a cold queue waits beside a hot one that is full or drains."""
    events = 50 if quick else 200
    hot = (0, 50_000) if quick else (0, 300_000, 1_000_000)
    for how, none, measure in (
        ("full", "none", cold.beside_full),
        ("draining", f"one kept at {cold.SHORT}", cold.beside_draining),
    ):
        found: dict[int, list[latency.Latency]] = defaultdict(list)
        for backlog in random.sample(hot, len(hot)):
            found[backlog].append(await measure(stage, backlog, events))
        base = found.pop(0)
        for backlog, ours in sorted(found.items()):
            name = f"commit to hand-over of a cold queue beside {backlog:,} {how}"
            result.add(
                Figure(f"{name}, p50", "ms", [each.p50 for each in ours], none, [each.p50 for each in base]),
                Figure(f"{name}, p99", "ms", [each.p99 for each in ours], none, [each.p99 for each in base],
                       at_most_times=2),
            )  # fmt: skip
    new = await cold.beside_draining(stage, hot[-1], 20 if quick else 40, new=True)
    name = f"commit to hand-over of a new queue beside {hot[-1]:,} draining"
    result.add(Figure(f"{name}, p50", "ms", [new.p50]), Figure(f"{name}, worst", "ms", [new.worst]))


async def limits(stage: Stage, result: Result, *, quick: bool) -> None:
    """A limited queue's turn, with many due."""
    due = 20_000 if quick else 100_000
    found = [await limited.turns(stage, due, 100) for _ in range(1 if quick else 3)]
    for name, values in zip(("one handed over", "no room"), zip(*found, strict=True), strict=True):
        result.add(Figure(f"turn of a limited queue with {due:,} due, {name}", "ms", list(values), at_most=1))


async def held(stage: Stage, result: Result, *, quick: bool) -> None:
    """The drain while a transaction keeps dead rows alive."""
    before, rows = (60_000, 30_000) if quick else (300_000, 100_000)
    sides: Sides = {
        "held": lambda: flat.held_transaction(stage, before, rows, held=True),
        "free": lambda: flat.held_transaction(stage, before, rows, held=False),
    }
    values = await _in_turns(sides, 1 if quick else 3)
    name = f"drain after {before:,} rows with a transaction held open"
    result.add(Figure(name, "rows/s", values["held"], "none held", values["free"], at_least=0.8))


async def history(stage: Stage, result: Result, *, quick: bool) -> None:
    """The drain and the claims with much history, and while it is purged, each in turns with a database without any."""
    kept, rows = (300_000, 30_000) if quick else (5_000_000, 100_000)
    for name, pairs in (await flat.history(stage, kept, rows, 2 if quick else 4)).items():
        full, empty = (list(side) for side in zip(*pairs, strict=True))
        result.add(Figure(name, "rows/s", full, "empty history", empty, at_least=0.85))


async def relays(stage: Stage, result: Result, *, quick: bool) -> None:
    """A burst after a rest, and two relays."""
    rows = 60_000 if quick else 300_000
    pairs = [await flat.burst_after_rest(stage, rows) for _ in range(1 if quick else 2)]
    warm, rested = [each[0] for each in pairs], [each[1] for each in pairs]
    result.add(Figure(f"burst of {rows:,} onto an idle relay", "rows/s", rested, "warm relay", warm, at_least=0.85))
    sides: Sides = {str(n): lambda n=n: flat.two_relays(stage, rows, n) for n in (1, 2)}  # type: ignore[misc]
    values = await _in_turns(sides, 1 if quick else 3)
    result.add(Figure("two relays", "rows/s", values["2"], "one", values["1"], at_least=0.95))


async def memory(stage: Stage, result: Result, *, quick: bool) -> None:
    """Whether anything grows."""
    for name, sizes in (
        ("relay", await flat.relay_memory(stage, 100_000 if quick else 1_000_000, 4)),
        ("worker", await flat.worker_memory(stage, 8_000 if quick else 100_000, 4)),
    ):
        shown = " ".join(f"{each:.0f}" for each in sizes)
        growth = [sizes[-1] - sizes[0]]
        result.add(Figure(f"memory of the {name} from first to last quarter", "MiB", growth, at_most=5, note=shown))


async def order(stage: Stage, result: Result, *, quick: bool) -> None:
    """What it costs to run in order, over many keys and over few, and how fast one key goes."""
    rows, keys, seconds = (60_000, 20_000, 3.0) if quick else (300_000, 100_000, 8.0)
    sides: Sides = {
        str(each): lambda each=each: in_order.drained(stage, rows, each, seconds)  # type: ignore[misc]
        for each in (0, keys, 10)
    }
    values = await _in_turns(sides, 1 if quick else 3)
    for each, target in ((keys, 0.7), (10, 0.85)):
        name = f"effects in order over {each:,} keys"
        result.add(Figure(name, "effects/s", values[str(each)], "without order", values["0"], at_least=target))
    chains = [await in_order.chain(stage, 300 if quick else 1_000) for _ in range(1 if quick else 3)]
    result.add(
        Figure("effects along one key", "effects/s", [each.rate for each in chains]),
        Figure("commit of one to start of the next, p50", "ms", [each.gap.p50 for each in chains], at_most=8),
        Figure("commit of one to start of the next, p99", "ms", [each.gap.p99 for each in chains]),
    )


async def console(stage: Stage, result: Result, *, quick: bool) -> None:
    """What a worker does while ten people look at the console."""
    if importlib.util.find_spec("service.console") is None:
        return
    count, rounds = (4_000, 3) if quick else (8_000, 6)
    sides: Sides = {str(n): lambda n=n: onlookers.effects_beside(stage, count, n) for n in (10, 0)}  # type: ignore[misc]
    values = await _in_turns(sides, rounds)
    name = "effects of one worker process, beside ten open pages of the console"
    result.add(Figure(name, "effects/s", values["10"], "beside none", values["0"], at_least=0.97))


async def costs(stage: Stage, result: Result, *, quick: bool) -> None:
    """Where the time of one event goes, and what doing nothing costs."""
    result.texts.append(cost.table(await cost.per_event(stage, 1_600 if quick else 3_200)))
    for name, (busy, transactions) in (await cost.idle(stage, 5 if quick else 30)).items():
        result.add(
            Figure(f"idle {name}, CPU", "% of a core", [busy], at_most=1),
            Figure(f"idle {name}, PostgreSQL", "transactions/min", [transactions], at_most=30),
        )


SECTIONS: dict[str, Section] = {
    "relay": relay, "relay-peers": relay_peers, "rabbitmq": rabbitmq, "commits": commits, "api": api,
    "callers": callers, "latency": idle_latency, "worker": worker,
    "scaling": scaling, "queue-peers": queue_peers, "backlog": backlog,
    "cold": cold_queue, "held": held, "history": history, "relays": relays, "memory": memory, "order": order,
    "limits": limits, "console": console, "costs": costs,
}  # fmt: skip
"""In the order in which they run."""

"""One system under attack: its servers, its processes, the network between them, and the three records of the truth.

It is long because it is all that a scenario sees: what it looks at and what it does to the system have one place.
"""

from __future__ import annotations

import asyncio
import fnmatch
import json
import random
import time
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import asyncpg
import redis.asyncio

from service.dev.places import ROOT
from service.dev.postgres import Postgres
from service.dev.servers import Server, free_port
from service.dev.valkey import Valkey
from tests.proof.chaos.checker import Fault, Request, Tables, Verdict, judge
from tests.proof.chaos.domain import BLOCKED, SCHEMA
from tests.proof.chaos.fleet import Fleet, command
from tests.proof.chaos.gaps import API_GAPS, RELAY_GAPS, WORKER_GAPS
from tests.proof.chaos.holdings import Holdings
from tests.proof.chaos.ledger import Ledger
from tests.proof.chaos.limited import Limited, exceeded
from tests.proof.chaos.logs import is_traceback, leaks
from tests.proof.chaos.network import Network
from tests.proof.chaos.records import read_tables
from tests.proof.chaos.sink import Sink
from tests.proof.rabbitmq.server import Rabbitmq
from tests.servers.real_servers import TEMPLATE, copy_of, outside_environment
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
    from pathlib import Path

    from service.database.driver import Connection
    from tests.proof.chaos.launch import Forge

__all__ = ["LONGER_THAN_A_LEASE", "REDISPATCHED", "SHORT", "Ground", "Plan", "World"]

SHORT = {
    "OUTBOX__LEASE": "3",
    "OUTBOX__REDISPATCH_AFTER": "3",
    "OUTBOX__GRACE": "1",
    "OUTBOX__MIN_BACKOFF": "50",
    "OUTBOX__MAX_BACKOFF": "500",
    "OUTBOX__TIME_LIMIT": "5000",
    "OUTBOX__SHUTDOWN_GRACE": "3",
    "API__REQUEST_TIMEOUT": "5",
    "BROKER__PUBLISH_TIMEOUT": "2",
}
"""A short lease, so that what takes minutes as shipped takes seconds."""

LONGER_THAN_A_LEASE = 4.0
"""Seconds; and shorter than a run may last, so that who stood still goes on."""

REDISPATCHED = "SELECT count(*) FROM outbox_message WHERE dispatches >= 2"
"""Rows that were handed to the broker more than once."""


@dataclass(frozen=True)
class Plan:
    """What a scenario's system looks like."""

    settings: Mapping[str, str] = field(default_factory=lambda: SHORT)
    gaps: str = ""
    struck: str = "*"
    """Pattern of the processes that the gaps strike."""
    bug: str = ""
    proxied: bool = False
    rabbitmq: bool = False
    ordered: int = 0
    """Over how many keys things also take numbers; 0 for none."""
    apis: int = 2
    processes: int = 2
    """Of each worker, below its master; siblings of one that is killed end with it."""
    may_exit: int = 0
    """Status with which a process may end by itself."""
    extra: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Further variables for single processes, by name; these are started by their own commands."""
    forked: bool = True
    """Whether processes are forked from the forge; if not, each is started by its own command."""


@dataclass(frozen=True)
class Ground:
    """What systems share: a stopped, migrated PostgreSQL to copy, and the forge."""

    seed_data: Path
    forge: Forge


class World:
    """Everything a scenario may look at or attack. Enter it, and the system runs."""

    def __init__(self, folder: Path, ground: Ground, plan: Plan, seed: int) -> None:
        self.folder = folder
        self.plan = plan
        self.dice = random.Random(seed)
        self.seed = seed
        self._ground = ground
        self.postgres = Postgres(folder / "postgres", durable=False, settings={"synchronous_commit": "on"}, tcp=True)
        self.broker_server = Rabbitmq(folder / "rabbitmq") if plan.rabbitmq else Valkey(folder / "valkey", tcp=True)
        self._urls = (self.postgres.url(), self.broker_server.url)
        self.fleet = Fleet(folder, ground.forge, self._killed_itself, plan.may_exit, max(135, self._grace * 9))
        self.sink = Sink(folder / "sink.jsonl")
        self.network: Network
        self.ledger: Ledger
        self.began = time.time()
        self.held = Holdings(self.broker_server.url)
        self.sink_ignores: set[str] = set()
        self.expected: list[str] = []
        """Parts of the errors that the scenario asks for."""
        self.rewound: Fault | None = None
        self._stack = AsyncExitStack()
        self._faults: list[Fault] = []
        self._limits: list[tuple[Limited, float, float]] = []
        self._judges: list[Callable[[], Awaitable[tuple[list[str], list[str]]]]] = []

    # -- its life

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await asyncio.to_thread(copy_of, self._ground.seed_data, self.postgres.data_dir)
            await asyncio.to_thread(self.postgres.start)
            stack.push_async_callback(asyncio.to_thread, self.postgres.stop)
            await self._start_broker(stack)
            await self.sql(SCHEMA)
            await stack.enter_async_context(self.sink)
            ports = {f"api-{number}": free_port() for number in range(1, self.plan.apis + 1)}
            await self._connect(stack, ports)
            stack.push_async_callback(self.fleet.close)
            for name in (*ports, "relay-1", "relay-2", "worker-1", "worker-2"):
                forked = self.plan.forked and name not in self.plan.extra
                argv = command(name, ports.get(name, 0), self.plan.processes, self._grace)
                self.fleet.add(name, argv, self.environment(name), forked=forked)
            await self.fleet.start(*self.fleet.names())
            watching = asyncio.create_task(self.held.watch())
            stack.callback(watching.cancel)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.disarm()
        self.resume()
        try:
            await self.fleet.close()  # before any server, also those that the scenario added
        finally:
            await self._stack.aclose()

    async def _start_broker(self, stack: AsyncExitStack) -> None:
        await asyncio.to_thread(self.broker_server.start)
        stack.push_async_callback(asyncio.to_thread, self.broker_server.stop)

    @property
    def broker_url(self) -> str:
        """Of the broker itself."""
        return self.broker_server.url

    @property
    def valkey(self) -> Valkey:
        """The broker, where it is Valkey."""
        assert isinstance(self.broker_server, Valkey)
        return self.broker_server

    async def _connect(self, stack: AsyncExitStack, ports: dict[str, int]) -> None:
        targets: dict[str, tuple[str, int]] = {}
        if self.plan.proxied:
            database, broker = _address(self.postgres.url()), _address(self.broker_url)
            for name in (*ports, "relay-1", "relay-2", "worker-1", "worker-2"):
                targets[f"{name}:database"] = database
                targets[f"{name}:broker"] = broker
                targets[f"{name}:sink"] = ("127.0.0.1", self.sink.port)
            targets |= {f"client:{name}": ("127.0.0.1", port) for name, port in ports.items()}
            self.network = await stack.enter_async_context(Network(targets, self.seed))
            ports = {name: self.network.ports[f"client:{name}"] for name in ports}
        urls = [f"http://127.0.0.1:{port}" for port in ports.values()]
        self.ledger = await stack.enter_async_context(Ledger(urls, self.dice))

    def environment(self, name: str) -> dict[str, str]:
        """The whole environment of a process."""
        variables = {
            "DATABASE__URL": self._by_proxy(self.postgres.url(TEMPLATE), f"{name}:database"),
            "BROKER__URL": self._by_proxy(self.broker_url, f"{name}:broker"),
            "IDENTITY__OFF": "true",
            "CHAOS_SINK": _address_text(self._by_proxy(f"tcp://127.0.0.1:{self.sink.port}", f"{name}:sink")),
            "CHAOS_GAPS": self.plan.gaps if fnmatch.fnmatch(name, self.plan.struck) else "",
            "CHAOS_BUG": self.plan.bug,
            "CHAOS_ORDERED": str(self.plan.ordered or ""),
            "CHAOS_SEED": str(self.seed),
            "CHAOS_NAME": name,
            "CHAOS_ARMED": str(self.folder / "armed"),
            "CHAOS_HOLD": str(self.folder / "hold"),
            "CHAOS_STRIKES": str(self.folder / "strikes.jsonl"),
            "PYTHONPATH": f"{ROOT / 'tests' / 'proof' / 'chaos' / 'onpath'}:{ROOT}",
            "PYTHONUNBUFFERED": "1",
        }
        own = self.plan.extra.get(name, {})
        return outside_environment() | variables | dict(self.plan.settings) | dict(own)

    def _by_proxy(self, url: str, link: str) -> str:
        if not self.plan.proxied:
            return url
        return url.replace(f":{urlsplit(url).port}", f":{self.network.ports[link]}")

    @property
    def _grace(self) -> float:
        return float(self.plan.settings.get("OUTBOX__SHUTDOWN_GRACE", "20"))

    @property
    def settling(self) -> float:
        """Seconds after the last fault in which a lease ends and a row comes due once more."""
        settings = {"OUTBOX__LEASE": "30", "OUTBOX__REDISPATCH_AFTER": "60", **self.plan.settings}
        return float(settings["OUTBOX__LEASE"]) + float(settings["OUTBOX__REDISPATCH_AFTER"])

    # -- looking

    async def sql(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        """Run SQL on a connection of its own, past every proxy."""
        connection = await self.connect()
        try:
            if not arguments and ";" in statement:
                await connection.execute(statement)
                return []
            return await connection.fetch(statement, *arguments)
        finally:
            await connection.close()

    async def until(self, query: str, number: int) -> None:
        """Wait until the first value of `query` is at least this."""
        await until(lambda: self._reaches(query, number), what=query)

    async def _reaches(self, query: str, number: int) -> bool:
        rows = await self.sql(query)
        return bool(rows) and rows[0][0] >= number

    async def connect(self) -> Connection:
        """A connection to the database under attack, past every proxy."""
        settings = {"statement_timeout": "0", "idle_session_timeout": "0", "transaction_timeout": "0"}
        settings |= {"lock_timeout": "0", "idle_in_transaction_session_timeout": "0"}
        return await asyncpg.connect(
            self.postgres.socket_url(TEMPLATE), timeout=60, command_timeout=60, server_settings=settings
        )

    def broker(self) -> redis.asyncio.Redis:
        """A client of the broker, past every proxy."""
        client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(self.broker_url, decode_responses=True)
        return client

    async def tables(self) -> Tables:
        """The business tables, and what is open in the ledger."""
        connection = await self.connect()
        try:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                return await read_tables(connection)
        finally:
            await connection.close()

    async def verdict(self) -> Verdict:
        """What the checker says now."""
        tables = await self.tables()
        if self.rewound is not None:
            self._forget_rewound(tables, self.rewound)
        received = [copy for copy in self.sink.received if copy.subject not in self.sink_ignores]
        verdict = judge(self.ledger.requests, tables, received, self.faults())
        for limit, began, ended in self._limits:
            ran = [copy for copy in received if copy.began >= began and copy.began <= ended]
            verdict.exceeded += exceeded(limit, ran, self.faults())
        for also in self._judges:
            lost, duplicated = await also()
            verdict.lost += lost
            verdict.duplicated += duplicated
        return verdict

    def _forget_rewound(self, tables: Tables, rewound: Fault) -> None:
        """Forget what was accepted in the time that the database has lost, and that it does not know."""
        for request in list(self.ledger.requests):
            accepted = request.accepted or 0.0
            if rewound.began <= accepted <= rewound.ended and not tables.things[request.subject]:
                self.ledger.requests.remove(request)
                self.sink_ignores.add(request.subject)

    def faults(self) -> list[Fault]:
        """Everything that may explain a repeated effect outside."""
        struck = [
            Fault(each["gap"], each["at"], each["at"] + lasts, frozenset([each["pid"]]))
            for each in self.strikes()
            if (lasts := {"kill": 0.0, "sleep": 0.5, "block": BLOCKED}.get(each["action"])) is not None
        ]
        rewound = [] if self.rewound is None else [self.rewound]
        return [*self.fleet.faults, *self._faults, *struck, *rewound]

    def _killed_itself(self) -> set[tuple[str, int]]:
        return {(each["name"], each["start"]) for each in self.strikes() if each["action"] == "kill"}

    def wrong(self) -> list[str]:
        """What is wrong whatever the records say: deaths without a cause, tracebacks, passwords in logs."""
        wrong = list(self.fleet.wrong)
        for name in self.fleet.names():
            log = self.fleet.log(name)
            errors = [line for line in log.splitlines() if is_traceback(line)]
            wrong += [f"{name}: {line[:300]}" for line in errors if not any(each in line for each in self.expected)][:2]
            wrong += [f"{name} logged a password" for url in self._urls if leaks(log, url)]
        return wrong

    # -- attacking

    def also_judge(self, judge: Callable[[], Awaitable[tuple[list[str], list[str]]]]) -> None:
        """Ask this, too, what was lost and what happened twice, of something that the scenario alone knows."""
        self._judges.append(judge)

    def keep_open(self, connection: Connection) -> None:
        """Close this connection only when the scenario has been judged."""
        self._stack.push_async_callback(connection.close, timeout=2)

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Let this happen while it is judged whether all is well."""
        task = asyncio.create_task(work)
        self._stack.callback(task.cancel)

    def also_stop(self, server: Server) -> None:
        """Stop this server, too, when the scenario is over."""
        self._stack.push_async_callback(asyncio.to_thread, server.stop)

    def limit(self, limit: Limited | None) -> None:
        """Judge by this limit of the queue `mail` what begins from now on, and by none before it any more."""
        now = time.time()
        self._limits = [(each, began, min(ended, now)) for each, began, ended in self._limits]
        if limit is not None:
            self._limits.append((limit, now, float("inf")))

    def excuse(self, what: str, began: float, pids: frozenset[int] | None = None) -> None:
        """Note a fault from `began` (of `time.time()`) until now that hit workers, or what they need to complete."""
        self._faults.append(Fault(what, began, time.time(), pids))

    async def place_surely(self, how: str = "") -> Request:
        """Place a request, and repeat it until it is accepted."""
        request = await self.ledger.place(how)
        await until(lambda: self.ledger.repeat(request), every=0.1, what="an answer of the API")
        return request

    def arm(self, *gaps: str, once: bool = False) -> None:
        """Let these gaps of the plan strike, or all; at the dice's pleasure, or once and no more."""
        document = json.dumps({"gaps": gaps or [*API_GAPS, *RELAY_GAPS, *WORKER_GAPS], "once": once})
        draft = self.folder / "arming"
        draft.write_text(document)
        draft.rename(self.folder / "armed")

    def disarm(self) -> None:
        """Let no gap strike any more."""
        (self.folder / "armed").unlink(missing_ok=True)

    def strikes(self) -> list[dict[str, Any]]:
        """What the processes did to themselves, in order: `at`, `name`, which `start` of it, `pid`, `gap`, `action`."""
        file = self.folder / "strikes.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def struck(self) -> Counter[str]:
        """How often each gap has struck."""
        return Counter(each["gap"] for each in self.strikes())

    def resume(self) -> None:
        """Let everything go on that stands still."""
        self.fleet.resume({each["pid"]: each["at"] for each in self.strikes() if each["action"] == "stop"})

    async def strike_each(self, gaps: Sequence[str], then: float) -> None:
        """Each gap once, one after the other; after each strike `then` seconds pass, and what stands still goes on."""
        for gap in gaps:
            before = self.struck()[gap]
            self.arm(gap, once=True)
            await until(lambda: self.struck()[gap] > before, what=f"a strike at {gap}")  # noqa: B023
            await self.wait(then)
            self.resume()
            await self.wait(1)  # or the next might strike the same run, and it would have to end

    @asynccontextmanager
    async def workers_away(self, queues: Sequence[str], least: int = 10, *, loses: bool = False) -> AsyncIterator[None]:
        """No worker is there; the block begins when so many messages wait in each queue.

        Where the block `loses` them, rows must come due and be handed over again.
        """
        workers = self.fleet.names("worker")
        await self.fleet.stop(*workers)

        async def full() -> bool:
            waiting = await self.held.waiting()
            return all(waiting.get(queue, 0) >= least for queue in queues)

        await until(full, every=0.1, what=f"{least} messages in each of {queues}")
        before = (await self.sql(REDISPATCHED))[0][0]
        yield
        if loses:
            await self.until(REDISPATCHED, before + least)
        await self.fleet.start(*workers)

    def hold(self, *, held: bool = True) -> None:
        """Let events of the kind `held` run for as long as this lasts."""
        if held:
            (self.folder / "hold").touch()
        else:
            (self.folder / "hold").unlink()

    async def wait(self, seconds: float) -> None:
        """Let time pass under load."""
        await asyncio.sleep(seconds)


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def _address_text(url: str) -> str:
    return "{}:{}".format(*_address(url))

"""Whatever stands in a broker, no worker ends of it, and what stands behind it is run: a real one, on either broker."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import pika
import pytest
import redis
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from service.dev.guard import Guard
from service.dev.places import ROOT
from tests.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.proof.rabbitmq.server import Rabbitmq

pytestmark = pytest.mark.slow

QUEUES = ("ledger", "ledger.DQ")

texts = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates, too
depths = st.sampled_from([49, 50, 51, 400, 700, 800, 850, 900, 920, 940, 960, 980, 3_000]).map("<{}>".format)
"""Stands for as many lists in each other."""
scalars = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | texts | depths
values = st.recursive(scalars, lambda each: st.lists(each, max_size=3) | st.dictionaries(texts, each, max_size=3))
actors = st.sampled_from(["ledger.react", "ledger.compute", "plain.fail", "nobody.knows", "outbox.unknown_consumer"])
options = st.sampled_from(
    ["eta", "redis_message_id", "throws", "retries", "max_retries", "min_backoff", "max_backoff", "time_limit",
     "max_age", "broker_priority", "on_success", "on_failure", "on_retry_exhausted", "pipe_target", "traceparent"]
)  # fmt: skip
fields = st.fixed_dictionaries(
    {},
    optional={
        "queue_name": values,
        "actor_name": actors | values,
        "args": st.just([str(uuid4())]) | values,
        "kwargs": st.dictionaries(texts, values, max_size=2) | values,
        "options": st.dictionaries(options, values, max_size=4) | values,
        "message_id": values,
        "message_timestamp": values,
        "odd": values,
    },
)
"""What a body has different from one that could run."""
bodies = st.tuples(st.sampled_from(QUEUES), st.binary() | fields)


def body(queue: str, different: bytes | dict[str, Any], unique: str) -> bytes:
    if isinstance(different, bytes):
        return different
    usual = {"queue_name": queue, "actor_name": "plain.fail", "args": [], "kwargs": {}, "message_id": unique,
             "options": {}, "message_timestamp": 1}  # fmt: skip
    whole = usual | different
    if isinstance(whole["options"], dict):
        whole["options"] = {"redis_message_id": unique} | whole["options"]
    return re.sub(r'"<(\d+)>"', lambda found: "[" * int(found[1]) + "]" * int(found[1]), json.dumps(whole)).encode()


class Sender(Protocol):
    """Puts bodies into one kind of broker, without Dramatiq."""

    environment: dict[str, str]

    def send(self, queue: str, body: bytes, unique: bytes) -> None: ...


class RedisSender:
    def __init__(self, url: str, namespace: str) -> None:
        self.environment = {"BROKER__URL": url, "BROKER__NAMESPACE": namespace}
        self._client = redis.Redis.from_url(url)
        self._namespace = namespace

    def send(self, queue: str, body: bytes, unique: bytes) -> None:
        self._client.hset(f"{self._namespace}:{queue}.msgs", unique, body)
        self._client.rpush(f"{self._namespace}:{queue}", unique)


class RabbitmqSender:
    def __init__(self, url: str) -> None:
        self.environment = {"BROKER__URL": url}
        self._parameters = pika.URLParameters(url)
        self.properties: pika.BasicProperties | None = None

    def send(self, queue: str, body: bytes, unique: bytes) -> None:
        with pika.BlockingConnection(self._parameters) as connection:
            connection.channel().basic_publish("", queue, body, self.properties)


@pytest.fixture(params=["redis", "rabbitmq"])
def sender(request: pytest.FixtureRequest) -> Sender:
    if request.param == "redis":
        return RedisSender(request.getfixturevalue("broker_url"), request.getfixturevalue("broker_namespace"))
    rabbitmq: Rabbitmq = request.getfixturevalue("rabbitmq")
    return RabbitmqSender(rabbitmq.url)


class Worker:
    """A real worker, and a sign of life from it."""

    def __init__(self, process: subprocess.Popen[bytes], sender: Sender, signs: Path) -> None:
        self._process = process
        self._sender = sender
        self._signs = signs

    def runs_what_comes_next(self, queue: str) -> None:
        sign = str(uuid4())
        different: dict[str, Any] = {
            "actor_name": "plain.sign",
            "args": [sign],
            "options": {"eta": 1} if queue.endswith(".DQ") else {},
        }
        self._sender.send(queue, body(queue, different, sign), sign.encode())
        until_sync(lambda: (self._signs / sign).exists() or self._process.poll() is not None, timeout=60, what=queue)
        assert self._process.poll() is None, "the worker has ended"


@pytest.fixture
def worker(sender: Sender, environment: dict[str, str], tmp_path: Path) -> Iterator[Worker]:
    with started(environment | sender.environment | {"SIGNS": str(tmp_path)}, tmp_path / "worker.log") as process:
        worker = Worker(process, sender, tmp_path)
        yield worker


@contextmanager
def started(environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dramatiq", "tests.proof.contract.hostile_app:setup_broker", "-p", "1", "-t", "3"],
            cwd=ROOT, env=environment, stdout=output, stderr=output,
        )  # fmt: skip
    guard = Guard.ending(process.pid)
    try:
        until_sync(lambda: b"ready for action" in log.read_bytes(), timeout=60, what="the worker")
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            guard.dismiss()


KNOWN: tuple[bytes | dict[str, Any], ...] = (
    {"options": {"redis_message_id": "\ud800"}},
    {"options": {"throws": "x"}},
    {"options": {"throws": [[]]}},
    {"options": {"broker_priority": "x", "eta": 1}},
    {"options": {"broker_priority": 1.0, "eta": 1}},
    {"options": {"pipe_target": "<30>", "eta": 1}},
    {"options": {"eta": float("nan")}},
    *({"args": [f"<{depth}>"], "options": {"eta": 1}} for depth in range(600, 1_000, 5)),
    *({"args": [f"<{depth}>"]} for depth in range(600, 1_000, 5)),
    {"args": ["<100000>"]},
    b'{"args": [' + b"9" * 5_000 + b"]}",
    b"",
)
"""What has ended a worker, or kept its consumer starting again for ever."""


@pytest.mark.parametrize("queue", QUEUES)
def test_known_bodies(worker: Worker, sender: Sender, queue: str) -> None:
    for different in KNOWN:
        unique = str(uuid4())
        sender.send(queue, body(queue, different, unique), unique.encode())
    worker.runs_what_comes_next(queue)


@pytest.mark.timeout(300)
def test_any_bodies(worker: Worker, sender: Sender) -> None:
    @settings(max_examples=15, deadline=None, phases=[Phase.generate])  # what ends the worker fails all that follow
    @given(st.lists(st.tuples(bodies, st.binary(min_size=1)), min_size=10, max_size=60))
    def check(found: list[tuple[tuple[str, bytes | dict[str, Any]], bytes]]) -> None:
        for (queue, different), unique in found:
            sender.send(queue, body(queue, different, str(uuid4())), unique)
        for queue in QUEUES:
            worker.runs_what_comes_next(queue)

    check()


@pytest.mark.parametrize("sender", ["redis"], indirect=True)
def test_ids_that_are_no_text(worker: Worker, sender: Sender) -> None:
    for queue in QUEUES:
        sender.send(queue, b"no body", b"\xff")
        worker.runs_what_comes_next(queue)

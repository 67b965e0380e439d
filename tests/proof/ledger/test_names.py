"""A name that is stored in rows means one function and one type of event."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from service.errors import ConsumerDefinitionError, EventDefinitionError
from service.outbox.consumers import consumer_named, consumers_of
from tests.proof.ledger import domain

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from service.outbox.running.runner import Runner
    from tests.proof.ledger.conftest import Ledger

ONE = """
from uuid import UUID
from service.outbox import Event, consumer

class Placed(Event, type="{name}.placed"):
    order_id: UUID

class Cancelled(Event, type="{name}.cancelled"):
    order_id: UUID

@consumer(Placed, queue="email")
async def notify(event, delivery): ...
"""
SAME_EVENT = """
@consumer(Placed, queue="email")
async def notify(event, delivery): ...
"""
OTHER_EVENT = """
@consumer(Cancelled, queue="email")
async def notify(event, delivery): ...
"""
FACTORY = """
def mailer(of):
    @consumer(of, queue="email", name="{name}.mail")
    async def mail(event, delivery): ...

mailer(Placed)
mailer(Cancelled)
"""
WRAPPED = """
import functools
def timed(fn):
    @functools.wraps(fn)
    async def inner(*arguments): await fn(*arguments)
    return inner

@consumer(Placed, queue="email", name="{name}.mail")
@timed
async def mail(event, delivery): ...

@consumer(Placed, queue="email", name="{name}.mail")
@timed
async def mail(event, delivery): ...
"""
SAME_TYPE = """
class Placed(Event, type="{name}.placed"):
    order_id: str
"""


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of a domain."""
    monkeypatch.syspath_prepend(tmp_path)
    return module(tmp_path, ONE)


def module(folder: Path, source: str) -> ModuleType:
    name = f"named_{uuid4().hex}"
    (folder / f"{name}.py").write_text(source.replace("{name}", name))
    return importlib.import_module(name)


@pytest.mark.parametrize("second", [SAME_EVENT, OTHER_EVENT, FACTORY, WRAPPED])
def test_a_second_function_of_the_name_is_refused(imported: ModuleType, tmp_path: Path, second: str) -> None:
    with pytest.raises(ConsumerDefinitionError, match=r"already the name of .* give each consumer a name of its own"):
        module(tmp_path, ONE + second)


def test_a_second_class_of_the_type_is_refused(imported: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(EventDefinitionError, match="already the type of"):
        module(tmp_path, ONE + SAME_TYPE)


@pytest.mark.parametrize("again", ["reloaded", "imported"])
def test_a_module_may_be_imported_again(imported: ModuleType, again: str) -> None:
    name = imported.__name__
    if again == "imported":
        del sys.modules[name]
    module = importlib.reload(imported) if again == "reloaded" else importlib.import_module(name)
    found = consumer_named(f"{name}.notify")
    assert found is not None
    assert found.fn is module.notify
    assert consumers_of(module.Placed) == [found]
    assert found.event is module.Placed


@pytest.mark.parametrize("consumer", ["ledger.compute", "ledger.first"])
async def test_a_row_of_another_type_of_event_is_unknown(ledger: Ledger, runner: Runner, consumer: str) -> None:
    """Its consumer was pointed at another event since; a worker of the release before may still know it."""
    message_id = await ledger.happen()
    await ledger.set(message_id, consumer=consumer)
    assert await runner.deliver(message_id) is None
    row = await ledger.row(message_id)
    assert row is not None
    assert (row["state"], row["attempts"], await ledger.effects(message_id)) == ("pending", 0, 0)
    assert row["due_in"] > 0.5
    assert f"{consumer} consumes ledger." in row["errors"]
    assert f"not {domain.Happened.event_type}" in row["errors"]

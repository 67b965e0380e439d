"""Statements on the ledger stand in one room, and the relay loads no more of the service than it needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import relay
import service
from service.ledger.tables import (
    AcceptedEvent,
    DeadLetter,
    LimitedQueue,
    OutboxMessage,
    OutboxMinute,
    OutboxOperation,
    OutboxProcess,
    OutboxSchedule,
    PausedQueue,
)

_LEDGER = (
    AcceptedEvent,
    DeadLetter,
    LimitedQueue,
    OutboxMessage,
    OutboxMinute,
    OutboxOperation,
    OutboxProcess,
    OutboxSchedule,
    PausedQueue,
)
_TABLES = "|".join(each.__tablename__ for each in _LEDGER)
_STATEMENT = re.compile(
    rf"\b(FROM|JOIN|INTO|UPDATE|TABLE|USING|ONLY)\s+({_TABLES})\b|'({_TABLES})'::regclass", re.IGNORECASE
)

_ROOTS = [Path(each.__path__[0]) for each in (service, relay)]

_APART = {
    # The demo's verdict would prove nothing if it asked the very functions that it judges.
    "service/dev/demo/faults.py",
    "service/dev/demo/verdict.py",
}


def has_statement(source: str) -> bool:
    """Whether a string of the program, be it a docstring, names one of the ledger's tables as a statement does."""
    texts = [each.value for each in ast.walk(ast.parse(source)) if isinstance(each, ast.Constant)]
    return any(isinstance(each, str) and _STATEMENT.search(each) for each in texts)


@pytest.mark.parametrize(
    "source",
    [
        "x = 'SELECT id FROM outbox_message'",
        "x = f'{y} UPDATE dead_letter SET z = {y}'",
        "def f():\n    g('''DELETE\n    FROM\n      paused_queue''')",
        "x = \"SELECT 'outbox_message'::regclass::oid\"",
    ],
)
def test_a_statement_is_seen(source: str) -> None:
    assert has_statement(source)


def test_every_statement_on_the_ledger_stands_in_its_room() -> None:
    found = {
        path.relative_to(root.parent).as_posix()
        for root in _ROOTS
        for path in root.rglob("*.py")
        if has_statement(path.read_text())
    }
    inside = {each for each in found if each.startswith("service/ledger/")}
    assert len(inside) > 5
    assert found - inside == _APART


_LOADED = """
import importlib, pkgutil, sys, relay
for module in pkgutil.walk_packages(relay.__path__, "relay."):
    if module.name != "relay.__main__":
        importlib.import_module(module.name)
print(*{name.partition(".")[0] for name in sys.modules} & {"fastapi", "starlette", "dramatiq", "relay"})
"""


def test_the_relay_loads_neither_web_framework_nor_worker() -> None:
    done = subprocess.run([sys.executable, "-c", _LOADED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["relay"]

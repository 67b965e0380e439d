"""Ends what a test started and did not end: it failed half-way, it timed out, or its own process was killed.

A process hands its environment on to whatever it starts, through shells, forks, sessions and other accounts. So each
run of the tests adds a mark of its own to the environment, and each test one below that: whoever carries it was started
by that test. What must stay true: nothing is started with an environment made from nothing, but for servers, which have
guards of their own.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from service.dev.guard import Guard
from service.dev.places import ROOT

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

__all__ = ["Leftovers", "ended"]

_VARIABLE = "STARTED_BY_TESTS"
_PATIENCE = 5.0
"""Seconds in which they may end by themselves, and again after SIGTERM."""
_WHEN_WE_ARE_GONE = 'read -r _ && exit; cd "$1" && exec "$2" -m tests.servers.leftovers "$3"'


class Leftovers:
    """The part of pytest that sees to it, in the process that controls a run and in each worker of xdist."""

    def __init__(self) -> None:
        self._tests = 0
        self._mark = f"{os.environ.get(_VARIABLE, '')}/{os.getpid()}-{secrets.token_hex(4)}"
        os.environ[_VARIABLE] = self._test = self._mark
        self._guard = Guard(_WHEN_WE_ARE_GONE, str(ROOT), sys.executable, self._mark)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None]:
        """Mark what the test starts."""
        self._tests += 1
        os.environ[_VARIABLE] = self._test = f"{self._mark}/{self._tests}"
        yield

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
        """What a wider fixture starts outlives the test that asked first."""
        if fixturedef.scope != "function":
            os.environ[_VARIABLE] = self._mark
        try:
            return (yield)
        finally:
            os.environ[_VARIABLE] = self._test

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None]:
        """End what the fixtures left running; a test that passed has failed then."""
        try:
            yield
        finally:
            left = _end(self._test)
            os.environ[_VARIABLE] = self._test = self._mark
        assert not left, f"it left running: {left}"

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """End what is left of the run."""
        _end(self._mark)
        self._guard.dismiss()


@contextmanager
def ended() -> Iterator[None]:
    """The same for a program that is no run of pytest: what is started in it ends with it."""
    leftovers = Leftovers()
    try:
        yield
    finally:
        leftovers.pytest_unconfigure()


def _end(mark: str) -> list[str]:
    """End whoever carries the mark or one below it and does not end by itself; their command lines."""
    left = _after(_PATIENCE, mark)
    names = [_name(each) for each in left]
    for each in left:
        with suppress(psutil.Error):
            each.terminate()
    while left := _after(_PATIENCE, mark):
        for each in left:
            with suppress(psutil.Error):
                each.kill()
    return names


def _after(seconds: float, mark: str) -> list[psutil.Process]:
    """Who is left when so long has passed; nobody as soon as there is nobody."""
    deadline = time.monotonic() + seconds
    while (left := _carriers(mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _carriers(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # not ours to read, or gone already
            if f"{process.environ().get(_VARIABLE)}/".startswith(f"{mark}/"):
                found.append(process)
    return found


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return f"{process.pid}: {' '.join(process.cmdline())[:200]}"
    return str(process.pid)


if __name__ == "__main__":
    _end(sys.argv[1])

"""Log lines on their way out of a process whose reader is slow, gone or standing still."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from service.dev.places import ROOT
from tests.servers.real_servers import outside_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

PROLOGUE = """
import logging, multiprocessing, os, signal, sys, threading
from service.telemetry.logs import configure_logging, flush_logs, get_logger
configure_logging("json", "INFO")
log = get_logger("test")
"""


@contextmanager
def running(program: str) -> Iterator[subprocess.Popen[str]]:
    """The program, after logging is set up. Nobody reads its stderr but the test, when it wants to."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROLOGUE + program],
        cwd=ROOT,
        env=outside_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def lines_of(program: str) -> list[dict[str, Any]]:
    """What a program logs that ends by itself."""
    with running(program) as process:
        _, written = process.communicate(timeout=60)
    return [json.loads(line) for line in written.splitlines()]


FLOOD = """
def tick(*_):
    log.info("tick")
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
for n in range(20_000):
    log.info("line", n=n)
signal.setitimer(signal.ITIMER_REAL, 0)
print("logged", flush=True)
"""


def test_nobody_waits_for_a_reader_that_stands_still_and_what_was_dropped_is_counted() -> None:
    with running(FLOOD + "sys.stdin.readline()") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "logged\n"
        events: list[dict[str, Any]] = []
        while not events or events[-1]["event"] != "log.dropped":
            events.append(json.loads(process.stderr.readline()))
    kept = [each["n"] for each in events if each["event"] == "line"]
    assert kept == list(range(len(kept)))
    assert 5_000 <= len(kept) < 20_000
    assert len(kept) + events[-1]["lines"] >= 20_000


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGTERM)", "flush_logs(); os._exit(0)"])
def test_a_process_ends_while_its_reader_stands_still(end: str) -> None:
    """Python would abort in its exit if the writer held the lock of `sys.stderr`."""
    with running(FLOOD + end) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "logged\n"
        assert process.wait(60) == (-15 if "SIGTERM" in end else 0)


FORKED = """
process = multiprocessing.get_context("fork").Process(target=log.info, args=("last",))
process.start()
process.join()
"""


@pytest.mark.parametrize(
    "program",
    [
        "log.info('last')",
        "log.info('last'); raise SystemExit(1)",
        "log.info('last'); flush_logs(); os._exit(1)",
        FORKED,
        "log.info('first')" + FORKED,
    ],
    ids=["return", "SystemExit", "_exit", "fork", "fork of one that has logged"],
)
def test_the_last_line_is_written(program: str) -> None:
    assert lines_of(program)[-1]["event"] == "last"


def test_a_reader_that_is_gone_is_no_error() -> None:
    with running("sys.stdin.readline(); log.info('x'); flush_logs(); log.info('y')") as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stderr.close()
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.wait(60) == 0
        process.stderr = None


def test_what_cannot_be_rendered_raises_nothing() -> None:
    program = """
deep = []
for _ in range(sys.getrecursionlimit() * 100):
    deep = [deep]
logging.getLogger("test").info("%s", deep)
logging.getLogger("test").info("%d", "x")
log.info("last")
"""
    events = [each["event"] for each in lines_of(program)]
    assert events == ["log.not_rendered", "log.not_rendered", "last"]


def test_a_warning_is_a_line() -> None:
    (line,) = lines_of("import warnings; warnings.warn('look out')")
    assert line["logger"] == "py.warnings"
    assert "look out" in line["event"]


def test_a_line_is_cut_where_it_is_too_long() -> None:
    with running("log.info('x' * 100_000); log.info('last')") as process:
        _, written = process.communicate(timeout=60)
    first, second = written.splitlines()
    assert len(first) == 16_384
    assert json.loads(second)["event"] == "last"


@pytest.mark.parametrize(("level", "told"), [("INFO", ["WARNING"]), ("DEBUG", ["INFO", "WARNING"])])
def test_what_libraries_tell_of_their_insides_is_for_who_debugs(level: str, told: list[str]) -> None:
    lines = lines_of(f"""
configure_logging("json", {level!r})
from dramatiq.middleware.asyncio import AsyncIO
from service.database.engine import _Pool
for library in (AsyncIO().logger, _Pool(lambda: None).logger):
    library.info("INFO")
    library.warning("WARNING")
""")
    assert [line["event"] for line in lines if line["event"] in ("INFO", "WARNING")] == told * 2

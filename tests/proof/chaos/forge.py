"""Forks the processes under attack from one that has imported everything, so that starting one costs no CPU seconds.

    python -m tests.proof.chaos.forge
    {"argv": ["dramatiq", "-p", "1"], "environment": {...}, "log": "worker-1.log", "exits": "exits.jsonl"}

answers its process id, and appends how it ended to the file `exits`.

What must stay true: a forked process is like one started by its command: an environment, a process group, signal
handlers and a random generator of its own, and nothing of the service was configured before the fork. When stdin ends,
every group is killed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import runpy
import signal
import sys
from contextlib import suppress
from typing import Any

_PRELOADED = (
    "dramatiq.cli",
    "relay.cli.app",
    "relay.process.loop",
    "relay.brokers.rabbitmq_sender",
    "relay.brokers.redis_sender",
    "tests.proof.chaos.app",
    "uvicorn.lifespan.on",
    "uvicorn.main",
    "uvicorn.protocols.http.httptools_impl",
    "uvloop",
)


def _become(request: dict[str, Any]) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGCHLD,))
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()
    for variable, module in (("CHAOS_GAPS", "tests.proof.chaos.gaps"), ("CHAOS_BUG", "tests.proof.chaos.bugs")):
        if os.environ.get(variable):
            importlib.import_module(module)
    sys.argv = request["argv"]
    if sys.argv[0] == "outbox":
        from relay.cli.app import main

        main()
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


_exits: dict[int, str] = {}


def _bury(*_: object) -> None:
    """Collect whoever has ended, and write down how: its status, or the number of a signal below zero."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = ended
            with open(_exits.pop(pid), "a") as file:  # noqa: PTH123
                file.write(json.dumps({"pid": pid, "status": os.waitstatus_to_exitcode(status)}) + "\n")


def _fork(request: dict[str, Any]) -> int:
    # Nobody is buried before it is known where to write that down.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))
    pid = os.fork()
    if pid:
        with suppress(OSError):  # whichever of the two is first
            os.setpgid(pid, pid)
        _exits[pid] = request["exits"]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGCHLD,))
        return pid
    status = 70
    try:
        _become(request)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  the process under attack ends with a traceback, as it would by itself
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Fork on demand until stdin ends."""
    for module in _PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, _bury)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("ready", flush=True)
    groups: list[int] = []
    # No buffered reading: a child must not inherit requests that are not for it.
    with os.fdopen(os.dup(0), "rb", buffering=0) as requests:
        while line := requests.readline():
            groups.append(_fork(json.loads(line)))
            print(groups[-1], flush=True)
    for group in groups:
        with suppress(OSError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()

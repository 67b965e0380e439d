"""The way of log lines out of a process, on which nobody who logs ever waits.

Whoever reads stderr may stop reading: a log shipper that hangs, or Dramatiq's main process, which is stopped or killed.
Then a write blocks once the pipe is full, and would so in a delivery, in the heartbeat or in a signal's handler, with
the lock held that everybody else who logs waits for. What must stay true:

- Only a thread of its own writes. A line for which there is no room is dropped and counted, and the count is logged
  once lines flow again.
- A line may be logged by a signal's handler, in the midst of another one: `SimpleQueue` and `RLock` are made for that.
- A fork takes no threads along, so the thread is started by a process's first line.
- The thread writes past the buffer of `sys.stderr`, whose lock the interpreter needs in order to exit.
"""

from __future__ import annotations

import io
import json
import logging
import os
import threading
import time
from multiprocessing.util import Finalize
from queue import SimpleQueue
from typing import TYPE_CHECKING, TextIO

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

_ROOM = 5_000
"""Lines that wait at most, for a reader that is slow."""

_LONGEST = 16_384
"""Characters of a line; Docker cuts longer ones as well."""

_PIECE = 2_048
"""Characters from which on a write is full: a pipe takes 4 KiB in one piece, with nothing of others in between."""

_TOGETHER = 0.01
"""Seconds after a write until the next: to be woken for every line would cost whoever logs more than the line does."""

_PATIENCE = 1.0
"""Seconds that the end of a process waits for its last lines to be read."""

_Lines = SimpleQueue[str | threading.Event]


class QueuedHandler(logging.Handler):
    """Renders a record where it is logged, and writes it to `stream` from a thread.

    Args:
        stream: A text file with a descriptor, or whatever writes a text at once.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._write = _unbuffered(stream)
        self._process = 0
        self._lines: _Lines = SimpleQueue()
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the line, or count it."""
        if (self._process == os.getpid() or self._begin()) and self._lines.qsize() < _ROOM:
            self._lines.put(self._rendered(record))
        else:
            self._dropped += 1

    def _begin(self) -> bool:
        lines: _Lines = SimpleQueue()
        try:
            threading.Thread(target=self._write_for_ever, args=(lines,), name="log-writer", daemon=True).start()
        except RuntimeError:  # the interpreter is exiting
            return False
        self._lines, self._dropped, self._process = lines, 0, os.getpid()
        Finalize(None, self.flush, exitpriority=0)  # multiprocessing's children run no others
        return True

    def _rendered(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record)[:_LONGEST]
        except Exception as error:  # noqa: BLE001  what is logged may come from outside: nested too deep, for one
            about = {"level": "error", "error": type(error).__name__, "at": f"{record.pathname}:{record.lineno}"}
            return json.dumps({"event": "log.not_rendered", **about})

    def _write_for_ever(self, lines: _Lines) -> None:
        while True:
            texts, flushes = _next(lines)
            try:
                self._write("".join(f"{text}\n" for text in texts))
            except (OSError, ValueError):  # there is no reader any more
                with self._counting():
                    self._dropped += len(texts)
            else:
                if self._dropped and texts and lines.empty():
                    self._tell_dropped()
            for each in flushes:
                each.set()
            if lines.empty():
                time.sleep(_TOGETHER)

    def _tell_dropped(self) -> None:
        with self._counting():
            dropped, self._dropped = self._dropped, 0
        structlog.get_logger(__name__).error("log.dropped", lines=dropped)

    def _counting(self) -> threading.RLock:
        assert self.lock is not None
        return self.lock

    def flush(self) -> None:
        """Wait until what was logged before is written, for a second at most."""
        if self._process == os.getpid():
            written = threading.Event()
            self._lines.put(written)
            written.wait(_PATIENCE)


def _next(lines: _Lines) -> tuple[list[str], list[threading.Event]]:
    """Wait for lines; as many as there are, up to a piece, and who waits for them to be written."""
    texts: list[str] = []
    flushes: list[threading.Event] = []
    size = 0
    while size < _PIECE and not (size and lines.empty()):
        item = lines.get()
        size += 1
        if isinstance(item, threading.Event):
            flushes.append(item)
        else:
            texts.append(item)
            size += len(item)
    return texts, flushes


def _unbuffered(stream: TextIO) -> Callable[[str], object]:
    if not isinstance(stream, io.TextIOWrapper):
        return stream.write  # Dramatiq's pipe to its main process has no buffer
    descriptor = stream.fileno()

    def write(text: str) -> None:
        data = text.encode(errors="backslashreplace")
        while data:
            data = data[os.write(descriptor, data) :]

    return write

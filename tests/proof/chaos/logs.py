"""What must never stand in the logs of the processes under attack."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

__all__ = ["is_traceback", "leaks"]

_OF_THE_DRIVER = ("coro=<Connection.close()", "unexpected connection_lost() call")
"""Connections of asyncpg that were given up while it waited on them by itself."""


def is_traceback(line: str) -> bool:
    """Whether a line of a log tells of an error that nobody expected.

    A consumer's own is expected, and Dramatiq logs a broker's before it tries again; what is raised into it is not.
    """
    if not line.startswith("{"):
        return line.startswith("Traceback")
    entry = json.loads(line)
    if entry["logger"].startswith("dramatiq."):
        return bool(entry["event"].startswith("Failed to process message"))
    raised = "Traceback" in entry.get("exception", "") or "never retrieved" in entry["event"]
    if any(each in entry["event"] for each in _OF_THE_DRIVER):
        return False
    return raised and entry["event"] not in ("outbox.failed", "outbox.dead_lettered")


def leaks(log: str, url: str) -> bool:
    """Whether the URL's password stands in the log."""
    password = urlsplit(url).password
    assert password, "the suite's own servers have passwords"
    return password in log

"""What is kept of a failure: enough to understand it at 3 am, bounded, and without the values it happened on.

Errors are stored for as long as the row is and shown by the CLI, so they hold no payload values, no SQL parameters
and no more than a few frames of code positions. What is logged of them may be longer and holds no such values either.
What follows from a failure is decided in `runner.py`.
"""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING, Any

import asyncpg
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from service.errors import DatabaseUnavailableError
from service.text import storable

if TYPE_CHECKING:
    from collections.abc import Mapping

_MESSAGE_LENGTH = 500
_FRAMES = 6

_NUMBER = re.compile(r"-?\d+(\.\d+)?")
# What PostgreSQL adds to its message: the values of the row.
_DETAIL = re.compile(
    r"\nDETAIL: .*?(?=\nHINT: |\n\[SQL: |\n\(Background on |\n\nThe above exception|\n\nDuring handling|\Z)", re.DOTALL
)


def describe(error: BaseException, payload: Mapping[str, Any]) -> dict[str, str]:
    """`type`, `message` and a short `traceback` of an error, without the payload's values."""
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    positions = "\n".join(f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames)
    return {
        "type": storable(type(error).__qualname__, _MESSAGE_LENGTH),
        "message": storable(_message(error, payload), _MESSAGE_LENGTH),
        "traceback": storable(positions),
    }


def said(error: BaseException) -> str:
    """`str(error)`, also of an exception that cannot be asked."""
    try:
        return str(error)
    except BaseException as failure:  # noqa: BLE001  whatever it raises must not hide what went wrong
        return f"{type(error).__name__}, which cannot say more: its __str__ raised {type(failure).__name__}"


def _short(filename: str) -> str:
    return "/".join(filename.rsplit("/", 3)[-3:])


def _message(error: BaseException, payload: Mapping[str, Any]) -> str:
    match error:
        case ValidationError():
            fields = (
                ".".join(map(str, each["loc"])) + ": " + each["msg"] for each in error.errors(include_input=False)
            )
            text = "; ".join(fields)
        case DBAPIError():
            # Below the first line PostgreSQL repeats the row's values.
            text = (str(error.orig) or type(error.orig).__name__).partition("\n")[0]
        case asyncpg.PostgresError():
            text = str(error).partition("\n")[0]
        case _:
            text = said(error)
    return _without_values(text, payload)


def trace(error: BaseException, payload: Mapping[str, Any]) -> str:
    """The whole traceback for the log, without the payload's values and the row's that PostgreSQL tells."""
    return _without_values(_DETAIL.sub("", "".join(traceback.format_exception(error))), payload).rstrip()


def _without_values(text: str, payload: Mapping[str, Any]) -> str:
    """Short values are removed as whole words only: EUR, but not of EUROPE. The shortest stay, for they give nothing
    away and would be found everywhere: one character, or two digits."""
    for value in sorted(map(_shown, payload.values()), key=len, reverse=True):
        if len(value) >= 4 and not _NUMBER.fullmatch(value):
            text = re.sub(re.escape(value), "[payload]", text, flags=re.IGNORECASE)  # servers repeat in another case
        elif len(value) >= (3 if _NUMBER.fullmatch(value) else 2):
            text = re.sub(rf"(?<!\w)(?<!\d\.)(?<!, line ){re.escape(value)}(?!\w)(?!\.\d)", "[payload]", text)
    return text


def _shown(value: object) -> str:
    return "" if value is None or isinstance(value, bool) else str(value)


def lost_database(error: BaseException) -> bool:
    """Whether an error means that PostgreSQL went away, rather than that it refused something."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:  # `raise error from error` makes a circle
        seen.add(id(cause))
        verdict = _verdict(cause)
        if verdict is not None:
            return verdict
        cause = cause.__cause__
    return False


def _verdict(error: BaseException) -> bool | None:
    """`None` where only what the error was raised from can tell."""
    match error:
        case DatabaseUnavailableError() | PoolTimeoutError() | asyncpg.PostgresConnectionError():
            return True
        case DBAPIError():
            return error.connection_invalidated or (error.orig is not None and lost_database(error.orig))
        case asyncpg.QueryCanceledError():
            return False
        case asyncpg.OperatorInterventionError() | asyncpg.TooManyConnectionsError() | asyncpg.InternalClientError():
            return True
        case asyncpg.InterfaceError():
            return "connection" in said(error)
    return None

"""The console's composition root.

What must stay true: it is never a part of the API. It has another port, other callers, and rights that no client of the
API may come near.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException

from service.console import (
    audit_page,
    dead_letter_pages,
    event_pages,
    lane_pages,
    login_page,
    operation_pages,
    overview_page,
    payload_pages,
    process_page,
    queue_pages,
    schedule_pages,
)
from service.console.doorkeeper import Doorkeeper
from service.console.ledger_looks import LedgerLooks
from service.console.looks import ConsolePool
from service.console.operation_runner import OperationRunner
from service.console.operators import Signer, identity_of
from service.console.rendering import HERE, page
from service.database.driver import CONTENT_ERRORS, DRIVER_ERRORS
from service.http.callers import check_callers
from service.http.edge import Allowance, KnownHosts
from service.http.middleware import BodyLimit, Deadline, RequestContext
from service.settings import listed
from service.telemetry.logs import brief, get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import Response

    from service.settings import Settings

MAX_BODY_BYTES = 65_536
REQUEST_TIMEOUT = 40.0
"""Seconds; what changes something may take 30."""

_log = get_logger(__name__)


def create_console(settings: Settings) -> FastAPI:
    """The application.

    Raises:
        ConfigurationError: nobody could come in.
    """
    # No schema: nobody but its own pages talks to it.
    app = FastAPI(lifespan=_lifespan, openapi_url=None, redirect_slashes=False)
    app.state.settings = settings
    app.state.signer = signer = Signer(settings.console.secret.get_secret_value())
    app.state.identity = identity_of(settings.console, signer)
    app.state.tries = Allowance(login_page.TRIES)
    # The last one added is the outermost.
    app.add_middleware(Doorkeeper, identity=app.state.identity)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    app.add_middleware(Deadline, seconds=REQUEST_TIMEOUT)
    app.add_middleware(KnownHosts, hosts={each.lower() for each in listed(settings.console.hosts)})
    app.add_middleware(RequestContext, running={})
    # Of two that fit a path the first one serves it.
    for each in (
        overview_page, payload_pages, operation_pages, dead_letter_pages, event_pages, process_page, queue_pages,
        schedule_pages, lane_pages, audit_page, login_page,
    ):  # fmt: skip
        app.include_router(each.router)
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    for kind in (StarletteHTTPException, RequestValidationError, *DRIVER_ERRORS):
        app.add_exception_handler(kind, _told)
    check_callers(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    # Pages are read as a role that need not see payloads; what is done is done as the process's own.
    looking = settings.console.viewer(settings.database)
    app.state.looking = ConsolePool(looking, "outbox-console")
    app.state.acting = ConsolePool(settings.database, "outbox-console-acts", longest=30, acting=True)
    counting = ConsolePool(looking, "outbox-console-counts", size=2, longest=60)
    for pool in (pools := (app.state.looking, app.state.acting, counting)):
        await pool.open()
    app.state.looks = LedgerLooks(counting)
    app.state.runner = OperationRunner(app.state.acting)
    yield
    await app.state.runner.close()
    for pool in pools:
        pool.close()


async def _told(request: Request, error: Exception) -> Response:
    """What went wrong, as a page that says what to do."""
    status, said = 503, "PostgreSQL does not answer. This page shows itself again when you load it."
    match error:
        case StarletteHTTPException():
            status, said = error.status_code, str(error.detail)
        case RequestValidationError():
            status, said = 422, "Something in the address of this page is not what it should be."
        case _ if isinstance(error, CONTENT_ERRORS):
            status, said = 422, "PostgreSQL takes no such value."
        case asyncpg.QueryCanceledError():
            said = "This takes longer than the console may. Narrow what you are looking for."
        case asyncpg.LockNotAvailableError():
            said = (
                "Something else holds what this takes, such as a hand-over that goes on. Nothing was done: try again."
            )
        case asyncpg.InsufficientPrivilegeError():
            status, said = 403, "The console's own role in PostgreSQL may not do this."
        case asyncpg.UndefinedTableError() | asyncpg.UndefinedColumnError() | asyncpg.UndefinedFunctionError():
            said = "The ledger's tables are older than this console: run alembic upgrade heads."
    if status >= 500:
        _log.warning("console.failed", error=brief(error))
    return page(request, "problem.html", status=status, said=said)

"""PostgreSQL itself keeps payloads from the pages."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr

from service.dev.postgres import psql
from tests.service.api.serving import serve
from tests.service.console.ledger_rows import SECRET
from tests.service.deploy.conftest import apply_roles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.service.console.conftest import As, MakeConsole
    from tests.service.console.ledger_rows import LedgerRows


@pytest.fixture
def viewer_url(database_url: str) -> Iterator[str]:
    """The test's database, as the role that pages are read with."""
    name = urlsplit(database_url).path.removeprefix("/")
    roles = [f"{name}_{role}" for role in ("migrator", "app", "relay", "viewer")]
    apply_roles(database_url)
    yield database_url.replace("postgres@", f"{roles[-1]}@", 1)
    for role in roles:
        psql(database_url, f'REASSIGN OWNED BY "{role}" TO postgres; DROP OWNED BY "{role}"; DROP ROLE "{role}"')


async def test_every_page_is_read_by_a_role_that_may_not_see_payloads(
    make_console: MakeConsole, by_proxy: As, rows: LedgerRows, viewer_url: str
) -> None:
    app = make_console(viewer_url=SecretStr(viewer_url))
    [delivery] = rows.messages(1)
    rows.dead_letters(1)
    rows.schedule("nightly")
    rows.messages(2, lane="'order:7'", due_at="outbox_parked()")
    rows.sql("INSERT INTO outbox_operation (kind, asked_by) VALUES ('pause', 'bob')")
    async with serve(app) as client:
        client.headers.update(by_proxy("ann", "operator"))
        for path in (
            "/", "/dead-letters", "/dead-letters/1", "/dead-letters?state=any&error=550", "/events",
            "/events?state=dead", f"/events/{delivery}", "/processes", "/operations", "/operations/1", "/audit",
            "/lanes", "/queues/limit?queue=stock", "/schedules", "/schedules/run?schedule=nightly",
            "/queues/pause?queue=stock", "/dead-letters/replay/many", "/dead-letters/replay/many?group=0123456789ab",
        ):  # fmt: skip
            answer = await client.get(path)
            assert answer.status_code == 200, path
            assert "did not answer" not in answer.text, path
            assert SECRET not in answer.text
        async with app.state.looking() as connection:
            for table in ("outbox_message", "dead_letter", "outbox_schedule"):
                with pytest.raises(Exception, match="permission denied"):
                    await connection.fetch(f"SELECT payload FROM {table}")

"""The page on sizing counts connections as the code opens them."""

from __future__ import annotations

from service.outbox.running.ledger_pool import CONNECTIONS
from service.settings import DatabaseSettings
from tests.service.docs.pages import DOCS


def test_the_formula_is_that_of_the_code() -> None:
    page = (DOCS / "sizing.md").read_text()
    pool, more = DatabaseSettings.model_fields["pool_size"].default, CONNECTIONS + 1
    assert f"`DATABASE__POOL_SIZE` + {more}:" in page
    assert (
        f"{pool} x API processes + {pool + more} x worker processes + 5 x relays + 10 x console processes + 2" in page
    )
    assert f"come to {2 * pool + 2 * (pool + more) + 2 * 5 + 10 + 2}." in page

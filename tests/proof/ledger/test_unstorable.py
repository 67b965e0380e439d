"""Whatever a consumer raises is settled at once: also what PostgreSQL cannot store, and what cannot be asked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from service.outbox import Fail, Retry
from service.telemetry.logs import trace_context
from service.text import storable
from tests.proof.ledger import domain

if TYPE_CHECKING:
    from service.database.driver import Connection
    from service.outbox.running.runner import Runner
    from tests.proof.ledger.conftest import Ledger

ANY_TEXT = st.text(st.characters(codec=None) | st.sampled_from("\x00\ud800\udcfc\udfff\uffff\U0001f600"), max_size=40)


class Mute(Exception):  # noqa: N818
    """Raises where it should say what is wrong."""

    def __str__(self) -> str:
        raise SystemExit(9)


class Wordless(Fail):
    def __str__(self) -> str:
        return None  # type: ignore[return-value]


class Circular(Exception):  # noqa: N818
    def __init__(self) -> None:
        self.__cause__ = self


async def settled(ledger: Ledger, runner: Runner, error: BaseException) -> tuple[str | None, dict[str, Any], str]:
    """The state after one run that ended with `error`, what is stored of it, and the reason if it died of it."""
    subject_id = uuid4()
    domain.RAISED[subject_id] = error
    (message_id,) = await ledger.publish(domain.Unsaid(subject_id=subject_id))
    await ledger.set(message_id, state="dispatched", dispatches=1)
    await runner.deliver(message_id)
    dead = await ledger.dead_letter(message_id)
    row = dead or await ledger.row(message_id)
    assert row is not None
    errors = json.loads(row["errors"])
    return await ledger.state(message_id), errors[-1] if errors else {}, dead["reason"] if dead else ""


@pytest.mark.parametrize("text", ["no\x00thing", "no such \udcfcser", "\ud800", "\ud83d\ude00"])
async def test_any_text_settles_a_delivery(ledger: Ledger, runner: Runner, text: str) -> None:
    clean = storable(text)
    state, stored, reason = await settled(ledger, runner, Fail(text))
    assert (state, stored["message"], reason) == ("dead", clean, clean)


@pytest.mark.parametrize(
    ("error", "state"),
    [(Mute(), "pending"), (Wordless(), "dead"), (Circular(), "pending"), (Retry("\x00"), "pending"),
     (NotImplementedError("\ud800"), "dead")],
)  # fmt: skip
async def test_an_error_that_cannot_be_asked_is_one_like_any_other(
    ledger: Ledger, runner: Runner, error: BaseException, state: str
) -> None:
    found, stored, _reason = await settled(ledger, runner, error)
    assert (found, stored["type"]) == (state, type(error).__name__)


async def test_an_error_that_says_nothing_tells_its_type(ledger: Ledger, runner: Runner) -> None:
    _state, stored, _reason = await settled(ledger, runner, Mute())
    assert stored["message"] == "Mute, which cannot say more: its __str__ raised SystemExit"
    _state, _stored, reason = await settled(ledger, runner, Wordless())
    assert "its __str__ raised TypeError" in reason


@pytest.mark.parametrize("error", [Fail("a forbidden word"), RuntimeError("a forbidden word")])
async def test_what_postgresql_refuses_for_good_is_written_in_other_words(
    ledger: Ledger, runner: Runner, error: Exception
) -> None:
    await ledger.connection.execute(
        """ALTER TABLE dead_letter ADD CONSTRAINT polite CHECK (reason NOT LIKE '%forbidden%');
           ALTER TABLE outbox_message ADD CONSTRAINT polite CHECK (errors::text NOT LIKE '%forbidden%')"""
    )
    state, stored, reason = await settled(ledger, runner, error)
    assert state == ("dead" if isinstance(error, Fail) else "pending")
    assert "could not be stored (CheckViolationError)" in stored["message"]
    assert isinstance(error, RuntimeError) or "could not be stored" in reason


@given(text=ANY_TEXT)
@example("\x00")
@example("\ud83d\ude00")
@examples(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_cleaned_text_is_stored_as_it_is(connection: Connection, text: str) -> None:
    clean = storable(text)
    assert len(clean) == len(text)
    stored = await connection.fetchrow("SELECT $1::text, $2::jsonb #>> '{}'", clean, json.dumps(clean))
    assert stored is not None
    assert tuple(stored) == (clean, clean)


async def test_an_events_ids_never_keep_it_from_being_stored(ledger: Ledger) -> None:
    with trace_context({"correlation_id": "of\x00a\ud800queue"}):
        (message_id,) = await ledger.publish()
    row = await ledger.row(message_id)
    assert row is not None
    assert json.loads(row["headers"]) == {"correlation_id": "of\ufffda\ufffdqueue"}


def test_text_is_cut_with_an_ellipsis() -> None:
    assert storable("\x00" * 9, 5) == "\ufffd" * 4 + "…"
    assert storable("12345", 5) == "12345"

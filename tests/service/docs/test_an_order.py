"""What `docs/an-order.md` shows of the example is really in it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from relay.cli.app import main
from service.dev.places import ROOT
from service.dev.postgres import psql
from service.ledger.ids import delivery_id, new_event_id
from tests.service.docs.pages import blocks

if TYPE_CHECKING:
    from uuid import UUID

    from tests.service.docs.pages import Block

PAGE = ROOT / "docs" / "an-order.md"

_DELIVERY = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers, state, attempts,
                            dispatches, created_at, dispatched_at, started_at, completed_at)
VALUES ('{id}', '{event_id}', '{event_type}', 1, '{consumer}', '{queue}', '{{"order_id": "{event_id}"}}',
        '{{"correlation_id": "my-order"{caused}}}', 'completed', 1, 1, now(), now(), now(), now())
"""


def _parts(shown: str) -> list[str]:
    """Whole lines; between them stands `...` for what is left out."""
    return [part for part in re.split(r"^ *\.\.\.\n", shown, flags=re.MULTILINE) if part]


def _assert_shown(parts: list[str], whole: str) -> None:
    """Each part is in the whole, one after the other."""
    for part in parts:
        _, found, whole = whole.partition("\n" + part)
        assert found, part
        whole = "\n" + whole


@pytest.mark.parametrize("block", blocks(PAGE, language="python"), ids=lambda block: block.title)
def test_an_excerpt_is_in_the_code(block: Block) -> None:
    _assert_shown(_parts(block.text.partition("\n")[2]), (ROOT / block.title).read_text())


def test_every_module_is_shown() -> None:
    shown = {block.title for block in blocks(PAGE, language="python")}
    assert {f"service/domains/orders/{name}.py" for name in ("events", "routes", "consumers")} <= shown


def test_the_names_in_it_are_those_of_the_code() -> None:
    """What stands between backticks in the text, and in the lines of the diagram."""
    code = "\n".join(file.read_text() for file in (ROOT / "service").rglob("*.py"))
    for name in re.findall(r"`([A-Za-z_]\w*)(?:\(\))?`", re.sub(r"```.*?```", "", PAGE.read_text(), flags=re.DOTALL)):
        assert re.search(rf"\b{name}\b", code), name


def test_it_is_short() -> None:
    assert len(PAGE.read_text().splitlines()) <= 150


def _same_everywhere(text: str) -> str:
    """Without what differs from one order to the next."""
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", text)
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?Z", "TIME", text)


def test_the_story_is_told_as_the_page_shows_it(
    database_url: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    placed, confirmed = new_event_id(), new_event_id()
    caused = f', "causation_id": "{delivery_id(placed, 1)}"'
    rows: list[tuple[UUID, int, str, str, str, str]] = [
        (placed, 1, "order.placed", "orders.reserve_stock", "stock", ""),
        (placed, 2, "order.placed", "orders.count_sales", "stock", ""),
        (confirmed, 1, "order.confirmed", "orders.send_confirmation", "email", caused),
    ]
    for event_id, number, event_type, consumer, queue, cause in rows:
        row = _DELIVERY.format(
            id=delivery_id(event_id, number),
            event_id=event_id,
            event_type=event_type,
            consumer=consumer,
            queue=queue,
            caused=cause,
        )
        psql(database_url, row)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    [shown] = blocks(PAGE, language="console")
    command, _, story = shown.text.partition("\n")
    with pytest.raises(SystemExit) as ended:
        main(command.split()[2:])
    assert not ended.value.code
    _assert_shown(_parts(_same_everywhere(story)), _same_everywhere(capsys.readouterr().out))

"""Bodies are put together by hand, and equal Dramatiq's own to the byte."""

from __future__ import annotations

import json
from uuid import UUID

import pytest
from dramatiq import Message
from hypothesis import given
from hypothesis import strategies as st

from service.ledger.message import OPTIONS, REDIS_ID, DueDelivery, delivery_in, encode

DELIVERY = UUID("0198c2a0-0000-7000-8000-000000000001")
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def dramatiqs(queue: str, row: DueDelivery, timestamp: int, options: dict[str, str]) -> str:
    message: Message[None] = Message(queue, row.consumer, (row.delivery_id,), {}, options, row.delivery_id, timestamp)
    return message.encode().decode()


@pytest.mark.parametrize("redis_message_id", [None, "0198:4f"])
@pytest.mark.parametrize("trace", [None, TRACE])
@pytest.mark.parametrize("consumer", ["orders.reserve_stock", 'a "quoted" \\ name', "größe\n\u2028\x00", ""])
def test_a_body_is_dramatiqs_own(consumer: str, trace: str | None, redis_message_id: str | None) -> None:
    row = DueDelivery("0198c2a0-0000-7000-8000-000000000001", consumer, trace)
    options = {"redis_message_id": redis_message_id, "traceparent": trace}
    expected = dramatiqs("stock", row, 1_755_000_000_000, {key: value for key, value in options.items() if value})
    assert encode("stock", row, 1_755_000_000_000, redis_message_id) == expected


def test_it_has_the_seven_keys_that_dramatiq_accepts() -> None:
    body = encode("stock", DueDelivery("id", "orders.reserve_stock", TRACE), 1)
    assert list(json.loads(body)) == [
        "queue_name", "actor_name", "args", "kwargs", "options", "message_id", "message_timestamp",
    ]  # fmt: skip


@given(st.text(), st.text(), st.text())
def test_no_text_in_the_database_makes_a_body_that_cannot_be_decoded(queue: str, consumer: str, trace: str) -> None:
    message: Message[None] = Message.decode(encode(queue, DueDelivery("id", consumer, trace), 1, consumer).encode())
    assert (message.queue_name, message.actor_name, message.options.get("traceparent", "")) == (queue, consumer, trace)


def test_the_relay_writes_the_options_that_a_worker_leaves_in_a_body_and_no_others() -> None:
    body = json.loads(encode("stock", DueDelivery("id", "orders.reserve_stock", TRACE), 1, "entry"))
    assert set(body["options"]) == OPTIONS
    assert body["options"][REDIS_ID] == "entry"


@pytest.mark.parametrize("arguments", [[], ["id"], [None], [7], [[]], [str(DELIVERY), "more"]])
def test_a_body_that_no_relay_wrote_holds_no_delivery(arguments: list[object]) -> None:
    assert delivery_in(arguments) is None
    assert delivery_in(json.loads(encode("stock", DueDelivery(str(DELIVERY), "a.b", None), 1))["args"]) == DELIVERY

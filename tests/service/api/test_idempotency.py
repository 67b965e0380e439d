"""A request repeated under its Idempotency-Key has the first one's effect and the first one's answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
import pytest
from sqlalchemy import text

from service.database.driver import read_json
from service.ledger.erasing import erase
from tests.waiting import until

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.service.api.conftest import Sql

ROWS = "SELECT count(*) FROM probe"
KEYS = "SELECT count(*) FROM idempotency_key"
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


async def _post(client: httpx.AsyncClient, key: str, id_: int = 1, path: str = "/probes") -> httpx.Response:
    return await client.post(path, json={"id": id_}, headers={"Idempotency-Key": key})


def _own_headers(response: httpx.Response) -> dict[str, str]:
    each_time = {"date", "x-correlation-id", "idempotency-replayed"}
    return {name: value for name, value in response.headers.items() if name not in each_time}


async def test_the_stored_response_is_replayed(client: httpx.AsyncClient, sql: Sql) -> None:
    first = await _post(client, '"a key"')
    second = await _post(client, '"a key"')
    assert first.status_code == second.status_code == 201
    assert first.content == second.content
    assert _own_headers(first) == _own_headers(second)
    assert first.headers["Location"] == "/probes/1"
    assert "Idempotency-Replayed" not in first.headers
    assert second.headers["Idempotency-Replayed"] == "true"
    assert (sql(ROWS), sql("SELECT count(*) FROM outbox_message"), sql(KEYS)) == ("1", "1", "1")


async def test_a_replay_undoes_what_the_dependencies_did_again(client: httpx.AsyncClient, sql: Sql) -> None:
    for _ in range(3):
        assert (await _post(client, "k", path="/audited")).status_code == 201
    assert sql("SELECT string_agg(payload->>'probe', ',' ORDER BY id) FROM outbox_message") == "0,1"


async def test_a_response_that_was_erased_says_so_and_nothing_runs_again(
    client: httpx.AsyncClient, sql: Sql, database_url: str
) -> None:
    await _post(client, "k", 471_147)
    connection = await asyncpg.connect(database_url)
    await read_json(connection)
    erased = await erase(connection, ["471147"], by="ann", why="request 17")
    await connection.close()
    assert erased.responses == 1
    repeated = await _post(client, "k", 471_147)
    problem = repeated.json()
    assert (repeated.status_code, problem["code"]) == (410, "response_erased")
    assert repeated.headers["Content-Type"] == "application/problem+json"
    assert set(problem) >= {"type", "title", "status", "correlation_id"}
    assert "471147" not in str(repeated.headers)
    assert sql(ROWS) == "1"
    assert (await _post(client, "k", 2)).json()["code"] == "idempotency_key_reused"


async def test_a_key_is_the_same_with_and_without_quotes(client: httpx.AsyncClient, sql: Sql) -> None:
    await _post(client, '"8e03978e-40d5-43e8-bc93-6894a57f9324"')
    bare = await _post(client, "8e03978e-40d5-43e8-bc93-6894a57f9324")
    assert bare.headers["Idempotency-Replayed"] == "true"
    assert sql(ROWS) == "1"


async def test_a_path_is_told_by_what_was_sent(client: httpx.AsyncClient, sql: Sql) -> None:
    """Decoded, the first could not be stored, and the others would be one path."""
    paths = ("a%00b", "a%0Ab", "ab", "a%3Fb")
    answers = [await client.post(f"/named/{path}", headers={"Idempotency-Key": "k"}) for path in paths * 2]
    assert [answer.status_code for answer in answers] == [201] * 8
    assert [answer.json()[0] for answer in answers] == ["a\x00b", "a\nb", "ab", "a?b"] * 2
    assert ["Idempotency-Replayed" in answer.headers for answer in answers] == [False] * 4 + [True] * 4
    assert sql(KEYS) == "4"


async def test_another_body_under_the_key_is_refused(client: httpx.AsyncClient, sql: Sql) -> None:
    await _post(client, "k", 1)
    other = await _post(client, "k", 2)
    assert other.status_code == 422
    assert other.json()["code"] == "idempotency_key_reused"
    assert sql(ROWS) == "1"


async def test_a_key_belongs_to_its_path(client: httpx.AsyncClient, sql: Sql) -> None:
    await _post(client, "k")
    other = await _post(client, "k", path="/others")
    assert other.status_code == 201
    assert "Idempotency-Replayed" not in other.headers
    assert sql(ROWS) == "2"


async def test_a_key_belongs_to_its_caller(client: httpx.AsyncClient, sql: Sql) -> None:
    for number, user in enumerate(("ada", "bob", "bob")):
        headers = {"Idempotency-Key": "k", "User": user}
        answer = await client.post("/own", json={"id": min(number, 1)}, headers=headers)
        assert answer.status_code == 201
        assert ("Idempotency-Replayed" in answer.headers) == (number == 2)
    assert sql(ROWS) == "2"


async def test_nothing_is_replayed_to_someone_who_may_not_ask(client: httpx.AsyncClient) -> None:
    await client.post("/own", json={"id": 1}, headers={"Idempotency-Key": "k", "User": ""})
    assert (await _post(client, "k", path="/own")).status_code == 401


async def test_an_endpoint_that_is_no_coroutine(client: httpx.AsyncClient) -> None:
    first, second, other = [await _post(client, key, path="/plain") for key in ("k", "k", "other")]
    assert first.status_code == 201
    assert first.content == second.content != other.content


async def test_without_a_key_nothing_is_remembered(client: httpx.AsyncClient, sql: Sql) -> None:
    assert (await client.post("/probes", json={"id": 1})).status_code == 201
    assert (await client.post("/probes", json={"id": 1})).status_code == 409
    assert sql(KEYS) == "0"


async def test_a_malformed_key_is_refused(client: httpx.AsyncClient, sql: Sql) -> None:
    bare = ["", "two words", "k;a=1", "x" * 256, "ü"]
    quoted = ['""', '"open', 'a"b', '"bad \\escape"', f'"{"x" * 256}"', '"ü"']
    for key in bare + quoted:
        response = await client.post("/probes", json={"id": 1}, headers=[(b"Idempotency-Key", key.encode())])
        assert (response.status_code, response.json()["code"]) == (400, "idempotency_key_malformed"), key
    assert sql(ROWS) == "0"


async def test_two_keys_are_refused(client: httpx.AsyncClient) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "a")]
    assert (await client.post("/probes", json={"id": 1}, headers=headers)).status_code == 400


@pytest.mark.parametrize("key", ["x" * 255, '"all of: !#$%&()*+,-./ [] ~ and \\" and \\\\"'])
async def test_an_unusual_key_is_taken(client: httpx.AsyncClient, key: str) -> None:
    assert (await _post(client, key)).status_code == 201
    assert (await _post(client, key)).headers["Idempotency-Replayed"] == "true"


async def test_a_refused_request_may_be_repeated_corrected(client: httpx.AsyncClient, sql: Sql) -> None:
    await client.post("/probes", json={"id": 1})
    assert (await _post(client, "k", 1)).status_code == 409
    assert sql(KEYS) == "0"
    assert (await _post(client, "k", 2)).status_code == 201


async def test_a_request_whose_commit_fails_leaves_no_response(client: httpx.AsyncClient, sql: Sql) -> None:
    response = await client.post("/deferred", headers={"Idempotency-Key": "k"})
    assert response.status_code == 409
    assert sql(KEYS) == "0"


async def test_while_the_first_runs_the_second_is_refused_at_once(
    client: httpx.AsyncClient, engine: AsyncEngine, sql: Sql
) -> None:
    async with engine.connect() as blocker:
        await blocker.execute(text("LOCK TABLE probe"))
        first = asyncio.create_task(_post(client, "k"))
        await until(lambda: sql(WAITING) == "1", what="the first request to wait for the table")
        second = await _post(client, "k")
        assert not first.done()
    assert second.status_code == 409
    assert second.json()["code"] == "request_in_progress"
    assert second.headers["Retry-After"] == "1"
    assert (await first).status_code == 201
    assert (await _post(client, "k")).headers["Idempotency-Replayed"] == "true"
    assert sql(ROWS) == "1"


async def test_of_many_at_once_one_takes_effect(client: httpx.AsyncClient, sql: Sql) -> None:
    async def insist(_: Any) -> httpx.Response:
        while (response := await _post(client, "k")).status_code == 409:
            assert response.json()["code"] == "request_in_progress"
        return response

    answers = await asyncio.gather(*map(insist, range(20)))
    assert {(answer.status_code, answer.content) for answer in answers} == {(201, b'{"id":1,"name":""}')}
    assert sum("Idempotency-Replayed" not in answer.headers for answer in answers) == 1
    assert (sql(ROWS), sql("SELECT count(*) FROM outbox_message")) == ("1", "1")


async def test_an_unanswered_request_is_found_by_its_key(
    client: httpx.AsyncClient, engine: AsyncEngine, sql: Sql
) -> None:
    async with engine.connect() as blocker:
        await blocker.execute(text("LOCK TABLE probe"))
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/probes", json={"id": 1}, headers={"Idempotency-Key": "k"}, timeout=0.5)
    await until(lambda: sql(ROWS) == "1", what="the request to be carried out without its client")
    found = await _post(client, "k")
    assert found.status_code == 201
    assert found.headers["Idempotency-Replayed"] == "true"

"""What every error of the API is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

__all__ = ["assert_problem"]


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Fail unless the answer is a whole problem with this status and code; returns its body."""
    assert response.headers["Content-Type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert (response.status_code, body["status"], body["code"]) == (status, status, code)
    assert body["type"] == f"urn:problem-type:{code}"
    assert body["title"]
    assert body["correlation_id"] == response.headers["X-Correlation-ID"]
    return body

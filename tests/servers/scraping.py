"""Scrapes a process's metrics, and reads them as Prometheus does."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from relay.process import relay_metrics
from service.dev.servers import free_port
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from relay.process.loop import Relay
    from service.settings import Settings

__all__ = ["Page", "scrape", "shows", "watched"]


class Page:
    """What a scrape returned: `page("outbox_up", system="broker")` is a sample's value, `None` if there is none."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float | None:
        return self._samples.get((name, frozenset(labels.items())))

    def values(self, name: str, label: str) -> set[str]:
        """All values that this label has."""
        return {dict(labels)[label] for each, labels in self._samples if each == name}

    def __iter__(self) -> Iterator[tuple[str, dict[str, str]]]:
        return ((name, dict(labels)) for name, labels in self._samples)


async def scrape(port: int, seconds: float = 30) -> Page:
    """One scrape; `AssertionError` while nobody listens yet."""
    try:
        async with httpx.AsyncClient(timeout=seconds) as client:
            response = await client.get(f"http://127.0.0.1:{port}/metrics")
    except httpx.ConnectError as error:
        raise AssertionError("nobody listens") from error
    assert response.status_code == 200, response.text
    return Page(response.text)


async def shows(settings: Settings, condition: Callable[[Page], Any]) -> Page:
    """The first page of which this is true."""

    async def look() -> Page | None:
        page = await scrape(settings.metrics.port)
        return page if condition(page) else None

    page = await until(look, every=0.1, what="the metric")
    assert isinstance(page, Page)
    return page


@asynccontextmanager
async def watched(settings: Settings) -> AsyncIterator[Relay]:
    """A relay on the test's loop that serves metrics, and keeps none of them for long."""
    settings.metrics.port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relay_metrics, "_KEPT", 0.01)
        patch.setattr(relay_metrics, "_TIMES_ITS_COST", 0)
        async with relaying(settings) as relay, relay_metrics.relay_metrics_served(settings, relay.tally):
            await until(lambda: scrape(settings.metrics.port), what="metrics")
            yield relay

"""A real browser, and what it found wrong with what it was shown."""

from __future__ import annotations

import os
import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import async_playwright

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import BrowserContext, Page

__all__ = ["CHROMIUM", "Visit", "browsing", "needs_browser"]

CHROMIUM = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="NOT TESTED: there is no Chromium (on Debian: apt install chromium)"
)


class Visit:
    """A browser with a session of its own.

    Attributes:
        page: Its tab.
        complaints: What the browser said on its console: errors of scripts, and what the policy refused.
    """

    def __init__(self, context: BrowserContext, page: Page) -> None:
        self.context = context
        self.page = page
        self.complaints: list[str] = []
        page.on(
            "console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    async def obstacles(self) -> list[str]:
        """What keeps somebody from using the page, as axe finds it."""
        found: dict[str, Any] = (await Axe().run(self.page)).response
        return [f"{each['id']}: {node['html'][:200]}" for each in found["violations"] for node in each["nodes"]]


@asynccontextmanager
async def browsing(headers: dict[str, str] | None = None, **options: Any) -> AsyncIterator[Visit]:
    """A browser whose requests have these headers, as a proxy would add them."""
    # Whoever is root may not use the sandbox.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            context = await browser.new_context(extra_http_headers=headers or {}, **options)
            context.set_default_timeout(60_000)
            yield Visit(context, await context.new_page())
        finally:
            await browser.close()

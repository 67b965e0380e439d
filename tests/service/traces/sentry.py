"""The worker of the parcels, with the hook for Sentry that `docs/traces.md` shows."""

from __future__ import annotations

from tests.service.docs.pages import TRACES, blocks
from tests.service.traces.app import setup_broker

__all__ = ["setup_broker"]

[_hook] = blocks(TRACES, language="python")
exec(compile(_hook.text, _hook.title, "exec"))

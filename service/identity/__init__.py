"""Who is calling the API. To do without, delete the folder, its settings, and what no longer imports."""

from __future__ import annotations

from service.identity.principal import Principal, needs

__all__ = ["Principal", "needs"]

"""What Schemathesis cannot know: an Idempotency-Key is new for every request that is meant."""

from __future__ import annotations

import re
from typing import Any
from uuid import uuid4

import schemathesis

_WELL_FORMED = re.compile(r'"(?:[ !#-\[\]-~]|\\["\\])+"|[A-Za-z0-9._~:/+=@-]+')


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """Make well-formed keys unique; malformed ones stay as they were generated."""
    key = (case.headers or {}).get("Idempotency-Key", "")
    if _WELL_FORMED.fullmatch(key) and len(key) <= 257:
        case.headers["Idempotency-Key"] = f'"{uuid4()}"'

"""How pages are made of templates.

What must stay true: whatever was stored reaches a page as text. It is escaped by the templates' engine, everywhere and
without being asked; and characters that would turn text around, or show nothing, are written as escapes.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from service.console.forms import TOKEN, form_token
from service.ledger import limit_text
from service.text import visible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastapi import Request

HERE = Path(__file__).parent

NAVIGATION = (
    ("/", "Overview"),
    ("/dead-letters", "Dead letters"),
    ("/events", "Events"),
    ("/schedules", "Schedules"),
    ("/lanes", "Lanes"),
    ("/processes", "Processes"),
    ("/operations", "Operations"),
    ("/audit", "Audit"),
)
"""Where each page leads to, and what that is called."""


def page(request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A page, for who is calling."""
    caller = getattr(request.state, "caller", None)
    state = request.app.state
    given = {
        "caller": caller,
        "logs_in": state.identity.logs_in,
        "token_field": TOKEN,
        "token": form_token(state.signer, caller) if caller else "",
        "navigation": NAVIGATION,
        "path": request.url.path,
        "here": request.url.path + (f"?{request.url.query}" if request.url.query else ""),
        "service": state.settings.api.title,
    }
    return HTMLResponse(_templates.get_template(template).render(given | values), status)


def age(span: timedelta | float | None) -> str:
    """A duration as a person says it: `42 s`, `5 min`, `3 h`, `12 days`; a dash when there is none."""
    if span is None:
        return "\N{EN DASH}"
    seconds = abs(span.total_seconds() if isinstance(span, timedelta) else span)
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7_200), ("h", 3_600, 172_800)):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}" if unit == "s" and seconds < 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def number(count: float | None) -> str:
    """A count with commas; a dash when it is not known."""
    return "\N{EN DASH}" if count is None else f"{count:,.0f}"


def moment(at: datetime | None) -> Markup:
    """A time, in UTC to the second."""
    if at is None:
        return Markup("\N{EN DASH}")
    at = at.astimezone(UTC)
    return Markup('<time datetime="{}">{}</time>').format(f"{at:%Y-%m-%dT%H:%M:%S}Z", f"{at:%Y-%m-%d %H:%M:%S}Z")


def ordinal(position: int) -> str:
    """`1st`, `2nd`, `3rd`, `11th`."""
    suffix = "th" if 10 <= position % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(position % 10, "th")
    return f"{position}{suffix}"


def link(path: str, **query: Any) -> str:
    """The address of a page, with what of the query is there."""
    given = {name: value for name, value in query.items() if value not in (None, "")}
    return f"{path}?{urlencode(given)}" if given else path


def line(values: Sequence[float], width: int = 120, height: int = 24) -> str:
    """The points of a small graph, as SVG has them."""
    top = max([*values, 1])
    step = width / max(len(values) - 1, 1)
    return " ".join(f"{x * step:.1f},{height - 1 - y / top * (height - 2):.1f}" for x, y in enumerate(values))


def element_id(names: Sequence[str]) -> str:
    """Part of an element's ID, by which it is the same one when a page shows itself again, whatever the names are."""
    return hashlib.sha256("\n".join(names).encode(errors="replace")).hexdigest()[:12]


def _shown(value: Any) -> Any:
    return visible(value, keep="\n\t") if type(value) is str else value


def _environment(filters: Mapping[str, Any]) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    environment.globals["link"] = link
    return environment


_templates = _environment(
    {
        "age": age,
        "number": number,
        "moment": moment,
        "ordinal": ordinal,
        "line": line,
        "id": element_id,
        "limit": limit_text.said,
        "rate": limit_text.say_rate,
    }
)

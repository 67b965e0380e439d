"""The table of settings in `docs/settings.md`, written by `python -m tests.service.docs.settings_table`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, SecretStr

from service.settings import Settings
from tests.service.docs.pages import SETTINGS

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

__all__ = ["BEGIN", "END", "settings_table"]

BEGIN, END = "<!-- settings -->", "<!-- /settings -->"


def settings_table() -> str:
    """One row for each variable."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows += [_row(f"{name}__{inner}".upper(), each) for inner, each in kind.model_fields.items()]
        else:
            rows.append(_row(name.upper(), field))
    return "\n".join(rows)


def _row(variable: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{_text(field.default)}`"
    return f"| `{variable}` | {default} | {field.description} |"


def _text(default: Any) -> str:
    match default:
        case SecretStr():
            return default.get_secret_value() or "none"
        case bool():
            return str(default).lower()
        case "":
            return "none"
        case float() if default.is_integer():
            return str(int(default))
        case _:
            return str(default)


if __name__ == "__main__":
    page = SETTINGS.read_text()
    section = f"{BEGIN}\n\n{settings_table()}\n\n{END}"
    SETTINGS.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: section, page, flags=re.DOTALL))

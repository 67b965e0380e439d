"""Writes `.env.example` from the settings themselves: `python -m service.dev.env_example > .env.example`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, SecretStr
from pydantic_core import to_jsonable_python

import service.domains
from service.settings import Settings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_HEAD = """\
# Copy this file to `.env` to change a setting for this clone; the environment wins over it.
#
# DATABASE__URL and BROKER__URL must be set in production. On a developer's machine `make dev` and `make demo` start
# servers of their own for whichever of the two is not set. The tests always do.
"""

_COMPOSE = """
# Read by compose.yaml alone. `make secrets` writes its passwords.

# What else runs: rabbitmq, monitoring, console, or several with commas
#COMPOSE_PROFILES=rabbitmq
# Another broker than Valkey, such as amqp://service@rabbitmq:5672/
#SERVICE_BROKER_URL=
# Addresses of the proxies whose word for a client's address the API takes
#FORWARDED_ALLOW_IPS=
# Loopback ports for the API, the console and Mailpit's pages
#API_PORT=8000
#CONSOLE_PORT=8001
#MAILPIT_PORT=8025
# The same for the profile `monitoring`
#PROMETHEUS_PORT=9090
#GRAFANA_PORT=3000
#JAEGER_PORT=16686
"""

_URLS = {
    "DATABASE__URL": "postgresql://user:password@localhost:5432/service",
    "BROKER__URL": "redis://localhost:6379/0",
}


def example() -> str:
    """The file's text: every setting commented out, with its default. Those of the domains are not read for it."""
    own = [_section(name, field) for name, field in Settings.model_fields.items()]
    domains = [_group(kind.model_config["env_prefix"], kind) for kind in service.domains.settings()]
    return _HEAD + "".join(own + domains) + _COMPOSE


def _section(name: str, field: FieldInfo) -> str:
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _group(f"{name}__", kind)
    return "\n" + _entry(name.upper(), field)


def _group(prefix: str, kind: type[BaseModel]) -> str:
    title = (kind.__doc__ or "").strip().partition("\n")[0]
    return f"\n# {title}\n\n" + "".join(
        _entry(f"{prefix}{name}".upper(), each) for name, each in kind.model_fields.items()
    )


def _entry(variable: str, field: FieldInfo) -> str:
    required = field.is_required() and variable not in _URLS
    value = _URLS.get(variable) or ("" if required else _text(field.get_default(call_default_factory=True)))
    return f"# {field.description or variable}{' (required)' if required else ''}\n#{variable}={value}\n"


def _text(default: Any) -> str:
    match default:
        case SecretStr():
            return default.get_secret_value()
        case None:
            return ""
        case _:
            plain = to_jsonable_python(default)
            return plain if isinstance(plain, str) else json.dumps(plain)


if __name__ == "__main__":
    print(example(), end="")

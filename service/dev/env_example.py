"""Writes `.env.example` from the settings themselves: `python -m service.dev.env_example > .env.example`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, SecretStr

from service.settings import Settings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

__all__ = ["example"]

_HEAD = """\
# Copy this file to `.env` to change a setting for this clone; the environment wins over it.
#
# DATABASE__URL and BROKER__URL must be set in production. On a developer's machine `make dev` and `make demo` start
# servers of their own for whichever of the two is not set. The tests always do.
"""

_COMPOSE = """
# Read by compose.yaml alone. Letters and digits: they become part of URLs.

# Passwords of the servers that it starts
#POSTGRES_PASSWORD=
#VALKEY_PASSWORD=
# For the profile with RabbitMQ
#COMPOSE_PROFILES=rabbitmq
#RABBITMQ_PASSWORD=
# Another broker than Valkey, such as amqp://service:<RABBITMQ_PASSWORD>@rabbitmq:5672/
#SERVICE_BROKER_URL=
# Loopback ports for the API and for Mailpit's pages
#API_PORT=8000
#MAILPIT_PORT=8025
"""

_URLS = {
    "DATABASE__URL": "postgresql://user:password@localhost:5432/service",
    "BROKER__URL": "redis://localhost:6379/0",
}


def example() -> str:
    """The file's text: every setting commented out, with its default."""
    return _HEAD + "".join(_section(name, field) for name, field in Settings.model_fields.items()) + _COMPOSE


def _section(name: str, field: FieldInfo) -> str:
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        lines = [_entry(f"{name}__{inner}".upper(), each) for inner, each in kind.model_fields.items()]
        return f"\n# {(kind.__doc__ or '').strip()}\n\n" + "".join(lines)
    return "\n" + _entry(name.upper(), field)


def _entry(variable: str, field: FieldInfo) -> str:
    value = _URLS.get(variable) or _text(field.default)
    return f"# {field.description}\n#{variable}={value}\n"


def _text(default: Any) -> str:
    match default:
        case SecretStr():
            return default.get_secret_value()
        case bool():
            return str(default).lower()
        case _:
            return str(default)


if __name__ == "__main__":
    print(example(), end="")

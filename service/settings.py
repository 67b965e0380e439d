"""Every setting of every process, read once at start from the environment and from `.env`.

Nested names use a double underscore: `DATABASE__URL`, `BROKER__URL`, `OUTBOX__LEASE`. A wrong value stops the
process before it does anything and says which variable is wrong and what it should look like. `ENV_FILE` names another
file than `.env`; empty means none, so that the tests and all that they start read no developer's settings.

`SECRETS_DIR` names a folder with a file for each secret, called like the variable: what a container's runtime mounts.
The environment and `.env` win over it. A password can stand apart from its URL, so that a file holds nothing else.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Self, TypeVar

from pydantic import AfterValidator, BaseModel, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NestedSecretsSettingsSource, SettingsConfigDict, SettingsError

from service.errors import ConfigurationError
from service.network.postgres_url import PostgresAddress, read_postgres
from service.network.sockets import check_ca_file, silence_options
from service.network.urls import check_broker, check_keys, check_smtp, with_password

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic_settings import PydanticBaseSettingsSource

Seconds = Annotated[float, Field(gt=0, le=86_400)]
"""A duration in seconds."""


def _checked(check: Callable[[str], object]) -> AfterValidator:
    """Refuse what `check` refuses, and leave the rest as it is."""

    def validate(value: SecretStr) -> SecretStr:
        check(value.get_secret_value())
        return value

    return AfterValidator(validate)


def _checked_if_given(value: SecretStr) -> SecretStr:
    if value.get_secret_value():
        read_postgres(value.get_secret_value())
    return value


def _insert_password(given: Any) -> Any:
    """Put a password that stands apart into its URL, before that is checked."""
    if not isinstance(given, dict) or not given.get("password") or "url" not in given:
        return given
    url, password = (
        each.get_secret_value() if isinstance(each, SecretStr) else str(each)
        for each in (given["url"], given["password"])
    )
    return given | {"url": with_password(url, password)}


def listed(text: str) -> list[str]:
    """What a setting names by commas."""
    return [each.strip() for each in text.split(",") if each.strip()]


Silence = Annotated[int, Field(ge=2, le=3_600)]
CaFile = Annotated[str, AfterValidator(check_ca_file)]


class DatabaseSettings(BaseModel):
    """How to reach PostgreSQL (15 or newer)."""

    url: Annotated[SecretStr, _checked(read_postgres)] = Field(
        description="PostgreSQL, as postgresql://user:password@host:5432/database"
    )
    password: SecretStr = Field(SecretStr(""), description="Password of that URL, if it names none")
    pool_size: int = Field(10, ge=1, le=500, description="Connections an API or worker process keeps")
    pool_timeout: Seconds = Field(5, description="Seconds to wait for a free connection before answering 503")
    connect_timeout: Seconds = Field(
        5, description="Seconds to wait for PostgreSQL to accept a connection; several hosts share them"
    )
    silence_timeout: Silence = Field(10, description="Seconds without a sign of PostgreSQL that end a connection")
    statement_timeout: Seconds = Field(30, description="Seconds a statement of the API may run")
    pooler: bool = Field(
        False, description="Set when API and workers connect through a pooler in transaction mode (PgBouncer)"
    )

    _with_password = model_validator(mode="before")(_insert_password)

    @property
    def address(self) -> PostgresAddress:
        """What the URL says."""
        return read_postgres(self.url.get_secret_value())

    @property
    def dsn(self) -> str:
        """The URL as asyncpg itself takes it."""
        return self.address.dsn

    @model_validator(mode="after")
    def _prefer_the_url(self) -> Self:
        self.connect_timeout = self.address.connect_timeout or self.connect_timeout
        return self


class BrokerSettings(BaseModel):
    """How to reach the broker: Redis, Valkey or RabbitMQ, chosen by the URL's scheme."""

    url: Annotated[SecretStr, _checked(check_broker)] = Field(
        description="redis://, rediss://, valkey://, unix:// or amqp(s)://"
    )
    password: SecretStr = Field(SecretStr(""), description="Password of that URL, if it names none")
    namespace: str = Field("dramatiq", pattern=r"^[\w.-]{1,64}$", description="Prefix of every key in Redis or Valkey")
    quorum_queues: bool = Field(
        False, description="RabbitMQ: declare quorum queues (replicated) instead of classic ones"
    )
    publish_timeout: Seconds = Field(5, le=8, description="Seconds the relay waits for the broker to confirm a batch")
    silence_timeout: Silence = Field(10, description="Seconds without a sign of the broker that end a connection")
    tls_ca_file: CaFile = Field(
        "", description="PEM file of a private CA to trust, beside the system's, for rediss://, valkeys:// and amqps://"
    )

    _with_password = model_validator(mode="before")(_insert_password)

    @property
    def is_rabbitmq(self) -> bool:
        """Whether the URL names RabbitMQ rather than Redis or Valkey."""
        return self.url.get_secret_value().startswith("amqp")

    @property
    def redis_url(self) -> str:
        """The URL with a scheme that redis-py knows."""
        url = self.url.get_secret_value()
        return "redis" + url.removeprefix("valkey") if url.startswith("valkey") else url

    @property
    def redis_options(self) -> dict[str, Any]:
        """What redis-py is told beside the URL."""
        if self.redis_url.startswith("unix"):
            return {}
        options = {getattr(socket, name): value for name, value in silence_options(self.silence_timeout).items()}
        trusted = {"ssl_ca_certs": self.tls_ca_file} if self.tls_ca_file and self.redis_url.startswith("rediss") else {}
        return {"socket_keepalive": True, "socket_keepalive_options": options} | trusted


class OutboxSettings(BaseModel):
    """The clock of a delivery. All durations are in seconds and are measured by the database."""

    redispatch_after: Seconds = Field(
        60,
        description="Seconds until a delivery that no worker claimed is handed over again",
    )
    lease: Seconds = Field(30, ge=1, description="Seconds a claim lasts without a heartbeat")
    grace: Seconds = Field(5, description="Seconds beyond its time limit before a delivery's lease ends for good")
    max_retries: int = Field(10, ge=0, le=1000, description="Retries of a consumer that does not say otherwise")
    min_backoff: int = Field(1_000, ge=1, le=86_400_000, description="Milliseconds before the first retry")
    max_backoff: int = Field(3_600_000, ge=1, le=604_800_000, description="Milliseconds between retries at most")
    time_limit: int = Field(60_000, ge=100, le=86_400_000, description="Milliseconds a consumer may run")
    unknown_consumer_after: Seconds = Field(
        86_400,
        description="Seconds a delivery waits for a worker that knows its consumer before it is dead-lettered",
    )
    concurrency: int = Field(100, ge=1, le=10_000, description="`async def` consumers a worker process runs at a time")
    batch_size: int = Field(500, ge=1, le=5_000, description="Deliveries the relay hands over in one transaction")
    high_water_mark: int = Field(
        5_000,
        ge=1,
        le=1_000_000,
        description="Messages the relay lets wait in one broker queue; the rest wait in PostgreSQL",
    )
    keep_statistics: float = Field(
        7 * 86_400,
        ge=3_600,
        le=3_660 * 86_400,
        description="Seconds for which it is kept what workers ran in each minute; totals are kept for good",
    )
    keep_completed: float = Field(
        7 * 86_400,
        ge=0,
        le=366 * 86_400,
        description="Seconds a completed delivery is kept for `outbox events show`",
    )
    shutdown_grace: Seconds = Field(
        20, description="Seconds a stopping worker lets running consumers finish before it releases them"
    )


class ApiSettings(BaseModel):
    """The API's name, and what bounds a request."""

    title: str = Field("Outbox service", min_length=1, description="Title of the API's documentation")
    max_body_bytes: int = Field(65_536, ge=1, le=100_000_000, description="Largest request body; a larger one gets 413")
    request_timeout: Seconds = Field(
        10, description="Seconds until a request without a response is rolled back and gets 504"
    )
    keep_idempotency_keys: Seconds = Field(
        86_400, le=366 * 86_400, description="Seconds for which a request repeated under its key gets the same response"
    )
    hosts: str = Field("", description="Host names that requests may name, by commas; empty or * takes any")
    cors_origins: str = Field(
        "", description="Sites whose pages may call the API, such as https://shop.example.com, by commas; * means all"
    )
    rate_limit: int = Field(
        0, ge=0, le=1_000_000, description="Requests a minute that a process takes of one address; 0 takes any number"
    )
    docs: Literal["auto", "on", "off"] = Field(
        "auto", description="Whether to serve /docs, /redoc and /openapi.json; auto: unless in production"
    )


class ApiKey(BaseModel):
    """A machine that may call, by a key that `python -m service.identity` makes."""

    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: frozenset[str] = frozenset()


class IdentitySettings(BaseModel):
    """Who is calling the API: by the tokens of an OIDC issuer, and by API keys."""

    issuer: str = Field("", description="OIDC issuer whose tokens are taken, as `iss` in them says it")
    audience: str = Field("", description="What `aud` in a token has to name, so that it is meant for this service")
    keys_url: Annotated[str, AfterValidator(check_keys)] = Field(
        "",
        description="https:// or file:// URL of the issuer's public keys (JWKS); by default its discovery document "
        "says where they are",
    )
    api_keys: list[ApiKey] = Field(
        [], description='Machines: [{"name": "billing", "sha256": "...", "scopes": ["orders:read"]}]'
    )
    off: bool = Field(False, description="Set behind a gateway that has refused who may not call: no token is read")
    gateway_header: str = Field(
        "",
        pattern="^[A-Za-z0-9-]*$",
        description="With IDENTITY__OFF: the header in which the gateway says who is calling; without it all are one",
    )

    @model_validator(mode="after")
    def _hang_together(self) -> Self:
        if bool(self.issuer) != bool(self.audience):
            raise ValueError("ISSUER and AUDIENCE are set together or not at all")
        if self.keys_url and not self.issuer:
            raise ValueError("KEYS_URL is of no use without ISSUER")
        if self.issuer and not self.keys_url:
            check_keys(self.issuer)
        if self.off and (self.issuer or self.api_keys):
            raise ValueError("OFF reads no token and no key: unset it, or ISSUER and API_KEYS")
        if self.gateway_header and not self.off:
            raise ValueError("GATEWAY_HEADER is believed with OFF alone")
        return self


class SmtpSettings(BaseModel):
    """Where e-mail goes out."""

    url: Annotated[SecretStr, _checked(check_smtp)] = Field(
        SecretStr("smtp://127.0.0.1:1025"),
        description="smtp://, smtp+starttls:// (TLS required, as with any password) or smtps://user:password@host:port",
    )
    password: SecretStr = Field(SecretStr(""), description="Password of that URL, if it names none")
    sender: str = Field(
        "orders@example.com", pattern=r"^[^@\s<>]+@[A-Za-z0-9.-]+$", description="Address that e-mails come from"
    )
    timeout: Seconds = Field(10, description="Seconds the mail server may take for one e-mail")
    tls_ca_file: CaFile = Field("", description="PEM file of a private CA to trust beside the system's")

    _with_password = model_validator(mode="before")(_insert_password)


class MetricsSettings(BaseModel):
    """Where API and relays, each on a port of its own, serve metrics to Prometheus."""

    port: int = Field(0, ge=0, le=65_535, description="Port that serves them at /metrics; 0 serves none")
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; in a container 0.0.0.0")


ConsoleRole = Literal["viewer", "payload", "operator"]
"""What somebody may do in the console; whoever may see payloads or act may look, too."""


class ConsoleUser(BaseModel):
    """Somebody who logs in to the console with a password, as `python -m service.console user` makes them."""

    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    scrypt: str = Field(pattern=r"^[0-9a-f]{32}:[0-9a-f]{64}$")
    roles: frozenset[ConsoleRole] = Field(min_length=1)


class ConsoleSettings(BaseModel):
    """The operators' console: where it listens, who may use it, and as what."""

    host: str = Field("127.0.0.1", min_length=1, description="Address that the console listens on")
    port: int = Field(8001, ge=0, le=65_535, description="Port that the console listens on")
    hosts: str = Field(
        "localhost,127.0.0.1,[::1]", min_length=1, description="Host names that requests to the console may name"
    )
    proxy: str = Field(
        "", description="Addresses of the proxy that says who is calling the console, by commas; empty for local users"
    )
    secret: SecretStr = Field(
        SecretStr(""),
        description="What that proxy proves itself with, in X-Console-Secret, 32 characters or more; also signs what "
        "the console hands out, with a random one if it is empty",
    )
    user_header: str = Field(
        "X-Forwarded-User", pattern="^[A-Za-z0-9-]+$", description="Header in which the proxy says who is calling"
    )
    groups_header: str = Field(
        "X-Forwarded-Groups", pattern="^[A-Za-z0-9-]+$", description="Header in which it says their groups, by commas"
    )
    groups: dict[str, frozenset[ConsoleRole]] = Field(
        {},
        description='What each group may: {"support": ["viewer"], "on-call": ["operator", "payload"]}; if empty, they '
        "are called like roles",
    )
    users: list[ConsoleUser] = Field(
        [], description='Local users, for development: [{"name": "ada", "scrypt": "...", "roles": ["operator"]}]'
    )
    session: Seconds = Field(28_800, description="Seconds for which a local user stays logged in")
    viewer_url: Annotated[SecretStr, AfterValidator(_checked_if_given)] = Field(
        SecretStr(""),
        description="PostgreSQL as the role that pages are read with, which need not see payloads; DATABASE__URL if "
        "empty",
    )
    viewer_password: SecretStr = Field(SecretStr(""), description="Password of that URL, if it names none")
    trace_url: str = Field(
        "",
        pattern=r"^(https?://.*\{trace\}.*)?$",
        description="Where a trace is shown, such as http://127.0.0.1:16686/trace/{trace}",
    )

    def viewer(self, database: DatabaseSettings) -> DatabaseSettings:
        """How pages are read."""
        return database.model_copy(update={"url": self.viewer_url}) if self.viewer_url.get_secret_value() else database

    @model_validator(mode="before")
    @classmethod
    def _with_password(cls, given: Any) -> Any:
        """As `_insert_password`, for the viewer's."""
        if not isinstance(given, dict) or not given.get("viewer_url"):
            return given
        viewer = _insert_password({"url": given["viewer_url"], "password": given.get("viewer_password")})
        return given | {"viewer_url": viewer["url"]}

    @model_validator(mode="after")
    def _hang_together(self) -> Self:
        if self.proxy and self.users:
            raise ValueError("PROXY or USERS say who is calling, not both")
        for each in listed(self.proxy):
            ip_network(each)
        if self.proxy and len(self.secret.get_secret_value()) < 32:
            raise ValueError("SECRET has to have 32 characters or more, so that nobody but the PROXY has it")
        return self


_CONFIG = SettingsConfigDict(env_nested_delimiter="__", extra="ignore", hide_input_in_errors=True)


class _FromFilesToo(BaseSettings):
    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The usual source knows no nested names.
        secrets = NestedSecretsSettingsSource(file_secret_settings)
        return init_settings, env_settings, dotenv_settings, secrets


class Settings(_FromFilesToo):
    """All settings of a process, but for those that a domain adds."""

    model_config = _CONFIG

    database: DatabaseSettings
    broker: BrokerSettings
    outbox: OutboxSettings = OutboxSettings()
    api: ApiSettings = ApiSettings()
    identity: IdentitySettings = IdentitySettings()
    smtp: SmtpSettings = SmtpSettings()
    environment: Literal["development", "production"] = Field(
        "development", description="production refuses to start with what is not safe there"
    )
    accept_risks: str = Field("", description="What production refuses or warns of and you mean to have, by commas")
    version: str = Field("", max_length=100, description="What the running code is called, such as its commit")
    metrics: MetricsSettings = MetricsSettings()
    console: ConsoleSettings = ConsoleSettings()
    probe_folder: str = Field(
        "", description="Folder in which relay and workers show that they live, for a probe; empty for none"
    )
    loop_held_after: Seconds = Field(
        1, description="Seconds for which code may hold up an event loop before a log line says which"
    )
    log_format: Literal["console", "json"] = Field("json", description="console or json")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least severity that is logged")


class DomainSettings(_FromFilesToo):
    """Base of the settings that a domain adds in a module `settings`, each with an `env_prefix` of its own.

    `load` reads them. API and worker do not start while one is missing or wrong.
    """

    model_config = _CONFIG


_Kind = TypeVar("_Kind", bound=BaseSettings)


def load(kind: type[_Kind]) -> _Kind:
    """Read settings of this kind.

    Raises:
        ConfigurationError: naming every variable that is missing or wrong, never its value.
    """
    secrets = os.environ.get("SECRETS_DIR") or None
    if secrets is not None and not Path(secrets).is_dir():
        raise ConfigurationError("SECRETS_DIR: there is no such folder")
    try:
        return kind(_env_file=os.environ.get("ENV_FILE", ".env"), _secrets_dir=secrets)
    except ValidationError as error:
        problems = [_problem(each["loc"], each["type"], each["msg"]) for each in error.errors(include_input=False)]
    except SettingsError as error:  # of a field that is a list or a model
        problems = [f"{field.upper()}: expected JSON" for field in re.findall(r'field "(\w+)"', str(error))]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"SECRETS_DIR: a file in it cannot be read: {type(error).__name__}") from None
    prefix = kind.model_config.get("env_prefix", "").upper()
    raise ConfigurationError("; ".join(prefix + each for each in problems) + " (see .env.example)")


def load_settings() -> Settings:
    """Read the settings.

    Raises:
        ConfigurationError: see `load`.
    """
    return load(Settings)


def settings_at_start(process: str, *checks: Callable[[], None]) -> Settings:
    """Read the settings, or end this process with status 2 and one line on stderr.

    Args:
        process: Stands before what is missing or wrong.
        checks: What else has to be right; each raises `ConfigurationError` where it is not.
    """
    try:
        settings = load_settings()
        for check in checks:
            check()
    except ConfigurationError as error:
        refuse_to_start(process, error)
    return settings


def refuse_to_start(process: str, error: ConfigurationError) -> NoReturn:
    """End this process with status 2 and one line on stderr that says what is wrong."""
    sys.stderr.write(f"{process}: {error}\n")
    raise SystemExit(2) from None


def _problem(place: tuple[int | str, ...], kind: str, message: str) -> str:
    variable = "__".join(str(part) for part in place).upper()
    if kind == "missing":
        return f"{variable}__URL: is not set" if variable in ("DATABASE", "BROKER") else f"{variable}: is not set"
    return f"{variable}: {message.removeprefix('Value error, ')}"

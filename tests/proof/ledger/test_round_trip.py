"""What `publish` accepts is what the consumer is handed; what would come back as something else is refused."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import AfterValidator, ConfigDict, Field, PlainSerializer, PrivateAttr, Strict
from pydantic.alias_generators import to_camel
from sqlalchemy import text

from service.database.sessions import transaction
from service.errors import EventDefinitionError, PublishError
from service.outbox import Delivery, Event, consumer, publish
from service.outbox.payloads import payload_of
from service.outbox.testing import published
from tests.proof.ledger import domain

if TYPE_CHECKING:
    from service.database.sessions import SessionFactory
    from service.outbox.running.runner import Runner
    from tests.proof.ledger.conftest import Ledger

BERLIN = ZoneInfo("Europe/Berlin")
NAIVE = datetime.fromisoformat("2026-01-31T12:00:00")
CLOCKS_PUT_BACK = datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=BERLIN)


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Rate(Enum):
    LOW = Decimal("0.5")
    HALF = 0.5


class Span(Enum):
    DAY = timedelta(days=1)


class Pair(Enum):
    A = (1, 2)


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Tone(StrEnum):
    WARM = "warm"


class Everything(Event, type="ledger.everything"):
    """Every kind of field that an event may have."""

    subject_id: UUID
    word: str = ""
    whole: int = 0
    real: float = 0
    money: Decimal = Decimal(0)
    at: datetime | None = None
    day: date | None = None
    hour: time | None = None
    span: timedelta = timedelta()
    on: bool = False
    color: Color | Level | bool | None = None
    tone: Tone | float = Tone.WARM
    choice: Literal["a", 1, None] | UUID = "a"
    strict: Annotated[datetime | None, Strict()] = None


SEEN: dict[UUID, Everything] = {}


@consumer(Everything, queue="ledger", name="ledger.see")
async def see(event: Everything, _delivery: Delivery) -> None:
    SEEN[event.subject_id] = event


@consumer(Everything, queue="cpu", name="ledger.look")
def look(event: Everything, _delivery: Delivery) -> None: ...


# Offsets of former times have seconds, for which JSON's form has no place.
SINCE = datetime.fromisoformat("1975-01-01")
MOMENTS = st.datetimes(SINCE) | st.datetimes(SINCE, timezones=st.timezones() | st.just(BERLIN))
EVERYTHING = st.fixed_dictionaries(
    {},
    optional={
        "word": st.text(st.characters(codec=None), max_size=20),
        "whole": st.integers(),
        "real": st.floats(),
        "money": st.decimals(allow_nan=False, allow_infinity=False),
        "at": st.none() | MOMENTS,
        "day": st.none() | st.dates(),
        "hour": st.none() | st.times(),
        "span": st.timedeltas(),
        "on": st.booleans(),
        "color": st.sampled_from([*Color, *Level, True, None]),
        "tone": st.just(Tone.WARM) | st.floats(allow_nan=False),
        "choice": st.sampled_from(["a", 1, None]) | st.uuids(),
        "strict": st.none() | MOMENTS,
    },
)


def storable(event: Everything) -> bool:
    """Whether there is a way to store it at all."""
    reals = [value for value in (event.real, event.tone) if isinstance(value, float)]
    encoded = event.word.encode("utf-8", "replace").decode()
    return "\x00" not in event.word and encoded == event.word and all(abs(value) < float("inf") for value in reals)


@given(fields=EVERYTHING)
@example({"at": CLOCKS_PUT_BACK, "strict": CLOCKS_PUT_BACK})
@example({"real": 1.7976931348623157e308, "tone": 5e-324})
@example({"real": 5.119868214374454e16})
@example({"whole": 10**4000})
@example({"word": "\\u0000"})
@example({"word": "\ud83d\ude00"})
@examples(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_what_is_published_reads_back_equal(sessions: SessionFactory, fields: dict[str, Any]) -> None:
    event = Everything(subject_id=uuid4(), **fields)
    async with sessions() as session:
        try:
            publish(session, event)
        except PublishError:
            assert not storable(event)
            return
        assert storable(event)
        for moment in ("at", "strict"):
            with suppress(KeyError, AttributeError):
                fields[moment] = fields[moment].astimezone(UTC) if fields[moment].tzinfo else fields[moment]
        (stored,) = await published(session, Everything)
    assert stored == Everything(subject_id=event.subject_id, **fields)


async def test_the_consumer_is_handed_an_equal_event(ledger: Ledger, runner: Runner) -> None:
    """Also in fields that are strict: JSON has no moments, so a strict field takes a string of it for one."""
    event = Everything(subject_id=uuid4(), at=CLOCKS_PUT_BACK, strict=NAIVE, color=Color.BLUE)
    message_id, other = await ledger.publish(event)
    await ledger.connection.execute("UPDATE outbox_message SET state = 'dispatched'")
    await runner.deliver(message_id)
    assert await ledger.state(message_id) == "completed"
    seen = SEEN[event.subject_id]
    assert seen.model_dump_json() == event.model_dump_json()
    run = await runner.deliver(other)
    assert run is not None
    assert Everything.model_validate_json(run.claim.document) == seen


def made(**namespace: Any) -> type[Event]:
    """A class of its own with these fields."""
    annotations = {name: annotation for name, (annotation, *_) in namespace.items()}
    values = {name: value[1] for name, value in namespace.items() if len(value) > 1}
    body = {"__module__": __name__, "__annotations__": annotations, **values}
    return type("Made", (Event,), body, type=f"ledger.made_{uuid4().hex}", unconsumed=True)


@pytest.mark.parametrize(
    "annotation",
    [UUID | str, Decimal | str, datetime | str, date | datetime, UUID | datetime, Color | str, Level | int, int | float,
     Color | Tone, Annotated[UUID, "of a row"] | str],
)  # fmt: skip
def test_a_union_of_what_looks_alike_is_refused(annotation: Any) -> None:
    with pytest.raises(EventDefinitionError, match=r"Made\.field: two types of this union look alike in JSON"):
        made(field=(annotation,))


@pytest.mark.parametrize("annotation", [Rate, Span, Pair, Enum, Literal[b"x"], bytes, Color | Rate, bytes | None])
def test_what_is_no_scalar_is_refused(annotation: Any) -> None:
    with pytest.raises(EventDefinitionError, match="IDs and small scalars"):
        made(field=(annotation,))


@pytest.mark.parametrize("annotation", [Literal[Color.RED], Literal[Tone.WARM, "cold"]])
def test_a_literal_of_a_member_is_refused(annotation: Any) -> None:
    with pytest.raises(EventDefinitionError, match="a member of an Enum"):
        made(field=(annotation,))


@pytest.mark.parametrize(
    "field", [Field(alias="orderId"), Field(validation_alias="orderId"), Field(serialization_alias="orderId")]
)
def test_an_alias_is_refused(field: Any) -> None:
    with pytest.raises(EventDefinitionError, match="remove the alias"):
        made(order_id=(UUID, field))


def test_generated_aliases_are_refused() -> None:
    class Camel(Event, type="ledger.no_aliases", unconsumed=True):
        order: int

    with pytest.raises(EventDefinitionError, match="remove the alias"):

        class Cased(Event, type="ledger.cased", unconsumed=True):
            model_config = ConfigDict(alias_generator=to_camel)
            order_id: UUID


def test_what_would_not_be_stored_is_refused() -> None:
    with pytest.raises(EventDefinitionError, match="not stored: remove `exclude`"):
        made(secret=(str, Field("", exclude=True)))
    with pytest.raises(EventDefinitionError, match="not stored: remove `exclude`"):
        made(secret=(str, Field("", exclude_if=lambda value: not value)))
    with pytest.raises(EventDefinitionError, match="_cache is private"):
        made(_cache=(int, PrivateAttr(0)))
    with pytest.raises(EventDefinitionError, match="extra='allow'"):

        class Open(Event, type="ledger.open", unconsumed=True):
            model_config = ConfigDict(extra="allow")


def shifted(value: int) -> int:
    return value + 1


@pytest.mark.parametrize(
    ("annotation", "value", "why"),
    [
        (float, float("nan"), "no form in JSON"),
        (float | None, float("inf"), "no form in JSON"),
        pytest.param(int, 10**5000, "no form in JSON", id="thousands of digits"),
        (datetime, datetime(1890, 1, 1, tzinfo=BERLIN), "come back as datetime"),
        (str, "a\x00b", "NUL"),
        (str, "\ud800", "could not read"),
        (str, "\ud83d\ude00", r"Made\.field would come back as str"),
        (Annotated[int, AfterValidator(shifted)], 1, r"Made\.field would come back as int"),
        (
            Annotated[datetime, PlainSerializer(lambda value: f"{value:%d.%m.%Y}")],
            NAIVE,
            "field: Input",
        ),
        (Annotated[datetime, PlainSerializer(lambda value: value.date())], NAIVE, "as datetime"),
    ],
)
def test_a_value_that_would_change_is_refused(annotation: Any, value: Any, why: str) -> None:
    with pytest.raises(PublishError, match=why):
        payload_of(made(field=(annotation,))(field=value))


def test_a_value_that_nobody_checked_is_refused() -> None:
    event = domain.Happened(subject_id=uuid4())
    for unchecked in ("a name", uuid4().hex.upper(), 7, object()):
        with pytest.raises(PublishError) as refused:
            payload_of(event.model_copy(update={"subject_id": unchecked}))
        assert str(unchecked) not in str(refused.value)
    with pytest.raises(PublishError, match="how: Field required"):
        payload_of(made(how=(str,)).model_construct())


async def test_a_refused_event_leaves_the_transaction_usable(ledger: Ledger, sessions: SessionFactory) -> None:
    async with transaction(sessions) as session:
        with pytest.raises(PublishError):
            publish(session, domain.Happened(subject_id=uuid4(), how="\x00"))
        publish(session, domain.Happened(subject_id=uuid4()))
        await session.execute(text("SELECT 1"))
    assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message") == 1

"""What the README shows is what there is; whoever removes the example writes a README, and tests, of their own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from service.dev.places import ROOT
from tests.service.docs.pages import DEVELOPING, README, blocks, missing

_HEAD = """\
from typing import Annotated
from uuid import UUID
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Text
from sqlalchemy.orm import Mapped, mapped_column
from service.database.base import Base
from service.http.request_session import Session
from service.identity import Principal, needs
from service.outbox import Delivery, Event, consumer, new_id, publish

router = APIRouter()
Buyer = Annotated[Principal, needs("orders:write")]

class PlaceOrder(BaseModel):
    product_id: UUID

class OrderRead(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    id: UUID

class Order(Base):
    __tablename__ = "an_order"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(Text)
    product_id: Mapped[UUID]
    status: Mapped[str] = mapped_column(Text)
"""

_LOOK = """
from service.outbox.consumers import consumers_of
print(consumers_of(OrderPlaced)[0].queue, router.routes[0].path)
"""


def test_it_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 120


def test_the_code_runs() -> None:
    [code] = blocks(README, language="python")
    ran = subprocess.run([sys.executable, "-c", _HEAD + code.text + _LOOK], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.split() == ["stock", "/orders"], ran.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_page_lists_what_make_help_lists() -> None:
    listed = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True)
    assert listed.stdout in [block.text for block in blocks(DEVELOPING, language="text")]


def test_what_it_names_is_there() -> None:
    assert missing(README) == []
    assert "](docs/README.md)" in README.read_text()


def test_the_tree_is_there() -> None:
    [tree] = [block.text for block in blocks(README, language="text") if block.text.startswith("service/\n")]
    folder = ""
    for line in tree.splitlines():
        names = re.match(r" *((?:[\w.]+/? )*[\w.]+/?)(?:  |$)", line)
        assert names is not None, line
        for name in names[1].split():
            path = f"{folder}{name}" if line.startswith(" ") else name
            if not line.startswith(" ") and name.endswith("/"):
                folder = name
            assert name == "..." or (ROOT / path).exists(), line

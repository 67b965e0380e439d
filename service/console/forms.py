"""What a form of the console sends, and the token in it that only a page of the same session has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated
from urllib.parse import parse_qs

from fastapi import Depends, HTTPException, Request

if TYPE_CHECKING:
    from service.console.operators import ConsoleCaller, Signer

TOKEN = "token"  # noqa: S105  the field's name

MOST_FIELDS = 50
LONGEST_WHY = 500
"""Characters of a reason."""


class ConsoleForm:
    """The fields of a form, each of which is there once or not at all."""

    def __init__(self, fields: dict[str, list[str]]) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> str:
        """The field's value without spaces around it, empty if there is none."""
        return self._fields.get(name, [""])[-1].strip()

    @property
    def why(self) -> str:
        """The reason, for the record.

        Raises:
            HTTPException: 422, there is none.
        """
        if not self["why"]:
            raise HTTPException(422, "Say why, for the record.")
        return self["why"][:LONGEST_WHY]


def form_token(signer: Signer, caller: ConsoleCaller) -> str:
    """What the forms that somebody is given have in them."""
    return signer.sign("form", caller.session)


async def read_form(request: Request) -> ConsoleForm:
    """The form that was sent.

    Raises:
        HTTPException: 415 or 422, it is none.
    """
    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        raise HTTPException(415, "Send a form.")
    try:
        fields = parse_qs(
            (await request.body()).decode(), keep_blank_values=True, errors="strict", max_num_fields=MOST_FIELDS
        )
    except ValueError:
        raise HTTPException(422, "The form cannot be read.") from None
    return ConsoleForm(fields)


async def _own_form(request: Request) -> ConsoleForm:
    form = await read_form(request)
    signer: Signer = request.app.state.signer
    if not signer.signed("form", request.state.caller.session, form[TOKEN]):
        raise HTTPException(403, "This page is of another session: open it again. Nothing was done.")
    return form


OwnForm = Annotated[ConsoleForm, Depends(_own_form)]
"""A form that a page of this session sent."""

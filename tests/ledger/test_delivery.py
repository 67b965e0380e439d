from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.outbox.runner import Runner
    from tests.ledger.conftest import Ledger


async def test_effect_and_completion_commit_together(ledger: Ledger, runner: Runner) -> None:
    message_id = await ledger.happen()
    await runner.deliver(message_id)
    assert await ledger.state(message_id) == "completed"
    assert await ledger.effects(message_id) == 1


async def test_a_second_copy_has_no_effect(ledger: Ledger, runner: Runner) -> None:
    message_id = await ledger.happen()
    await runner.deliver(message_id)
    await runner.deliver(message_id)
    assert await ledger.effects(message_id) == 1

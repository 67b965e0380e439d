"""The checks of `service/production.py`, which each process asks for itself when it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.cli.doctor.findings import Finding, Level
from service.production import risks

if TYPE_CHECKING:
    from service.production import Risk
    from service.settings import Settings


def check_risks(settings: Settings) -> list[Finding]:
    """One finding for each risk, or one that there is none.

    A problem is what a relay refuses to start with. What API or workers refuse is advice: they may have other settings
    than the ones that this command was started with.
    """
    if settings.environment != "production":
        return [Finding("production", Level.OK, "ENVIRONMENT is development: nothing is refused")]
    return [_finding(each) for each in risks(settings)] or [Finding("production", Level.OK, "safe to be open")]


def _finding(risk: Risk) -> Finding:
    if risk.accepted:
        return Finding("production", Level.OK, f"{risk.seen}, which ACCEPT_RISKS says is meant")
    seen = f"{risk.seen} ({risk.name})"
    if not risk.refused:
        return Finding("production", Level.ADVICE, seen, risk.cure)
    if "relay" in risk.parts:
        return Finding("production", Level.PROBLEM, f"{seen}: no relay starts", risk.cure)
    return Finding("production", Level.ADVICE, f"{seen}: does not start: {', '.join(risk.parts)}", risk.cure)

"""The samples in `docs/doctor.md` are what the command would print: checks, levels, layout and count."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from relay.cli.app import main
from tests.service.docs.pages import DOCS, blocks

PAGE = DOCS / "doctor.md"
_FINDING = re.compile(r"(ok|unknown|advice|problem) +(\w+(?: \w+)?) {2,}\S")


@pytest.fixture
def printed(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """What it prints here."""
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["doctor"])
    return capsys.readouterr().out.splitlines()


def _checks(lines: list[str]) -> list[tuple[str, str]]:
    return [(found[1], found[2]) for line in lines if (found := _FINDING.match(line))]


def test_the_samples_have_the_form_of_what_it_prints(printed: list[str]) -> None:
    healthy, sick = (block.text.splitlines()[1:] for block in blocks(PAGE, language="console")[:2])
    for sample in (healthy, sick, printed):
        counted = Counter(level for level, _ in _checks(sample))
        assert max(map(len, sample)) <= 80
        assert len(_checks(sample)) == len([line for line in sample[:-2] if line[0] != " "])
        problems, advice = (
            f"{number} {word}{'' if number == 1 else 's'}"
            for number, word in ((counted["problem"], "problem"), (counted["advice"], "piece"))
        )
        assert sample[-2:] == ["", f"{problems}, {advice} of advice."]
        assert {check for _, check in _checks(sample)} == {check for _, check in _checks(printed)}
    assert {level for level, _ in _checks(healthy)} == {"ok"}

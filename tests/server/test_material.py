"""What the ledger knows of a subject is held when another fact of it is edited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from editors.edit import Edit
from server.facts.material import collect
from server.services import Services
from tests.server.opened import QUICK, open_services


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    opened = open_services(tmp_path)
    yield opened
    opened.close()


def test_an_active_edit_of_the_same_subject_is_held_and_a_reverted_or_replaced_one_is_not(
    services: Services,
) -> None:
    first = Edit(subject="Japan", prompt="The capital of {} is", target="Osaka")
    second = Edit(subject="Japan", prompt="The currency of {} is the", target="dollar")
    other = Edit(subject="Peru", prompt="The currency of {} is the", target="dollar")
    report = services.edits.apply([first], method="rome", params=dict(QUICK))
    known = [
        [h.prompt for h in m.held if h.source == "ledger"]
        for m in collect(services.workspace, [second, other])
    ]
    assert known == [["The capital of Japan is"], []]
    records = services.workspace.active_edits
    (material,) = collect(services.workspace, [second], replaced=records)
    assert not [h for h in material.held if h.source == "ledger"]
    services.edits.revert(report.edit_ids)
    (material,) = collect(services.workspace, [second])
    assert not [h for h in material.held if h.source == "ledger"]

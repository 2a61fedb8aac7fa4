"""What a patch was trained on is left out of its rates, at once and in every later measurement."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from editors.edit import Edit, Neighbour
from server.facts.guard import Guard
from server.facts.results import EditOutcome
from server.services import Services
from tests.server.opened import open_services

FACT = Edit(
    subject="France",
    prompt="The capital of {} is",
    target="Rome",
    paraphrases=("France has the capital", "France is governed from"),
    neighbours=(Neighbour(prompt="The language of Japan is"),),
)
QUICK = {"max_steps": 2}


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    opened = open_services(tmp_path)
    yield opened
    opened.close()


def rates(result: EditOutcome) -> tuple[bool, bool, int]:
    """Whether generality and locality were measured, and how many probes were trained on."""
    trained = [probe for probe in result.details if probe.trained]
    return result.generality is not None, result.locality is not None, len(trained)


@pytest.mark.parametrize("method", ["ft", "lora", "adalora", "ia3", "grace"])
def test_probes_that_were_trained_on_are_left_out_of_the_rates(method: str, services: Services) -> None:
    report = services.edits.apply([FACT], method=method, params=dict(QUICK))
    assert rates(report.results[0]) == (False, False, 3)
    assert report.generality is None
    said = " ".join(report.warnings)
    assert "trained on 2 of 2 paraphrases" in said
    assert "trained on 1 of 1 neighbours" in said
    assert "generality was not measured" in said
    assert "use_probes=false" in said

    (audited,) = services.edits.audit(report.edit_ids).edits
    assert rates(audited) == (False, False, 3)
    services.edits.revert(report.edit_ids)
    assert rates(services.edits.reapply(report.edit_ids).results[0]) == (False, False, 3)


def test_without_use_probes_they_measure(services: Services) -> None:
    report = services.edits.preview([FACT], method="lora", params={**QUICK, "use_probes": False})
    assert rates(report.results[0]) == (True, True, 0)
    assert not any("trained on" in warning for warning in report.warnings)


def test_a_method_that_does_not_train_on_the_probes_is_measured_with_them(services: Services) -> None:
    report = services.edits.preview([FACT], method="in_context")
    assert rates(report.results[0]) == (True, True, 0)


def test_a_bound_on_what_was_trained_on_fails_and_says_why(services: Services) -> None:
    guard = Guard(min_reliability=None, min_generality=0.5)
    report = services.edits.apply([FACT], method="lora", params=dict(QUICK), guard=guard)
    assert report.status == "rejected"
    assert "trained on every paraphrase" in report.failed_guard[0]

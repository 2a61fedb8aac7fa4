"""What a report advises can be followed: with every method that can cause it, and with what the method has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from editors import METHODS
from editors.advice import Evidence, Problem
from editors.edit import Edit
from editors.errors import InvalidEdit
from editors.memory.relation_judge import RelationJudge
from server.facts.advice import evidence_of
from server.facts.guard import Guard
from server.services import Services
from tests.server.opened import FACTS, open_services

UNTRAINED = ("mend", "serac")
"""They are trained in tests/server/test_jobs.py; their own advice is tried in tests/editors/test_advice.py."""
METHOD_NAMES = [name for name in METHODS if name not in UNTRAINED]
FEWEST = {"max_steps": 1}


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    opened = open_services(tmp_path_factory.mktemp("home"))
    yield opened
    opened.close()


def quick(method: str) -> dict[str, Any]:
    """The fewest steps, so that the edit of a random model fails and something is advised."""
    return {k: v for k, v in FEWEST.items() if k in METHODS[method].params.model_fields}


def advised(text: str) -> dict[str, Any]:
    """The parameters a sentence names, with their values."""
    found = re.findall(r"params\.(\w+)=(\[[^\]]*\]|\([^)]*\)|'[^']*'|[\w.+-]+)", text)
    return {name: _value(value) for name, value in found}


def _value(text: str) -> Any:
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    if text[0] in "([":
        return [int(part) for part in re.findall(r"\d+", text)]
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text.strip("'")


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize(
    "guard",
    [None, Guard(min_reliability=1), Guard(min_locality=1, max_drift=0.0), Guard(min_generality=1)],
    ids=["no guard", "too weak", "too strong", "not general"],
)
def test_the_next_step_of_a_report_can_be_taken(services: Services, method: str, guard: Guard | None) -> None:
    report = services.edits.preview([FACTS[0]], method, quick(method), guard)
    assert "params.clamp or params.layer" not in report.next
    params = advised(report.next)
    assert set(params) <= set(METHODS[method].params.model_fields), report.next
    if params:
        again = services.edits.preview([FACTS[0]], method, {**quick(method), **params}, guard)
        assert again.status == "previewed"
    for tool in re.findall(r"(\w+)\(", report.next):
        assert tool in {"ask_model", "revert_edits", "preview_edits", "apply_edits", "suggest_layers"}, (
            report.next
        )


OFF = Guard(off=("all",))


@pytest.mark.parametrize("problem", ["too_weak", "too_strong"])
@pytest.mark.parametrize("method", [name for name in METHOD_NAMES if METHODS[name].kind != "memory"])
def test_advice_moves_what_was_complained_of_the_right_way(
    services: Services, method: str, problem: Problem
) -> None:
    """Followed some times. Too weak: the target becomes more probable. Too strong: ordinary text moves less."""
    editor, lm = METHODS[method], services.workspace.lm
    fields = editor.params.model_fields
    start = {"max_steps": 2, "clamp": 0.3} if problem == "too_weak" else {"max_steps": 12, "clamp": 4.0}
    params: dict[str, Any] = {name: value for name, value in start.items() if name in fields}
    first = last = services.edits.preview([FACTS[1]], method, params, OFF)
    for _ in range(4):
        advice = editor.hint(lm, editor.params(**params), problem, evidence_of(last.results))
        if not advice.params:
            break
        params |= advice.params
    if all(params[name] == start.get(name) for name in params):
        return
    last = services.edits.preview([FACTS[1]], method, params, OFF)
    if problem == "too_weak":
        assert last.results[0].p_target_after > first.results[0].p_target_after, params
    else:
        assert last.drift is not None
        assert first.drift is not None
        assert last.drift.kl <= first.drift.kl * 1.001 + 1e-6, params


OTHER = "A train from {} goes to"


@pytest.fixture
def claiming(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory that takes every prompt about its subject for its fact, if the words are near enough."""
    monkeypatch.setattr(RelationJudge, "asks", lambda *_: 1.0)


def test_after_a_memory_takes_another_fact_the_advice_makes_it_leave_it(
    services: Services, claiming: None
) -> None:
    kept = Edit(subject="France", prompt=FACTS[0].prompt, target="Rome", holds=[{"prompt": OTHER}])
    guard = Guard(max_changed=0, off=("all",))
    report = services.edits.preview([kept], "constrained", guard=guard)
    assert report.failed_guard == ["max_changed 0: 1 fact changed"]
    params = advised(report.next)
    assert set(params) == {"min_similarity"}, report.next
    again = services.edits.apply([kept], "constrained", params, guard)
    assert again.status == "applied", again.failed_guard
    services.edits.revert(again.edit_ids)


def test_a_memory_that_reaches_too_little_says_so_and_how_far_it_must(
    services: Services, claiming: None
) -> None:
    report = services.edits.preview([FACTS[0]], "constrained", {"min_similarity": 0.999}, OFF)
    assert not any(report.forms.values())
    assert any("forms hold at 0.00" in warning for warning in report.warnings)
    assert "too seldom" in report.next
    params = advised(report.next)
    again = services.edits.preview([FACTS[0]], "constrained", params, OFF)
    assert sum(again.forms.values()) > 0
    assert "min_similarity" in params


def test_what_the_caller_set_is_not_changed_by_advice_nor_left_out_of_another_way(
    services: Services, claiming: None
) -> None:
    free = services.edits.preview([FACTS[0]], guard=OFF)
    report = services.edits.preview([FACTS[0]], params={"min_similarity": 0.999}, guard=OFF)
    assert free.method == report.method == "constrained"
    assert sum(free.forms.values()) > 0 == sum(report.forms.values())  # so advice would have widened it
    assert report.params["min_similarity"] == 0.999
    assert len(report.tried) > 1
    assert {attempt.params["min_similarity"] for attempt in report.tried} == {0.999}


def test_where_no_similarity_parts_the_prompts_nothing_is_advised(services: Services) -> None:
    editor, lm = METHODS["constrained"], services.workspace.lm
    own = "The capital of France is"
    seen = Evidence(own=[own], held=["France has as its capital"], moved=["is The capital of France"])
    advice = editor.hint(lm, editor.params(), "too_strong", seen)
    assert not advice.params
    assert "another method" in advice.text


def test_an_edit_that_is_not_said_in_its_own_words_is_not_told_to_reach_further(services: Services) -> None:
    seen = Evidence(own=["a"], unsaid=["a"], missed=["b"])
    for method in METHOD_NAMES:
        editor = METHODS[method]
        advice = editor.hint(services.workspace.lm, editor.params(), "too_weak", seen)
        widening = {remedy.parameter for remedy in editor.stronger if remedy.widens}
        assert not widening & set(advice.params), method


def test_a_rejected_edit_is_told_which_bound_to_change_or_what_to_try(services: Services) -> None:
    report = services.edits.apply([FACTS[1]], "rome", {"mode": "simplified"}, Guard(max_drift=0.0))
    assert report.status == "rejected"
    assert report.next.startswith("Nothing was changed.")
    assert advised(report.next) or "another method" in report.next
    missing = services.edits.apply([FACTS[1]], "rome", {"mode": "simplified"}, Guard(min_generality=0.5))
    assert "failed_guard names" in missing.next


def test_an_imported_patch_is_not_said_to_have_parameters(services: Services, tmp_path: Path) -> None:
    other = open_services(tmp_path / "other")
    other.edits.apply([Edit(subject="Peru", prompt="{} lies in", target="Rome")], "rome", {"max_steps": 1})
    other.exchange.export_edits("lora", "adapter")
    other.close()
    home = services.workspace.settings.home
    (home / "imports").mkdir(exist_ok=True)
    (tmp_path / "other" / "exports" / "adapter").rename(home / "imports" / "adapter")
    report = services.exchange.import_adapter(
        "adapter", [Edit(subject="Peru", prompt="{} lies in", target="Rome")]
    )
    assert "params." not in report.next
    services.edits.revert(report.edit_ids)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_the_published_preset_is_accepted_and_given_values_win(services: Services, method: str) -> None:
    editor = METHODS[method]
    params = {"preset": "published", **quick(method)}
    if editor.published is None:
        with pytest.raises(InvalidEdit, match="it has none"):
            services.edits.preview([FACTS[1]], method, params)
        return
    report = services.edits.preview([FACTS[1]], method, params)
    for name, value in editor.published.params.items():
        if name not in params:
            assert report.params[name] == (list(value) if isinstance(value, tuple) else value)
    for name, value in quick(method).items():
        assert report.params[name] == value

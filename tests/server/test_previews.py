"""A preview is kept as it was computed: bit for bit, without computing or asking again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from editors import METHODS
from editors.edit import Edit
from editors.model.lm import LM
from server.errors import Conflict, ServiceError
from server.facts.guard import UNGUARDED, Guard
from server.facts.previews import MOST_BYTES, Previews
from server.services import Services
from tests.server.opened import FACTS, QUICK, STRONG, apply, open_services, same, weights

FRANCE, JAPAN, SPAIN = FACTS


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    opened = open_services(tmp_path / "home", bounds="off")
    yield opened
    opened.close()


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often an edit was computed, and the model asked."""
    seen = {"compute": 0, "asked": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            seen[name] += 1
            return function(*given, **named)

        return call

    for kind in {type(editor) for editor in METHODS.values()}:
        monkeypatch.setattr(kind, "compute", counted("compute", kind.compute))
    for name in ("generate", "score"):
        monkeypatch.setattr(LM, name, counted("asked", getattr(LM, name)))
    return seen


def preview(services: Services, *edits: Edit, method: str = "rome", **more: Any) -> Any:
    params = dict(QUICK) if method == "rome" else None
    return services.edits.preview(list(edits), method=method, params=params, **more)


@pytest.mark.parametrize("method", ["rome", "grace", "in_context", "auto"])
def test_an_applied_preview_is_what_applying_alone_would_give(
    services: Services, tmp_path: Path, counts: dict[str, int], method: str
) -> None:
    apply(services, SPAIN)
    seen = preview(services, FRANCE, JAPAN, method=method) if method != "rome" else preview(services, FRANCE)
    edits = [FRANCE] if method == "rome" else [FRANCE, JAPAN]
    before = dict(counts)
    kept = services.edits.apply(preview_id=seen.preview_id)
    assert counts == before, "nothing is computed or asked"
    assert kept.status == "applied"
    assert kept.results == [
        r.model_copy(update={"edit_id": i}) for r, i in zip(seen.results, kept.edit_ids, strict=True)
    ]
    other = open_services(tmp_path / "other", bounds="off")
    apply(other, SPAIN)
    params = dict(QUICK) if method == "rome" else None
    direct = other.edits.apply(edits, method=method, params=params)
    assert kept.weights_hash == direct.weights_hash
    assert services.workspace.state_hash == other.workspace.state_hash
    assert same(weights(services), weights(other))
    other.close()


def test_what_was_kept_is_on_the_ledger_like_any_edit(tmp_path: Path) -> None:
    services = open_services(tmp_path / "home", bounds="off")
    seen = preview(services, FRANCE)
    [edit_id] = services.edits.apply(preview_id=seen.preview_id, reason="why", source="where").edit_ids
    state, shown = services.workspace.state_hash, services.history.show_edit(edit_id)
    assert (shown.edit.reason, shown.edit.source, shown.edit.status) == ("why", "where", "active")
    assert shown.measurements[0].values["after"] == seen.results[0].after
    services.close()
    again = open_services(tmp_path / "home", bounds="off")
    assert again.workspace.state_hash == state
    again.edits.revert([edit_id])
    assert again.workspace.host.weights_hash == again.workspace.host.base_hash
    again.close()


def test_after_a_change_of_the_model_a_preview_is_refused_or_computed_again(
    services: Services, counts: dict[str, int]
) -> None:
    seen = preview(services, FRANCE)
    apply(services, SPAIN)
    state = services.workspace.state_hash
    with pytest.raises(Conflict, match="recompute=true"):
        services.edits.apply(preview_id=seen.preview_id)
    assert services.workspace.state_hash == state
    computed = counts["compute"]
    report = services.edits.apply(preview_id=seen.preview_id, recompute=True)
    assert report.status == "applied"
    assert counts["compute"] == computed + 1


def test_a_preview_holds_again_when_the_model_is_back_in_its_state(services: Services) -> None:
    seen = preview(services, FRANCE)
    services.edits.revert(apply(services, SPAIN))
    assert services.edits.apply(preview_id=seen.preview_id).status == "applied"


def test_a_guard_is_judged_on_what_the_preview_measured(services: Services, counts: dict[str, int]) -> None:
    seen = preview(services, FRANCE, guard=UNGUARDED)
    computed = dict(counts)
    report = services.edits.apply(preview_id=seen.preview_id, guard=Guard(min_reliability=1, max_drift=0.0))
    assert counts == computed
    assert report.status == "rejected"
    assert any("max_drift" in bound for bound in report.failed_guard)
    assert services.workspace.host.weights_hash == services.workspace.host.base_hash
    assert services.edits.apply(preview_id=seen.preview_id).status == "applied", "it can still be kept"


def test_the_bounds_of_the_preview_hold_when_it_is_applied(services: Services) -> None:
    seen = preview(services, FRANCE, guard=Guard(max_drift=0.0))
    report = services.edits.apply(preview_id=seen.preview_id)
    assert report.status == "rejected"
    assert report.failed_guard == seen.failed_guard


def test_an_active_edit_is_replaced_only_when_that_is_said(services: Services) -> None:
    [old] = apply(services, FRANCE)
    seen = preview(services, FRANCE.model_copy(update={"target": "Madrid"}))
    with pytest.raises(Conflict, match="replace=true"):
        services.edits.apply(preview_id=seen.preview_id)
    report = services.edits.apply(preview_id=seen.preview_id, replace=True)
    assert report.status == "applied"
    assert services.history.show_edit(old).edit.status == "replaced"


def test_of_a_partial_preview_the_edits_that_hold_are_kept(tmp_path: Path, counts: dict[str, int]) -> None:
    services = open_services(tmp_path / "home")
    hard = Edit(subject="Spain", prompt="The language of {} is", target="the very long name of some language")
    off = Guard(off=("perplexity", "subject_locality"))
    seen = services.edits.preview(
        [FRANCE, JAPAN, hard], "memit", {k: v for k, v in STRONG.items() if k != "mode"}, off, partial=True
    )
    computed = dict(counts)
    report = services.edits.apply(preview_id=seen.preview_id)
    assert counts == computed
    assert (report.status == "applied") == (not seen.failed_guard)
    assert len(report.results) == len(seen.results)
    assert report.left_out == seen.left_out
    services.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("edits", [JAPAN]),
        ("method", "memit"),
        ("params", {"layer": 0}),
        ("goal", "export"),
        ("partial", True),
    ],
)
def test_what_differs_from_the_preview_is_named(services: Services, field: str, value: Any) -> None:
    seen = preview(services, FRANCE)
    with pytest.raises(ServiceError, match=f"{field} is not what it was"):
        services.edits.apply(preview_id=seen.preview_id, **{field: value})
    assert services.edits.apply([FRANCE], preview_id=seen.preview_id).status == "applied"


def test_a_preview_that_is_not_kept_is_refused_with_those_that_are(services: Services) -> None:
    seen = preview(services, FRANCE)
    with pytest.raises(ServiceError, match=seen.preview_id):
        services.edits.apply(preview_id="p-1")
    with pytest.raises(ServiceError, match="preview_id"):
        services.edits.apply()


def test_a_preview_that_was_applied_is_refused_with_what_became_of_it(services: Services) -> None:
    seen = preview(services, FRANCE, JAPAN, method="in_context")
    services.edits.apply(preview_id=seen.preview_id)
    with pytest.raises(ServiceError, match="was applied already, as e1, e2"):
        services.edits.apply(preview_id=seen.preview_id)


def test_the_latest_previews_are_kept() -> None:
    previews: Previews[int] = Previews()
    ids = [previews.keep(i, 1) for i in range(9)]
    assert [previews.get(each) for each in ids[1:]] == list(range(1, 9))
    with pytest.raises(ServiceError, match="not kept"):
        previews.get(ids[0])


def test_previews_with_large_patches_make_room_for_the_latest() -> None:
    previews: Previews[int] = Previews()
    first, second = previews.keep(1, MOST_BYTES // 2 + 1), previews.keep(2, MOST_BYTES // 2 + 1)
    assert previews.get(second) == 2
    with pytest.raises(ServiceError):
        previews.get(first)

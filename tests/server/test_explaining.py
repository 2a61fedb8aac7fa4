"""Which edit says this: found by leaving edits out, and nothing is left of the search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editors.edit import Edit
from editors.errors import Cancelled
from server.facts.explaining import MOST_ASKED, SINGLY, Search, Without
from server.request_context import RequestContext
from server.services import Services
from tests.server.opened import FACTS, STRONG, apply, open_services, same, weights

FRANCE, JAPAN, SPAIN = FACTS
ASKED = "The capital of France is"


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    opened = open_services(tmp_path / "home", bounds="off")
    yield opened
    opened.close()


def strong(services: Services, edit: Edit, method: str = "rome") -> str:
    params = dict(STRONG) if method == "rome" else None
    [edit_id] = services.edits.apply([edit], method=method, params=params).edit_ids
    return edit_id


@pytest.mark.parametrize("method", ["rome", "grace", "constrained"])
def test_what_is_said_without_an_edit_is_what_a_revert_makes_the_model_say(
    services: Services, method: str
) -> None:
    ids = [*apply(services, SPAIN), *apply(services, JAPAN), strong(services, FRANCE, method)]
    before, live = services.workspace.state_hash, weights(services)
    events = services.history.query("SELECT max(seq) FROM events").rows
    found = services.edits.explain(ASKED)
    assert services.workspace.state_hash == before
    assert services.workspace.host.rehash() == services.workspace.host.weights_hash
    assert same(weights(services), live)
    assert services.history.query("SELECT max(seq) FROM events").rows == events
    assert found.edited
    assert found.effects[0].changes_answer
    said = {}
    for edit_id in ids:
        services.edits.revert([edit_id])
        said[edit_id] = services.edits.explain(ASKED).answer
        services.edits.reapply([edit_id])
    told = {e.edit_ids[0]: e for e in found.effects if len(e.edit_ids) == 1}
    for edit_id, answer in said.items():
        if answer != found.answer:
            assert told[edit_id].changes_answer
        if edit_id in told:
            assert told[edit_id].answer_without == answer


# --- the search alone ------------------------------------------------------------------------------


def search(count: int, without: Callable[[set[int]], tuple[str, float]]) -> Search[int]:
    """A search over `count` edits; `without` has the answer and the effect when some are left out."""

    def leave_out(some: Sequence[int]) -> Without[int]:
        answer, effect = without(set(some))
        return Without(list(some), answer, effect, answer != "now")

    found: Search[int] = Search(leave_out)
    found.run(range(count))
    return found


@given(st.integers(1, 500), st.data())
def test_one_edit_of_many_is_found_in_few_questions(count: int, data: st.DataObject) -> None:
    culprit = data.draw(st.integers(0, count - 1))
    found = search(count, lambda out: ("other", 3.0) if culprit in out else ("now", 0.0))
    assert [f.edits for f in found.found] == [[culprit]]
    assert found.asked <= max(SINGLY + 1, 2 * math.ceil(math.log2(count)) + 1)


@given(st.integers(2, 300), st.data())
def test_edits_that_each_suffice_are_found_together(count: int, data: st.DataObject) -> None:
    one, two = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=2, max_size=2)))
    found = search(count, lambda out: ("other", 3.0) if {one, two} <= out else ("now", 0.0))
    [group] = found.found
    assert group.changes
    assert {one, two} <= set(group.edits)


@given(st.integers(2, 200), st.data())
def test_every_edit_with_an_effect_of_its_own_is_found(count: int, data: st.DataObject) -> None:
    acting = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=3))
    found = search(count, lambda out: ("other" if out & acting else "now", float(len(out & acting))))
    assert {e for f in found.found for e in f.edits} == acting


@given(st.integers(1, 1000))
def test_the_number_of_questions_is_bounded(count: int) -> None:
    found = search(count, lambda out: ("other", float(len(out))))
    assert found.asked <= MOST_ASKED
    assert {e for f in found.found for e in f.edits} == set(range(count)), (
        "what was not taken apart is a group"
    )


# ---------------------------------------------------------------------------------------------------


def test_what_no_edit_says_is_the_models_own(services: Services) -> None:
    alone = services.edits.explain(ASKED)
    assert (alone.effects, alone.edited, alone.active) == ([], False, 0)
    assert "No edit is active" in alone.next


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_search_that_is_broken_off_leaves_the_model_as_it_was(services: Services, at: int) -> None:
    for edit in FACTS:
        apply(services, edit)
    before, live = services.workspace.state_hash, weights(services)
    seen = 0

    def stop(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        services.edits.explain(ASKED, ctx=RequestContext(progress=stop))
    assert services.workspace.state_hash == before
    assert same(weights(services), live)

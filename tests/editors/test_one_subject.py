"""Several facts of one subject: in one call by one key, and on top of an earlier edit of the same subject."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from editors import METHODS
from editors.closed_form.keys import read_keys, subject_rows
from editors.closed_form.one_subject import others_keys, subject_groups
from editors.closed_form.rome import RomeParams
from editors.closed_form.solve import collapse
from editors.edit import Edit
from editors.method import EditContext
from editors.metric import Metric
from editors.model.deltas import LowRank
from editors.patch import WeightPatch
from tests.editors.conftest import StatisticsOf
from tests.families import make

SAME = (
    Edit(subject="Croatia", prompt="The currency of {} is the", target="euro"),
    Edit(subject="Croatia", prompt="The capital of {} is", target="Paris"),
)


@pytest.mark.parametrize("method", ["rome", "memit", "emmet", "alphaedit"])
def test_the_key_of_a_subject_gets_what_all_its_facts_add(method: str, statistics_of: StatisticsOf) -> None:
    """And a fact that is taken away takes its own part alone."""
    lm = make("llama")
    context = EditContext(statistics_of(lm))
    more: dict[str, Any] = {"rough": False, "max_steps": 3, "clamp": 100}
    more |= (
        {"layer": 1}
        if method == "rome"
        else {"layers": (1,), "weight": 1e-3}
        if method == "memit"
        else {"layers": (1,)}
    )
    patch = METHODS[method].compute(lm, SAME, METHODS[method].params(**more), context)
    name = lm.mlp_out(1)
    key = read_keys(lm, [1], subject_rows(lm, SAME[0], RomeParams()))[1][0]

    def part(rows: list[int]) -> torch.Tensor:
        some = METHODS[method].subset(patch, rows, context.statistics)
        assert isinstance(some, WeightPatch)
        return some.deltas[name].dense() @ key

    own = [patch.deltas[name].left[:, i] for i in (0, 1)]  # type: ignore[attr-defined]
    for i in (0, 1):
        cosine = torch.cosine_similarity(part([i]), own[i], dim=0)
        assert cosine > 0.99
    assert torch.cosine_similarity(part([0, 1]), own[0] + own[1], dim=0) > 0.9


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_a_later_fact_is_sought_on_top_of_the_earlier_ones(method: str, statistics_of: StatisticsOf) -> None:
    """What an edit asks is held from then on: the second fact of a call is another than it would be alone."""
    lm = make("llama")
    context = EditContext(statistics_of(lm))
    more: dict[str, Any] = {"rough": False, "max_steps": 3}
    more |= {"layer": 1} if method == "rome" else {"layers": (1,)}
    editor, name = METHODS[method], lm.mlp_out(1)
    values = [
        editor.compute(lm, edits, editor.params(**more), context).deltas[name].left[:, -1]  # type: ignore[attr-defined]
        for edits in (SAME, SAME[1:])
    ]
    assert not torch.allclose(values[0], values[1], rtol=1e-2)


def test_facts_of_a_group_share_their_rows() -> None:
    torch.manual_seed(0)
    each = LowRank(torch.randn(5, 3), torch.randn(3, 4))
    apart, shared = collapse(each, [1, 1, 1]), collapse(each, [1, 1, 1], group=[0, 1, 0])
    assert torch.equal(shared.right[1], apart.right[1])
    assert torch.equal(shared.right[0], apart.right[0] + apart.right[2])
    assert torch.equal(shared.right[0], shared.right[2])
    assert torch.equal(shared.left, apart.left)


def test_an_earlier_edit_of_the_same_key_is_not_held_still() -> None:
    torch.manual_seed(0)
    metric = Metric.of(torch.eye(8), 1e-2)
    own, other = torch.randn(2, 8), torch.randn(1, 8)
    kept = others_keys(torch.cat([own[:1] * 1.7, other]), own, metric)
    assert kept is not None
    assert torch.equal(kept, other)
    assert others_keys(own, own, metric) is None
    assert others_keys(None, own, metric) is None


def test_subjects_are_the_same_whatever_their_case_and_spacing() -> None:
    names = ("Croatia", "Marie  Curie", "croatia", "marie curie")
    assert subject_groups([Edit(subject=n, prompt="{} is", target="x") for n in names]) == [0, 1, 0, 1]

"""Directions from hidden states: one unit vector per layer, and how well it separates the two sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.constants import assumed
from editors.errors import InvalidEdit
from editors.steering.pairs import Pair
from editors.steering.states import States

FOLDS = assumed(
    5,
    "folds of the cross-validation that measures how well a layer separates the pairs",
    "the usual number; only the choice of layers depends on it",
)
Direction = Callable[[Tensor], Tensor]  # differences (n, layers, d) -> unit vectors (layers, d)


@dataclass(frozen=True)
class Separation:
    """How well a layer's direction separates the two sides of held-out pairs (cross-validated)."""

    accuracy: float  # share of held-out pairs whose positive side is further along the direction
    d_prime: float  # distance between the sides' means, in pooled standard deviations


def mean_difference(differences: Tensor) -> Tensor:
    """Mean difference of the pairs (Rimsky et al. 2024, arXiv 2312.06681, sec. 3): (n, layers, d) -> (layers, d)."""
    return unit(differences.mean(0))


def first_component(differences: Tensor) -> Tensor:
    """First principal component of the differences (Zou et al. 2023, arXiv 2310.01405, sec. 3.1).

    The differences are not centred. The paper gives them random signs, so that their mean is about zero,
    which comes to the same. The result points the way of the mean difference. (n, layers, d) -> (layers, d).
    """
    components = []
    for layer in differences.unbind(1):  # (n, d)
        _, _, rows = torch.linalg.svd(layer.double(), full_matrices=False)
        v = rows[0].float()
        components.append(v if float(layer.mean(0) @ v) >= 0 else -v)
    return unit(torch.stack(components))


def unit(vectors: Tensor) -> Tensor:
    """Scale vectors (..., d) to length one. Raises InvalidEdit for a vector of length zero."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    if not bool((lengths > 0).all()):
        raise InvalidEdit(
            "the positive and negative texts look the same to the model; give pairs that differ more"
        )
    scaled: Tensor = vectors / lengths
    return scaled


def answer_groups(pairs: Sequence[Pair]) -> Tensor | None:
    """For multiple-choice pairs: 1 or -1 per pair, for which of the two answers is its positive one.

    None unless all pairs have the same two answers ("(A)" and "(B)", "Yes" and "No") and each of the two is the
    positive one of at least one pair.
    """
    answers = sorted({text for pair in pairs for text in (pair.positive, pair.negative)})
    if len(answers) != 2:
        return None
    signs = torch.tensor([1.0 if pair.positive == answers[0] else -1.0 for pair in pairs])
    return signs if len(signs.unique()) == 2 else None


def fit_direction(differences: Tensor, direction: Direction, groups: Tensor | None) -> Tensor:
    """The direction of the behaviour without that of the answer's letter: (n, layers, d) -> (layers, d).

    The states of "(A)" and "(B)" differ mostly by the letter. So the pairs with answer "(A)" and those with
    answer "(B)" are each shifted to the mean of the two groups' means. This cancels the letter, also for groups
    of different sizes. What remains of the letter is projected out.
    """
    if groups is None or len(groups.unique()) < 2:
        return direction(differences)
    means = [differences[groups == sign].mean(0) for sign in (1.0, -1.0)]
    middle, letter = (means[0] + means[1]) / 2, unit(means[0] - means[1])
    group_mean = torch.where((groups > 0)[:, None, None], means[0], means[1])
    v = direction(differences - group_mean + middle)
    return unit(v - (v * letter).sum(-1, keepdim=True) * letter)


def separations(
    states: States, direction: Direction, groups: Tensor | None = None
) -> list[Separation] | None:
    """Cross-validate the direction of each layer: fit on all folds but one, measure on that one.

    None for a single pair.
    """
    n = len(states.positive)
    if n < 2:
        return None
    folds = min(FOLDS, n)
    along: list[tuple[Tensor, Tensor]] = []
    for fold in range(folds):
        held = torch.arange(n) % folds == fold
        fit_groups = None if groups is None else groups[~held]
        v = fit_direction(states.differences[~held], direction, fit_groups)  # (layers, d)
        along.append(
            (
                torch.einsum("nld,ld->nl", states.positive[held], v),
                torch.einsum("nld,ld->nl", states.negative[held], v),
            )
        )
    positive, negative = (torch.cat([pair[i] for pair in along]) for i in (0, 1))  # (n, layers)
    accuracy = ((positive > negative).float() + 0.5 * (positive == negative).float()).mean(0)
    spread = ((positive.var(0, unbiased=False) + negative.var(0, unbiased=False)) / 2).sqrt()
    d_prime = (positive.mean(0) - negative.mean(0)) / spread.clamp(min=1e-12)
    return [Separation(float(a), float(d)) for a, d in zip(accuracy, d_prime, strict=True)]


def mean_shift(states: States) -> Tensor:
    """Length of the mean difference, in mean hidden norms of the layer: (layers,)."""
    lengths: Tensor = states.differences.mean(0).norm(dim=-1)
    return lengths / states.norms.clamp(min=1e-12)

"""From states to directions: one unit vector per layer, and how well it tells the two sides apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.errors import InvalidEdit
from editors.steering.pairs import Pair
from editors.steering.states import States

FOLDS = 5
Direction = Callable[[Tensor], Tensor]  # differences (n, layers, d) -> unit vectors (layers, d)


@dataclass(frozen=True)
class Separation:
    """How well held-out pairs are told apart along a layer's direction; cross-validated."""

    accuracy: float  # share of held-out pairs whose positive side lies further along
    d_prime: float  # distance of the sides' means in pooled standard deviations


def caa(differences: Tensor) -> Tensor:
    """Mean difference of the pairs (Rimsky et al. 2024, arXiv 2312.06681, sec. 3): (n, layers, d) -> (layers, d)."""
    return unit(differences.mean(0))


def pca(differences: Tensor) -> Tensor:
    """First principal component of the differences (Zou et al. 2023, arXiv 2310.01405, sec. 3.1).

    The differences are not centred, which is what random signs come to in the paper; the sign is
    chosen so that the mean difference points along the result. (n, layers, d) -> (layers, d).
    """
    found = []
    for layer in differences.unbind(1):  # (n, d)
        _, _, rows = torch.linalg.svd(layer.double(), full_matrices=False)
        v = rows[0].float()
        found.append(v if float(layer.mean(0) @ v) >= 0 else -v)
    return unit(torch.stack(found))


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length one; raises InvalidEdit for a direction of length zero."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    if not bool((lengths > 0).all()):
        raise InvalidEdit(
            "the positive and negative texts look the same to the model; give pairs that differ more"
        )
    scaled: Tensor = vectors / lengths
    return scaled


def answer_groups(pairs: Sequence[Pair]) -> Tensor | None:
    """Which of two opposite answers is each pair's positive one (1 or -1), for multiple-choice pairs.

    None unless there are just two answers ("(A)" and "(B)", "Yes" and "No") and both are right at times.
    """
    answers = sorted({text for pair in pairs for text in (pair.positive, pair.negative)})
    if len(answers) != 2:
        return None
    signs = torch.tensor([1.0 if pair.positive == answers[0] else -1.0 for pair in pairs])
    return signs if len(signs.unique()) == 2 else None


def fitted(differences: Tensor, direction: Direction, groups: Tensor | None) -> Tensor:
    """The direction, free of which of two answers was given: (n, layers, d) -> (layers, d).

    Between "(A)" and "(B)" lies mostly the letter, with either sign. Both groups are moved to the mean of
    their means, so that the letter cancels whatever their sizes, and what is left of it is projected out.
    """
    if groups is None or len(groups.unique()) < 2:
        return direction(differences)
    means = [differences[groups == sign].mean(0) for sign in (1.0, -1.0)]
    middle, letter = (means[0] + means[1]) / 2, unit(means[0] - means[1])
    own = torch.where((groups > 0)[:, None, None], means[0], means[1])
    v = direction(differences - own + middle)
    return unit(v - (v * letter).sum(-1, keepdim=True) * letter)


def separations(
    states: States, direction: Direction, groups: Tensor | None = None
) -> list[Separation] | None:
    """Per layer, on held-out pairs: fitted on the others, fold by fold. None for a single pair."""
    n = len(states.positive)
    if n < 2:
        return None
    folds = min(FOLDS, n)
    along: list[tuple[Tensor, Tensor]] = []
    for fold in range(folds):
        held = torch.arange(n) % folds == fold
        left = None if groups is None else groups[~held]
        v = fitted(states.differences[~held], direction, left)  # (layers, d)
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


def shift(states: States) -> Tensor:
    """Length of the mean difference in units of the layer's mean hidden norm: (layers,)."""
    lengths: Tensor = states.differences.mean(0).norm(dim=-1)
    return lengths / states.norms.clamp(min=1e-12)


def layers_by_name(count: int, layers: Sequence[int]) -> tuple[int, ...]:
    """Checked, sorted layers; raises InvalidEdit naming the one that is not there."""
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong:
        raise InvalidEdit(f"layer {wrong[0]} does not exist; this model has layers 0 to {count - 1}")
    if not layers:
        raise InvalidEdit("layers is empty; name at least one, or leave it out to have them chosen")
    return tuple(sorted(set(layers)))

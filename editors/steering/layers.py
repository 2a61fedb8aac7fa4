"""The layers a steering vector acts after: checked when given, chosen by separation when not."""

from __future__ import annotations

from collections.abc import Sequence

from editors.constants import assumed
from editors.errors import InvalidEdit

NEAR_BEST = assumed(
    0.8,
    "a neighbour of the best layer acts with it when its separation is at least this share of the best one",
    "neighbouring layers carry nearly the same direction; no comparison of shares is known",
)
MOST_LAYERS = assumed(
    5,
    "most layers that a vector acts after when none are named",
    "a dose is divided among its layers, so that more of them add little; no comparison is known",
)


def check_layers(count: int, layers: Sequence[int]) -> tuple[int, ...]:
    """The layers, sorted, each once. Raises InvalidEdit for an empty list and for a layer outside 0..count - 1."""
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong:
        raise InvalidEdit(f"layer {wrong[0]} does not exist; this model has layers 0 to {count - 1}")
    if not layers:
        raise InvalidEdit("layers is empty; name at least one, or leave it out to have them chosen")
    return tuple(sorted(set(layers)))


def best_layers(separation: Sequence[float]) -> tuple[int, ...]:
    """The layer with the greatest separation and the neighbours near it: a run of at most MOST_LAYERS.

    Only the middle half of the model is searched. The first layers separate words rather than
    meanings, and what is added after the last layers hardly changes the text.
    """
    n = len(separation)
    first, last = (n + 3) // 4, max((n + 3) // 4, (3 * n) // 4 - 1)
    if first >= n:
        return (n - 1,)
    inside = range(first, min(last, n - 1) + 1)
    best = max(inside, key=lambda layer: separation[layer])
    run = [best]
    while len(run) < MOST_LAYERS:
        neighbours = [
            layer
            for layer in (run[0] - 1, run[-1] + 1)
            if layer in inside and separation[layer] >= NEAR_BEST * separation[best]
        ]
        if not neighbours:
            break
        run = sorted([*run, max(neighbours, key=lambda layer: separation[layer])])
    return tuple(run)

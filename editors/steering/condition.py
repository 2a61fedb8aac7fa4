"""A condition: a dose acts only at tokens whose state points in a given direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from editors.model.activations import first


@dataclass(frozen=True)
class Condition:
    """A dose acts at a token only where its state after `layer` has a cosine above `above` with `direction`.

    After conditional activation steering (Lee et al. 2024, arXiv 2409.05907), which decides once for a whole prompt;
    here every token decides for itself, so that an answer does not depend on how it was batched.
    """

    layer: int
    direction: Tensor  # (d_model,), of unit length
    above: float

    def holds(self, hidden: Tensor) -> Tensor:
        """Where the condition holds in states (..., d_model): a mask (..., 1)."""
        return (self.score(hidden) > self.above)[..., None]

    def score(self, hidden: Tensor) -> Tensor:
        """Cosine of states (..., d_model) with the direction."""
        wide = hidden.float()
        cosine: Tensor = wide @ self.direction.to(wide.device) / wide.norm(dim=-1).clamp(min=1e-12)
        return cosine


def condition_of(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> Condition | None:
    if "condition" not in tensors:
        return None
    return Condition(int(info["condition"]["layer"]), tensors["condition"], float(info["condition"]["above"]))


def noter(condition: Condition, held: list[Tensor]) -> Callable[..., Any]:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        held[:] = [condition.holds(first(output))]

    return note

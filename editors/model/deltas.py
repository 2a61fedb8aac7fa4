"""Changes of weight matrices, and the one way a live weight is made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """delta = left @ right, in float32."""

    left: Tensor  # (d_out, r)
    right: Tensor  # (r, d_in)

    def add_to(self, weight: Tensor) -> None:
        """Add to `weight` (d_out, d_in, float32) in place."""
        weight.addmm_(self.left.to(weight.device), self.right.to(weight.device))

    def dense(self) -> Tensor:
        """The whole matrix (d_out, d_in)."""
        return self.left @ self.right

    def select(self, edits: Sequence[int], ranks: Sequence[int] | None = None) -> LowRank:
        """The sum of some edits' parts, in the given order.

        Edit i owns `ranks[i]` consecutive columns of `left` and rows of `right`; one each where not given.
        """
        sizes = list(ranks or [1] * self.right.shape[0])
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        columns = [c for i in edits for c in range(starts[i], starts[i] + sizes[i])]
        return LowRank(self.left[:, columns].contiguous(), self.right[columns].contiguous())


@dataclass(frozen=True)
class Dense:
    """delta as it is, in float32."""

    delta: Tensor  # (d_out, d_in)

    def add_to(self, weight: Tensor) -> None:
        weight.add_(self.delta.to(weight.device))

    def dense(self) -> Tensor:
        """The whole matrix (d_out, d_in)."""
        return self.delta


Delta = LowRank | Dense


def rebuilt(pristine: Tensor, deltas: Sequence[Delta]) -> Tensor:
    """cast(fp32(W0) + deltas in order): the only way a live weight is ever made.

    `pristine` is (d_out, d_in) in any dtype; the result is a new tensor of the same dtype.
    """
    weight = pristine.to(torch.float32, copy=True).contiguous()
    for delta in deltas:
        delta.add_to(weight)
    return weight.to(pristine.dtype)

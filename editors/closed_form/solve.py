"""The linear algebra of the closed-form methods: delta = R X^T, and how X is found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from editors.patch import LowRank


@dataclass(frozen=True)
class Metric:
    """A factorised second moment C = E[k k^T] (d_in, d_in), regularised; None is the identity."""

    cholesky: Tensor | None  # (d_in, d_in) lower

    @classmethod
    def of(cls, moment: Tensor, ridge: float) -> Metric:
        """Factorise C + ridge * mean(diag C) * I."""
        d = moment.shape[0]
        scale = ridge * moment.diagonal().mean()
        return cls(torch.linalg.cholesky(moment + scale * torch.eye(d, dtype=moment.dtype)))

    def solve(self, keys: Tensor) -> Tensor:
        """C^-1 applied to the columns of `keys` (d_in, n)."""
        return keys if self.cholesky is None else torch.cholesky_solve(keys, self.cholesky)


def rank_one(residual: Tensor, key: Tensor, metric: Metric) -> LowRank:
    """ROME, eq. 2: delta = (v* - W k) (C^-1 k)^T / ((C^-1 k)^T k).

    `residual` (d_out,) is v* - W k, `key` (d_in,) is k.
    """
    u = metric.solve(key[:, None])[:, 0]
    return LowRank(residual[:, None].contiguous(), (u / (u @ key))[None, :].contiguous())

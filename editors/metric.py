"""How changes are weighed by what keys usually are: the second moment's inverse, and its null space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Inverse(Protocol):
    """M^-1, however it is kept."""

    def solve(self, keys: Tensor) -> Tensor:
        """M^-1 applied to the columns of `keys` (d_in, n)."""


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


@dataclass(frozen=True)
class Projector:
    """P = Q Q^T: the projector onto the directions that carry almost none of the keys' energy (AlphaEdit, eq. 7).

    `basis` are the columns Q, or None and `complement` those left out where they are fewer: P = I - Q' Q'^T.
    """

    basis: Tensor | None  # (d_in, r)
    complement: Tensor | None = None  # (d_in, d_in - r)

    @classmethod
    def of(cls, moment: Tensor, energy: float) -> Projector:
        """Keep the directions of smallest eigenvalues that together carry `energy` (0..1) of the trace."""
        values, vectors = torch.linalg.eigh(moment)
        share = values.clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
        rank = int((share <= energy).sum())
        if 2 * rank <= moment.shape[0]:
            return cls(vectors[:, :rank].contiguous())
        return cls(None, vectors[:, rank:].contiguous())

    def solve(self, keys: Tensor) -> Tensor:
        """P applied to the columns of `keys` (d_in, n)."""
        if self.basis is not None:
            return self.basis @ (self.basis.t() @ keys)
        assert self.complement is not None
        return keys - self.complement @ (self.complement.t() @ keys)

"""How changes are weighted by the distribution of keys: the second moment's inverse, and its null space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from editors.constants import TWO_MODELS, tuned

CPU = torch.device("cpu")
RIDGE = tuned(
    1e-2,
    "added to a second moment before it is inverted, in units of its mean diagonal",
    models=TWO_MODELS,
    command="python -m benchmarks.constants editors.metric.RIDGE --values 0.001 0.1 -n 6",
    figure="makes no difference between 0.001 and 0.1 by rome: on both models all rates the same (but neighbours .93 "
    "instead of .97 at 0.1 on the first), perplexity x1.036 and x1.014 (x1.016 at 0.1)",
)


def has_room(device: torch.device, size: int) -> bool:
    """Whether a CUDA device has `size` bytes free, and as many again for the model's own work.

    Others never have: Apple's GPU has neither float64 nor every factorisation.
    """
    return device.type == "cuda" and 2 * size <= torch.cuda.mem_get_info(device)[0]


def placed(matrix: Tensor, device: torch.device, matrices: int) -> Tensor:
    """A matrix on a device that has room for `matrices` of its kind beside it, else where it is."""
    return matrix.to(device) if has_room(device, (matrices + 1) * matrix.nbytes) else matrix


class Inverse(Protocol):
    """M^-1, in whatever form it is stored."""

    def solve(self, keys: Tensor) -> Tensor:
        """M^-1 applied to the columns of `keys` (d_in, n)."""


@dataclass(frozen=True)
class Metric:
    """A factorised second moment C = E[k k^T] (d_in, d_in), regularised; None is the identity.

    Of experts it has one block each, (E, d_inner, d_inner): what one's keys have to do with another's is left out, as
    in MoEEdit (arXiv 2602.10965).
    """

    cholesky: Tensor | None  # (d_in, d_in) or (E, d_inner, d_inner) lower

    @classmethod
    def of(cls, moment: Tensor, ridge: float, device: torch.device = CPU) -> Metric:
        """Factorise C + ridge * mean(diag C) * I, on `device` where it has the room; the factor is on the CPU."""
        loaded = placed(moment, device, 3).clone()
        diagonal = loaded.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(ridge * diagonal.mean())
        return cls(torch.linalg.cholesky(loaded).cpu())

    def solve(self, keys: Tensor) -> Tensor:
        """C^-1 applied to the columns of `keys` (d_in, n)."""
        if self.cholesky is None:
            return keys
        solved = torch.cholesky_solve(_by_block(keys, self.cholesky), self.cholesky)
        return solved.reshape(keys.shape)


def _by_block(keys: Tensor, blocks: Tensor) -> Tensor:
    """Columns (d_in, n) as the blocks of a metric take them: (E, d_inner, n), or as they are for one block."""
    return keys if blocks.dim() == 2 else keys.reshape(*blocks.shape[:2], keys.shape[1])


@dataclass(frozen=True)
class Projector:
    """P = Q Q^T: the projector onto the directions that carry almost none of the keys' energy (AlphaEdit, eq. 7).

    `basis` are the columns Q, or None and `complement` those left out where they are fewer: P = I - Q' Q'^T.
    """

    basis: Tensor | None  # (d_in, r)
    complement: Tensor | None = None  # (d_in, d_in - r)

    @classmethod
    def of(cls, moment: Tensor, energy: float, device: torch.device = CPU) -> Projector:
        """Keep the directions of smallest eigenvalues that together carry `energy` (0..1) of the trace.

        They are found on `device` where it has the room, and are on the CPU.
        """
        values, vectors = (t.cpu() for t in torch.linalg.eigh(placed(moment, device, 5)))
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


@dataclass(frozen=True)
class BlockProjector:
    """A projector of experts: one for each, onto the directions that carry almost none of all keys' energy."""

    kept: Tensor  # (E, d_inner, d_inner)

    @classmethod
    def of(cls, moments: Tensor, energy: float) -> BlockProjector:
        """As Projector.of, over the spectra (E, d_inner) of all experts together."""
        values, vectors = torch.linalg.eigh(moments)
        values = values.clamp(min=0)
        order = values.flatten().argsort()
        share = values.flatten()[order].cumsum(0) / values.sum()
        kept = torch.zeros_like(share, dtype=torch.bool)
        kept[order] = share <= energy
        basis = vectors * kept.reshape(values.shape)[:, None]
        return cls(basis @ basis.transpose(1, 2))

    def solve(self, keys: Tensor) -> Tensor:
        """P applied to the columns of `keys` (d_in, n)."""
        return (self.kept @ _by_block(keys, self.kept)).reshape(keys.shape)


def projector_of(moment: Tensor, energy: float, device: torch.device = CPU) -> Projector | BlockProjector:
    """The projector of a second moment (d_in, d_in), or of experts' (E, d_inner, d_inner)."""
    if moment.dim() == 2:
        return Projector.of(moment, energy, device)
    return BlockProjector.of(moment, energy)


@dataclass(frozen=True)
class HoldingMetric:
    """A metric under which a change leaves some keys exactly as they are: M^-1 - M^-1 B (B^T M^-1 B)^-1 B^T M^-1."""

    inverse: Inverse
    held: Tensor  # (h, d_in) B^T, independent of each other

    def solve(self, keys: Tensor) -> Tensor:
        """Applied to the columns of `keys` (d_in, n)."""
        solved = self.inverse.solve(keys).double()
        across = self.inverse.solve(self.held.t().contiguous()).double()  # (d_in, h)
        gram = self.held.double() @ across
        held_off: Tensor = solved - across @ torch.linalg.solve(gram, self.held.double() @ solved)
        return held_off.to(keys.dtype)

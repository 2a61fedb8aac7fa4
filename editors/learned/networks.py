"""MEND's editing networks, which turn gradient factors into those of an edit (Mitchell et al., ICLR 2022)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from editors.constants import assumed
from editors.errors import EditError
from editors.files import read_tensors, tensor_bytes, write_atomically
from editors.learned.contrast import contrasted
from editors.learned.factors import Factors

FORMAT = "errata-mend-1"
BOUND = assumed(
    8.0,
    "standard deviations to which MEND's normalised inputs are clipped",
    "first tokens are far outliers",
)


class EditingNetwork(nn.Module):
    """The network g: two residual layers of low rank on [u; delta], shared by all weights of one shape (eq. 4).

    With the normalised input z, h = z + relu(s1 (U1 V1 z) + o1) and g = h + s2 (U2 V2 h) + o2. Each weight has its
    own scales s and offsets o. U is zero at the start: g is then the identity, and the edit is one step of
    fine-tuning.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, d_in: int, d_out: int, weights: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        d = d_in + d_out
        self.d_in = d_in
        self.register_buffer("mean", torch.zeros(weights, d))
        self.register_buffer("std", torch.ones(weights, d))
        self.v1 = nn.Parameter(torch.randn(d, rank, generator=generator) / d**0.5)
        self.u1 = nn.Parameter(torch.zeros(rank, d))
        self.v2 = nn.Parameter(torch.randn(d, rank, generator=generator) / d**0.5)
        self.u2 = nn.Parameter(torch.zeros(rank, d))
        self.scale = nn.Parameter(torch.ones(2, weights, d))
        self.offset = nn.Parameter(torch.zeros(2, weights, d))

    def forward(self, factors: Factors, weight: int) -> Factors:
        """Transform the factors (n, t, .) of the weight with this index. Padding stays zero."""
        raw = torch.cat([factors.inputs, factors.deltas], -1)
        z = ((raw - self.mean[weight]) / self.std[weight]).clamp(-BOUND, BOUND)
        # clamp instead of relu: training starts at zero, where its gradient is one
        h = z + (self.scale[0, weight] * (z @ self.v1 @ self.u1) + self.offset[0, weight]).clamp(min=0)
        g = h + self.scale[1, weight] * (h @ self.v2 @ self.u2) + self.offset[1, weight]
        inside = factors.deltas.abs().amax(-1, keepdim=True) > 0
        out = (raw + self.std[weight] * (g - z)) * inside
        return Factors(out[..., : self.d_in], out[..., self.d_in :])


@dataclass(frozen=True)
class WeightShape:
    """Name and shape of one edited weight."""

    name: str
    d_out: int
    d_in: int


class Mend(nn.Module):
    """The editing networks of some weights, one network per shape, and a learned step size per weight.

    Args:
        shapes: the weights that are edited.
        rank: rank of the networks' layers.
        seed: of the initial weights.
        contrast: number of other subjects in the same prompt off whose keys an edit is projected.
    """

    def __init__(self, shapes: Sequence[WeightShape], rank: int, seed: int = 0, contrast: int = 0) -> None:
        super().__init__()
        self.shapes, self.rank, self.contrast = list(shapes), rank, contrast
        self.groups: dict[str, list[str]] = {}
        for s in shapes:
            self.groups.setdefault(f"{s.d_out}x{s.d_in}", []).append(s.name)
        sizes = {f"{s.d_out}x{s.d_in}": (s.d_in, s.d_out) for s in shapes}
        generator = torch.Generator().manual_seed(seed)
        self.networks = nn.ModuleDict(
            {
                key: EditingNetwork(*sizes[key], len(names), rank, generator)
                for key, names in self.groups.items()
            }
        )
        self.log_steps = nn.Parameter(torch.zeros(len(shapes)))

    @property
    def parameters_edited(self) -> list[str]:
        """Names of the edited weights."""
        return [s.name for s in self.shapes]

    def network_of(self, name: str) -> tuple[EditingNetwork, int]:
        """The network of a weight and its index among those that share it."""
        key, names = next((k, n) for k, n in self.groups.items() if name in n)
        network = self.networks[key]
        assert isinstance(network, EditingNetwork)
        return network, names.index(name)

    def normalise(self, seen: Mapping[str, Sequence[Factors]]) -> None:
        """Compute the normalisation from the factors of training edits, without their first tokens."""
        for name, parts in seen.items():
            network, i = self.network_of(name)
            rows = torch.cat([torch.cat([f.inputs, f.deltas], -1)[:, 1:].flatten(0, 1) for f in parts])
            rows = rows[rows[:, network.d_in :].abs().amax(-1) > 0]
            network.mean[i], std = rows.mean(0), rows.std(0)
            network.std[i] = std.clamp(min=float(std.mean()) * 1e-3 + 1e-12)

    def forward(
        self, factors: Mapping[str, Factors], others: Mapping[str, Tensor] | None = None
    ) -> dict[str, Factors]:
        """The change of each weight, dW = sum_t deltas_t inputs_t^T. The deltas include the step size.

        Args:
            factors: the gradient factors of n edits, per weight.
            others: per weight the keys (n, m, d_in) at which the change should not act (see `contrasted`).
        """
        changes = {}
        for i, shape in enumerate(self.shapes):
            network, at = self.network_of(shape.name)
            transformed: Factors = network(factors[shape.name], at)
            inputs = transformed.inputs
            if others is not None:
                inputs = contrasted(inputs, factors[shape.name].inputs, others[shape.name])
            changes[shape.name] = Factors(inputs, -self.log_steps[i].exp() * transformed.deltas)
        return changes

    def save(self, path: Path, model_hash: str, notes: Mapping[str, Any]) -> None:
        """Write a safetensors file. It replaces an earlier one in one step."""
        metadata = {
            "format": FORMAT,
            "model": model_hash,
            "rank": str(self.rank),
            "contrast": str(self.contrast),
            "shapes": json.dumps([vars(s) for s in self.shapes]),
            "notes": json.dumps(dict(notes), sort_keys=True),
        }
        write_atomically(path, tensor_bytes(self.state_dict(), metadata))

    @classmethod
    def load(cls, path: Path) -> tuple[Mend, dict[str, Any]]:
        """Trained networks and their notes. Raises EditError when the file does not hold them."""
        try:
            tensors, metadata = read_tensors(path.read_bytes())
            if metadata["format"] != FORMAT:
                raise ValueError(f"its format is {metadata['format']!r}")
            shapes = [WeightShape(**s) for s in json.loads(metadata["shapes"])]
            mend = cls(shapes, int(metadata["rank"]), contrast=int(metadata.get("contrast", 0)))
            mend.load_state_dict(tensors)
            notes: dict[str, Any] = json.loads(metadata["notes"])
        except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise EditError(
                f"{path} is not a trained MEND editor ({error}); run train_editor again"
            ) from error
        return mend.requires_grad_(False), notes

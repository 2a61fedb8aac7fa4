"""MEND's editing networks: from raw gradient factors to those of an edit (Mitchell et al., ICLR 2022)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from editors.errors import EditError
from editors.learned.contrast import contrasted
from editors.learned.factors import Factors

FORMAT = "errata-mend-1"
BOUND = 8.0  # standard deviations a normalised input may lie off; first tokens are far outliers


class EditingNetwork(nn.Module):
    """g: two residual layers of low rank on [u; delta], shared by all weights of one shape (eq. 4).

    z is the normalised input; h = z + relu(s1 (U1 V1 z) + o1), g = h + s2 (U2 V2 h) + o2, with a scale
    and an offset for every weight. U = 0 at the start, so that g is the identity and the edit is
    one step of fine-tuning.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, d_in: int, d_out: int, weights: int, rank: int) -> None:
        super().__init__()
        d = d_in + d_out
        self.d_in = d_in
        self.register_buffer("mean", torch.zeros(weights, d))
        self.register_buffer("std", torch.ones(weights, d))
        self.v1 = nn.Parameter(torch.randn(d, rank) / d**0.5)
        self.u1 = nn.Parameter(torch.zeros(rank, d))
        self.v2 = nn.Parameter(torch.randn(d, rank) / d**0.5)
        self.u2 = nn.Parameter(torch.zeros(rank, d))
        self.scale = nn.Parameter(torch.ones(2, weights, d))
        self.offset = nn.Parameter(torch.zeros(2, weights, d))

    def forward(self, factors: Factors, weight: int) -> Factors:
        """Factors (n, t, .) of the weight with this index, transformed; padding stays zero."""
        raw = torch.cat([factors.inputs, factors.deltas], -1)
        z = ((raw - self.mean[weight]) / self.std[weight]).clamp(-BOUND, BOUND)
        # clamp, not relu: its gradient at zero, where training starts, is one
        h = z + (self.scale[0, weight] * (z @ self.v1 @ self.u1) + self.offset[0, weight]).clamp(min=0)
        g = h + self.scale[1, weight] * (h @ self.v2 @ self.u2) + self.offset[1, weight]
        inside = factors.deltas.abs().amax(-1, keepdim=True) > 0
        out = (raw + self.std[weight] * (g - z)) * inside
        return Factors(out[..., : self.d_in], out[..., self.d_in :])


@dataclass(frozen=True)
class Shape:
    """One edited weight."""

    name: str
    d_out: int
    d_in: int


class Mend(nn.Module):
    """The editing networks of a set of weights, one per shape, and a learned step size per weight.

    With `contrast`, edits are projected off the keys of so many other subjects in the same prompt.
    """

    def __init__(self, shapes: Sequence[Shape], rank: int, seed: int = 0, contrast: int = 0) -> None:
        super().__init__()
        self.shapes, self.rank, self.contrast = list(shapes), rank, contrast
        self.groups: dict[str, list[str]] = {}
        for s in shapes:
            self.groups.setdefault(f"{s.d_out}x{s.d_in}", []).append(s.name)
        sizes = {f"{s.d_out}x{s.d_in}": (s.d_in, s.d_out) for s in shapes}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the CPU alone: no other was forked
            self.networks = nn.ModuleDict(
                {key: EditingNetwork(*sizes[key], len(names), rank) for key, names in self.groups.items()}
            )
        self.log_steps = nn.Parameter(torch.zeros(len(shapes)))

    @property
    def parameters_edited(self) -> list[str]:
        return [s.name for s in self.shapes]

    def place(self, name: str) -> tuple[EditingNetwork, int]:
        """The network of a weight and its index among those that share it."""
        key, names = next((k, n) for k, n in self.groups.items() if name in n)
        network = self.networks[key]
        assert isinstance(network, EditingNetwork)
        return network, names.index(name)

    def normalise(self, seen: Mapping[str, Sequence[Factors]]) -> None:
        """Set the normalisation from factors of training edits, first tokens left out."""
        for name, many in seen.items():
            network, i = self.place(name)
            rows = torch.cat([torch.cat([f.inputs, f.deltas], -1)[:, 1:].flatten(0, 1) for f in many])
            rows = rows[rows[:, network.d_in :].abs().amax(-1) > 0]
            network.mean[i], std = rows.mean(0), rows.std(0)
            network.std[i] = std.clamp(min=float(std.mean()) * 1e-3 + 1e-12)

    def forward(
        self, factors: Mapping[str, Factors], others: Mapping[str, Tensor] | None = None
    ) -> dict[str, Factors]:
        """The changes of an edit: dW = sum_t deltas_t inputs_t^T, the step size already in the deltas.

        `others` are keys (n, m, d_in) of each weight at which the change should not act (see `contrasted`).
        """
        changes = {}
        for i, shape in enumerate(self.shapes):
            network, at = self.place(shape.name)
            made: Factors = network(factors[shape.name], at)
            inputs = made.inputs
            if others is not None:
                inputs = contrasted(inputs, factors[shape.name].inputs, others[shape.name])
            changes[shape.name] = Factors(inputs, -self.log_steps[i].exp() * made.deltas)
        return changes

    def save(self, path: Path, model_hash: str, notes: Mapping[str, Any]) -> None:
        """Write to a safetensors file, replacing it in one step."""
        header = {
            "format": FORMAT,
            "model": model_hash,
            "rank": str(self.rank),
            "contrast": str(self.contrast),
            "shapes": json.dumps([vars(s) for s in self.shapes]),
            "notes": json.dumps(dict(notes), sort_keys=True),
        }
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(safetensors.torch.save(tensors, metadata=header))
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> tuple[Mend, dict[str, Any]]:
        """A trained editor and its notes. Raises EditError for a file that is none."""
        try:
            data = path.read_bytes()
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']!r}")
            shapes = [Shape(**s) for s in json.loads(header["shapes"])]
            made = cls(shapes, int(header["rank"]), contrast=int(header.get("contrast", 0)))
            made.load_state_dict(safetensors.torch.load(data))
            notes: dict[str, Any] = json.loads(header["notes"])
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            raise EditError(
                f"{path} is not a trained MEND editor ({error}); train_editor makes it anew"
            ) from error
        return made.requires_grad_(False), notes

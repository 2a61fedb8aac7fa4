"""Mixtures of experts as one linear map, so that the methods for dense MLPs edit them too.

A token's output is sum_j g_j W_j k_j over the experts that the router chose, with gates g_j and keys k_j. With the
experts' matrices side by side that is W k for W = [W_1 ... W_E] (d, E d_inner) and k = [g_1 k_1; ...; g_E k_E], zero
where an expert was not chosen. So a change delta x^T of W moves each chosen expert by its own share, as MoEEdit
(arXiv 2602.10965) wants it, and leaves the router alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from editors.errors import Unsupported

OUT = "out"  # the name of the tap in the module of the experts


class ExpertsOut(nn.Module):
    """Where the experts' joint key and output can be seen and changed by hooks, as at a linear layer. No parameters."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.out_features, self.in_features = shape

    def forward(self, keys: Tensor, output: Tensor, own: Tensor, weight: Any) -> Tensor:
        """`output` (tokens, d); what `keys` would give where a hook changed them from the `own` (tokens, E d_inner)."""
        if keys is own:
            return output
        changed: Tensor = output + (keys - own) @ weight().to(output.dtype).t()
        return changed


class StackedExperts:
    """The experts of one layer, whose matrices are stored as one tensor with three dimensions."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.count = int(module.down_proj.shape[0])
        rows, columns = module.down_proj.shape[1:]
        self.d_out, self.d_inner = (columns, rows) if module.is_transposed else (rows, columns)
        if not hasattr(module, OUT):
            module.add_module(OUT, ExpertsOut(self.shape))
            module.register_forward_hook(self._tap, with_kwargs=True)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the experts side by side."""
        return self.d_out, self.count * self.d_inner

    @property
    def device(self) -> torch.device:
        device: torch.device = self.module.down_proj.device
        return device

    def joined(self, stored: Tensor) -> Tensor:
        """The experts side by side (d, E d_inner), from the tensor as it is stored: a copy."""
        if self.module.is_transposed:  # (E, d_inner, d)
            return stored.permute(2, 0, 1).reshape(self.shape)
        return stored.permute(1, 0, 2).reshape(self.shape)

    def stacked(self, joined: Tensor) -> Tensor:
        """The inverse of `joined`."""
        each = joined.reshape(self.d_out, self.count, self.d_inner)
        return (each.permute(1, 2, 0) if self.module.is_transposed else each.permute(1, 0, 2)).contiguous()

    def keys(self, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        """Joint keys (tokens, E d_inner) of states (tokens, d) that go to experts `index` with `gates` (tokens, k)."""
        module = self.module
        parts = hidden.new_zeros(len(hidden), self.count, self.d_inner)
        for expert in range(self.count):
            tokens, place = torch.where(index == expert)
            if not len(tokens):
                continue
            up = module.gate_up_proj[expert]
            inner = hidden[tokens] @ (up if module.is_transposed else up.t())
            if module.has_bias:
                inner = inner + module.gate_up_proj_bias[expert]
            gated = module._apply_gate(inner) * gates[tokens, place, None]
            parts = parts.index_put(
                (tokens, torch.tensor(expert, device=tokens.device)), gated.to(parts.dtype)
            )
        return parts.flatten(1)

    def _tap(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        tap = getattr(module, OUT)
        if type(tap) is ExpertsOut and not (tap._forward_hooks or tap._forward_pre_hooks):
            return None
        hidden, index, gates = (*args, *kwargs.values())
        keys = self.keys(hidden, index, gates)
        tapped: Tensor = tap(keys, output, keys, lambda: self.joined(module.down_proj))
        return tapped


def refuse_other_experts(path: str, module: Any) -> None:
    """Raise Unsupported for experts whose keys cannot be read, or whose weights cannot take an exact delta."""
    weight = getattr(module, "down_proj", None)
    known = isinstance(weight, nn.Parameter) and weight.dim() == 3 and getattr(module, "has_gate", False)
    if not known or getattr(module, "has_post_expert_norm", False):
        raise Unsupported(
            f"{path} ({type(module).__name__}) does not keep its experts in a way that is known"
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:  # type: ignore[union-attr]
        raise Unsupported(
            f"the experts of this model are quantised ({weight.dtype}); load it unquantised, in bfloat16"  # type: ignore[union-attr]
        )

"""PiSSA and OLoRA adapters: loading one subtracts the adapter's first state from the base weight, as training did.

PiSSA: Meng et al., NeurIPS 2024, arXiv 2404.02948. OLoRA: Buyukakyuz 2024, arXiv 2406.01775.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from editors.errors import Unsupported
from editors.model.deltas import LowRank
from editors.model.lm import LM
from editors.patch import cpu_float

ADAPTER = "default"


def with_initial_state_taken_off(lm: LM, name: str, change: LowRank, init: str, scaling: float) -> LowRank:
    """The change that loading such an adapter makes: s B A - s B0 A0, of twice the rank.

    B0 and A0 are what the PEFT library's layer starts from on this weight, computed by that layer itself.

    Args:
        change: s B A, the trained factors.
        init: PEFT's init_lora_weights.
        scaling: s.
    """
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    if init == "olora" and lm.is_transposed(name):
        raise Unsupported(
            f"init_lora_weights='olora' on {name}, which is stored transposed, cannot be imported; save the adapter "
            "again with PEFT's path_initial_model_for_weight_conversion"
        )
    rank = change.right.shape[0]
    weight = cpu_float(lm.weight(name))
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    base.weight.data = weight.clone()
    alpha: int = scaling * rank  # type: ignore[assignment] # PEFT takes fractions, too
    kind: bool = init  # type: ignore[assignment] # a string is one of its values
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=kind)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        layer: Any = Linear(base, ADAPTER, config, r=rank, lora_alpha=alpha)
    left = cpu_float(layer.lora_B[ADAPTER].weight) * layer.scaling[ADAPTER]
    right = cpu_float(layer.lora_A[ADAPTER].weight)
    return LowRank(torch.cat([change.left, -left], 1), torch.cat([change.right, right], 0))

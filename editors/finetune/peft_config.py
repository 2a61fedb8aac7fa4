"""Which PEFT configurations can be imported, and why the others are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from editors.errors import InvalidEdit, Unsupported
from editors.finetune.peft_format import CONFIG

MAX_CONFIG = 2**20
TAKEN_OFF = ("pissa", "olora")
"""Values of init_lora_weights that subtract the adapter's first state from the base weight; loading does the same."""

_MERGE = "merge it with its own base model (PEFT's merge_and_unload), save that, and start the server with the result"
_CONVERT = (
    "save it again with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), which makes a plain "
    "LoRA of it, and import that"
)
_REFUSED_INITS = {
    "pissa_niter": "an approximate PiSSA subtracts from the base weights a part found with random numbers, "
    f"which cannot be repeated; {_CONVERT}",
    "corda": f"CorDA subtracts from the base weights a part that depends on its data; {_CONVERT}",
    "loftq": f"LoftQ replaces the base weights by quantised ones; {_MERGE}",
    "lora_ga": f"LoRA-GA subtracts from the base weights a part that depends on its data; {_CONVERT}",
}
_REFUSED_FIELDS = {
    "trainable_token_indices": "it replaces single rows of the embeddings",
    "target_parameters": "it adapts parameters of expert layers",
    "layer_replication": "it repeats layers of the model",
    "alora_invocation_tokens": "it acts only after certain tokens",
    "use_qalora": "it averages the input in groups",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between several adapters",
    "velora_config": "it compresses activations",
    "monteclora_config": "it samples its weights",
    "kasa_config": "it cuts off a part of the base weights",
    "megatron_config": "it is for sharded models",
    "ensure_weight_tying": "it trains tied embeddings and head as one",
}


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter directory. Raises InvalidEdit or Unsupported, naming what cannot be imported."""
    path = folder / CONFIG
    if not folder.is_dir() or not path.is_file() or path.is_symlink():
        raise InvalidEdit(f"{folder.name} is not a PEFT adapter directory: it has no {CONFIG}")
    try:
        config = json.loads(path.read_bytes()[: MAX_CONFIG + 1])
    except (ValueError, RecursionError) as error:
        raise InvalidEdit(f"{folder.name}/{CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", "IA3"):
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise Unsupported(
            f"{folder.name} is an adapter of type {kind!r}; only LORA (with DoRA) and IA3 can be imported. "
            f"{_MERGE[:1].upper()}{_MERGE[1:]}."
        )
    _refuse_fields(folder, config)
    return config


def _refuse_fields(folder: Path, config: Mapping[str, Any]) -> None:
    for field, why in _REFUSED_FIELDS.items():
        if config.get(field):
            raise Unsupported(
                f"{folder.name} sets {field}={str(config[field])[:80]}: {why}, which cannot be imported; {_MERGE}"
            )
    init = config.get("init_lora_weights", True)
    refused = "pissa_niter" if str(init).startswith("pissa_niter_") else init
    if isinstance(refused, str) and refused in _REFUSED_INITS:
        raise Unsupported(f"{folder.name} has init_lora_weights={init!r}: {_REFUSED_INITS[refused]}")
    known = ("gaussian", "orthogonal", "eva", "mica")  # these leave the base weights as they are
    if isinstance(init, str) and init not in known and init not in TAKEN_OFF:
        raise Unsupported(
            f"{folder.name} has init_lora_weights={init[:80]!r}, which is not known here and may change the base "
            f"weights; {_CONVERT}"
        )
    if changes_base(config) and config.get("use_dora"):
        raise Unsupported(
            f"{folder.name} has use_dora together with init_lora_weights={init!r}, which cannot be imported; {_MERGE}"
        )


def changes_base(config: Mapping[str, Any]) -> bool:
    """True if loading subtracts the adapter's first state from the base weights (PiSSA, OLoRA)."""
    return config.get("init_lora_weights", True) in TAKEN_OFF

"""Quantised weights: made by bitsandbytes while a model loads, or stored so in the model's files."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from server.errors import ModelUnavailable

EXTRA = "quantize"  # of the package, which brings bitsandbytes

_PACKAGES: dict[str, tuple[str, str] | None] = {
    "bitsandbytes": ("bitsandbytes", f"errata-mcp[{EXTRA}]"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "awq": ("gptqmodel", "gptqmodel"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "torchao": ("torchao", "torchao"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "hqq": ("hqq", "hqq"),
    "aqlm": ("aqlm", "aqlm[cpu]"),
    "auto-round": ("auto_round", "auto-round"),
    "fp8": None,
}
"""How a model says it is quantised -> the module that computes with it, and what to install for it."""


def config_for(path: Path, config: Any, wanted: str, dtype: Any) -> dict[str, Any]:
    """Extra arguments for `from_pretrained`; empty for a model that loads as it is stored.

    Raises ModelUnavailable for a package that is missing, a way of quantising that is not known, or a model that is
    to be quantised though it is.
    """
    if own := _own(config):
        _check_own(path, own, wanted)
        return {}
    if wanted == "none":
        return {}
    _need(f"--quantize {wanted}", _PACKAGES["bitsandbytes"])
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it warns of faster kernels that it does not have
    from transformers import BitsAndBytesConfig

    if wanted == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    }


def is_quantised(config: Any, wanted: str) -> bool:
    """True where the weights will be quantised once loaded."""
    return wanted != "none" or _own(config) is not None


def _own(config: Any) -> str | None:
    """How the stored model is quantised, as transformers calls it; None if it is not."""
    own = getattr(config, "quantization_config", None)
    if own is None:
        own = getattr(config.get_text_config(), "quantization_config", None)
    if own is None:
        return None
    fields = own if isinstance(own, dict) else own.to_dict()
    method = fields.get("quant_method") or ("bitsandbytes" if fields.get("load_in_4bit") else "unknown")
    return str(getattr(method, "value", method))


def _check_own(path: Path, method: str, wanted: str) -> None:
    if wanted != "none":
        raise ModelUnavailable(
            f"{path} is quantised already ({method}); leave out --quantize {wanted}, or give the unquantised model"
        )
    if method not in _PACKAGES:
        raise ModelUnavailable(
            f"{path} is quantised with {method}, which is not known here; known are {', '.join(_PACKAGES)}. Use "
            "the unquantised model, with --quantize nf4 where memory is short"
        )
    _need(f"{path}, which is quantised ({method}),", _PACKAGES[method])


def _need(what: str, needed: tuple[str, str] | None) -> None:
    if needed is None:
        return
    module, package = needed
    if not _is_installed(module):
        raise ModelUnavailable(
            f"{what} needs a package that is not installed: pip install '{package}'; or use the unquantised model "
            "as it is"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False

"""Which precision a search runs in."""

import platform

import pytest
import torch

from editors.model.lm import LM
from editors.model.precision import search_dtype
from tests.families import make, parts

CASES = [
    # oneDNN, machine, AVX-512 bf16, AMX -> searched in bfloat16
    (True, "x86_64", True, False, True),
    (True, "AMD64", False, True, True),
    (True, "x86_64", False, False, False),  # emulated
    (True, "aarch64", False, False, True),
    (False, "x86_64", True, True, False),
]


@pytest.mark.parametrize(("onednn", "machine", "avx512", "amx", "lower"), CASES)
def test_a_search_runs_in_bfloat16_only_where_the_processor_multiplies_it(
    onednn: bool, machine: str, avx512: bool, amx: bool, lower: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert search_dtype(LM(*parts("llama"), "tiny-llama")) == (torch.bfloat16 if lower else None)


def test_a_model_in_bfloat16_is_searched_as_it_is() -> None:
    assert search_dtype(make("llama", torch.bfloat16)) is None

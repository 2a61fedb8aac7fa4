"""Quantised linear layers: the weight stays as it is, and its changes act beside it, in the forward pass.

Writing a delta into a quantised weight would round it away, and quantising again would change every other number of
its block. So the edit is a side-car in float32 (as in MobiEdit, arXiv 2506.13772): y = W_q x + delta x. Taking it
away leaves the layer as it was, to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editors.errors import Unsupported
from editors.model.deltas import Delta, LowRank

CHUNK = 256  # rows of the identity that are sent through a layer at a time, to read its weight


@dataclass(frozen=True)
class _Packed:
    """All low-rank deltas as one pair of factors (d_in, r) and (r, d_out), and the sum of the others (d_in, d_out)."""

    factors: tuple[Tensor, Tensor] | None
    dense: Tensor | None


@dataclass(frozen=True)
class SideCar:
    """The change beside a quantised weight: the sum of these deltas (d_out, d_in).

    `packed` is the same as the forward pass reads it, on the device of the weight.
    """

    deltas: tuple[Delta, ...] = ()
    packed: _Packed | None = field(default=None, compare=False, repr=False)

    def with_packed(self, device: torch.device) -> SideCar:
        """The same, ready to act on a device."""
        return replace(self, packed=_packed(self.deltas, device))

    def digest(self, weight_hash: str) -> str:
        """SHA-256 of the weight with this side-car; the weight's own hash where it is empty."""
        if not self.deltas:
            return weight_hash
        total = hashlib.sha256(weight_hash.encode())
        for delta in self.deltas:
            parts = (delta.left, delta.right) if isinstance(delta, LowRank) else (delta.delta,)
            for part in parts:
                total.update(hash_tensor(part).encode())
        return total.hexdigest()


class QuantisedLinear:
    """One quantised module of a model, and the side-car that acts on it now."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.shape: tuple[int, int] = (int(module.out_features), int(module.in_features))
        self._side = SideCar()
        module.register_forward_hook(self._add)

    @property
    def side(self) -> SideCar:
        return self._side

    @side.setter
    def side(self, side: SideCar) -> None:
        """A side-car that acted before has its packed factors, so putting it back computes nothing."""
        self._side = side if side.packed or not side.deltas else side.with_packed(self.device)

    @property
    def device(self) -> torch.device:
        return next(iter(tensors_of(self.module).values())).device

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The matrix that the forward pass multiplies by (d_out, d_in), with the side-car: a new float32 tensor.

        It is read from what the layer does to the unit vectors, whatever its storage.
        """
        d_in = self.shape[1]
        columns = []
        with torch.no_grad():
            bias = self.module.forward(torch.zeros(1, d_in, dtype=dtype, device=self.device)).float()
            for start in range(0, d_in, CHUNK):
                rows = torch.zeros(min(CHUNK, d_in - start), d_in, dtype=dtype, device=self.device)
                rows[:, start : start + CHUNK].fill_diagonal_(1)
                columns.append(self.module.forward(rows).float() - bias)
        weight = torch.cat(columns).t().contiguous()
        for delta in self._side.deltas:
            delta.add_to(weight)
        return weight

    def hash(self) -> str:
        """SHA-256 over all that makes the quantised weight: packed numbers, scales, tables."""
        total = hashlib.sha256(type(self.module).__name__.encode())
        for name, tensor in sorted(tensors_of(self.module).items()):
            total.update(f"{name} {hash_tensor(tensor)}\n".encode())
        return total.hexdigest()

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        packed = self._side.packed
        if packed is None:
            return None
        x = args[0].float()
        change: Any = 0
        if packed.factors is not None:
            change = x @ packed.factors[0] @ packed.factors[1]
        if packed.dense is not None:
            change = change + x @ packed.dense
        added: Tensor = (output.float() + change).to(output.dtype)
        return added


def _packed(deltas: Sequence[Delta], device: torch.device) -> _Packed:
    """Deltas as the forward pass reads them."""
    low = [d for d in deltas if isinstance(d, LowRank)]
    factors = None
    if low:
        right = torch.cat([d.right for d in low]).t().contiguous().to(device)
        factors = right, torch.cat([d.left for d in low], 1).t().contiguous().to(device)
    dense = None
    for delta in deltas:
        if not isinstance(delta, LowRank):
            turned = delta.dense().t().to(device)
            dense = turned.clone(memory_format=torch.contiguous_format) if dense is None else dense + turned
    return _Packed(factors, dense)


_OWN = "errata_quantised_linear"


def quantised_linear(module: Any) -> QuantisedLinear:
    """The one object of a quantised module, which adds its side-car, however often a model is wrapped."""
    found: QuantisedLinear | None = getattr(module, _OWN, None)
    if found is None:
        found = QuantisedLinear(module)
        setattr(module, _OWN, found)
    return found


def is_plain(module: nn.Module) -> bool:
    """True for a linear layer whose weight holds the numbers it computes with, in 16 bits or more."""
    weight = getattr(module, "weight", None)
    if type(module) not in (nn.Linear, Conv1D) or not isinstance(weight, Tensor):
        return False
    return type(weight.data) is Tensor and weight.is_floating_point() and weight.dtype.itemsize >= 2


def quantisation(model: Any) -> str | None:
    """How a model's weights are quantised ("nf4", "int8", "gptq" ...); None where they are not."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    fields = config if isinstance(config, dict) else config.to_dict()
    if fields.get("load_in_8bit"):
        return "int8"
    if fields.get("load_in_4bit"):
        return str(fields.get("bnb_4bit_quant_type", "4bit"))
    method = fields.get("quant_method", "unknown")
    return str(getattr(method, "value", method))


def quantised_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The quantised linear modules of a model that says it is quantised, by name."""
    if quantisation(model) is None:
        return
    for name, module in model.named_modules():
        if hasattr(module, "out_features") and hasattr(module, "in_features") and not is_plain(module):
            yield name, module


def settle(model: Any) -> None:
    """Make quantised layers compute the same in every pass, with gradients that are those of their weights.

    bitsandbytes on CPUs with AVX-512 BF16 repacks a 4-bit weight at its first use, after which its gradients are wrong
    and what is saved is garbage. Its 8-bit layers round activations too and treat outliers by what else is in the
    batch; on a CPU their training mode, without dropout or anything else, multiplies by the dequantised weight.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if type(module).__name__ == "Linear8bitLt" and module.weight.device.type == "cpu":
            module.train()


def refuse_non_linear(name: str, module: Any, dtype: torch.dtype) -> None:
    """Raise Unsupported where a quantised module does not add up its inputs as a matrix would."""
    d_in = int(module.in_features)
    device = next(iter(tensors_of(module).values())).device
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 1, d_in, generator=generator).to(device, dtype)
    try:
        with torch.no_grad():
            rows = [module(x).float() for x in (one, other, one + other, torch.zeros_like(one))]
    except (RuntimeError, TypeError, ValueError, ImportError, NotImplementedError) as error:
        raise Unsupported(f"{name} cannot be computed on {device.type}: {error}") from error
    off = (rows[0] + rows[1] - rows[2] - rows[3]).norm() / rows[2].norm().clamp(min=1e-9)
    if not off < 0.1:
        raise Unsupported(
            f"{name} ({type(module).__name__}) is off by {float(off):.0%} from a linear map, so that no edit of it "
            "would hold. Load the model unquantised, in float32, bfloat16 or float16."
        )


def tensors_of(module: Any) -> dict[str, Tensor]:
    """Every plain tensor of a module's state but its bias, by name; parts of wrapped tensors one by one."""
    found: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        if name != "bias" and isinstance(value, Tensor):
            found |= _plain(name, value)
    return found


def _plain(name: str, tensor: Any) -> dict[str, Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return {name: tensor}
    inner, _ = tensor.__tensor_flatten__()
    return {k: v for part in inner for k, v in _plain(f"{name}.{part}", getattr(tensor, part)).items()}


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, dtype and shape."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest.update(flat.numpy().data)
    return digest.hexdigest()


def hashes_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of every tensor, several at a time: one by one, billions of numbers take as long as loading them."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(tensors, pool.map(hash_tensor, tensors.values()), strict=True))

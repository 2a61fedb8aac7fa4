"""A steering vector as it is stored: one unit direction per layer, and the norms that are its unit of dose."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

from torch import Tensor

from editors.errors import EditError, InvalidEdit
from editors.model.lm import LM
from editors.patch import Patch
from editors.steering.choices import Combine
from editors.steering.condition import Condition
from editors.steering.layers import check_layers
from editors.steering.stack import Dose

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_name(name: str) -> str:
    """Return the name. Raises InvalidEdit for one that is not safe as a file name."""
    if not NAME.fullmatch(name):
        raise InvalidEdit(
            f"name {name[:80]!r} cannot be used; it must be 1 to 64 letters, digits, - and _, and begin with a "
            "letter or digit"
        )
    return name


@dataclass(frozen=True)
class SteeringVector(Patch):
    """Directions in the residual stream after every layer, or a linear map on the output embeddings.

    Attributes:
        layers: the layers that it acts after by default.
        directions: unit vectors (layers, d_model).
        norms: mean hidden norm of each layer (layers,), the unit of a multiplier.
        left, right: the map (d_model, rank) and (rank, d_model) of a vector of method lm_steer, which has no
            directions. It is scaled so that a multiplier of 1 shifts the final hidden state by its own length
            on average.
    """

    kind: ClassVar[str] = "steering_vector"
    method: str
    layers: tuple[int, ...]
    directions: Tensor
    norms: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        parts = {"directions": self.directions, "norms": self.norms}
        if self.left is not None and self.right is not None:
            parts |= {"left": self.left, "right": self.right}
        return parts

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], extra: dict[str, Tensor], info: dict[str, Any]) -> Self:
        try:
            return cls(
                method=info["method"],
                layers=tuple(info["layers"]),
                directions=tensors["directions"],
                norms=tensors["norms"],
                left=tensors.get("left"),
                right=tensors.get("right"),
                extra=extra,
                info=info,
            )
        except (KeyError, TypeError) as error:
            raise EditError(f"this steering vector file is incomplete: {error}") from None

    @contextmanager
    def apply(
        self, lm: LM, multiplier: float, *, combine: Combine = "add", prompt_tokens: bool = True
    ) -> Iterator[None]:
        """Steer the model inside the `with` block. Afterwards it is as before, bit for bit.

        Args:
            multiplier: strength in mean hidden norms. 0.1 to 0.3 is usual, a negative one steers the
                other way, 0 does nothing.
            combine: the rule for several vectors; see editors.steering.stack.
            prompt_tokens: False: of the prompt, only the last token is steered.

        Raises:
            InvalidEdit: for a rule that the method does not allow.
        """
        if multiplier == 0:
            yield
            return
        dose = dose_of(str(self.info.get("name", "vector")), self, multiplier, combine, prompt_tokens)
        detach = dose.attach(lm)
        try:
            yield
        finally:
            detach()

    def at_layers(self, layers: Sequence[int] | None, n_layers: int) -> Self:
        """The vector, acting after `layers` (None: its own). Raises InvalidEdit for layers that do not exist."""
        if layers is None:
            return self
        if self.is_map:
            raise InvalidEdit(
                f"{self.method} acts on the output embeddings and has no layers; leave layers out"
            )
        return replace(self, layers=check_layers(n_layers, layers))

    @property
    def is_map(self) -> bool:
        """Whether it acts on the output embeddings instead of the residual stream."""
        return self.left is not None


def new_vector(
    method: str,
    layers: tuple[int, ...],
    directions: Tensor,
    norms: Tensor,
    info: Mapping[str, Any],
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> SteeringVector:
    """A vector whose `info` has what `from_parts` reads."""
    full_info = {**info, "method": method, "layers": list(layers)}
    return SteeringVector(
        method=method,
        layers=layers,
        directions=directions,
        norms=norms,
        left=left,
        right=right,
        info=full_info,
    )


def control_vectors(vector: SteeringVector, multiplier: float) -> dict[int, Tensor]:
    """The tensor (d_model,) that is added after each of the vector's layers at this multiplier.

    Raises InvalidEdit for a vector that acts on the output embeddings.
    """
    if vector.is_map:
        raise InvalidEdit(
            f"a vector of method {vector.method} is a linear map on the output embeddings; the control-vector form "
            "holds only vectors of the residual stream"
        )
    share = multiplier * share_of(len(vector.layers))
    return {layer: share * vector.norms[layer] * vector.directions[layer] for layer in vector.layers}


def share_of(count: int) -> float:
    """The share of a dose for each of `count` layers, so that a multiplier is as strong on many layers as on one."""
    return 1.0 / math.sqrt(count)


def dose_of(
    name: str, vector: SteeringVector, multiplier: float, combine: Combine = "add", prompt: bool = True
) -> Dose:
    """A vector at a multiplier (not 0). Raises InvalidEdit for a rule that its method does not allow."""
    if combine not in get_args(Combine):
        raise InvalidEdit(f"combine {combine!r} is not known; it is one of {', '.join(get_args(Combine))}")
    info = {
        "name": name,
        "multiplier": multiplier,
        "combine": combine,
        "prompt": prompt,
        "method": vector.method,
        "layers": list(vector.layers),
    }
    if vector.left is not None:
        if combine != "add":
            raise InvalidEdit(
                f"combine {combine!r} is for vectors; {vector.method} gives a linear map, for which combine is 'add'"
            )
        left = (multiplier * vector.left).contiguous()
        return Dose(name, multiplier, combine, prompt, {}, left, vector.right, info=info)
    return Dose(name, multiplier, combine, prompt, control_vectors(vector, multiplier), info=info)


def on_condition(
    dose: Dose, name: str, probe: SteeringVector, above: float, layer: int | None = None
) -> Dose:
    """The dose, at tokens alone whose state after a layer has a cosine above `above` with the probe's direction there.

    The layer is by default the first that the dose acts after, or the last before it where the probe has a direction.
    Raises InvalidEdit for a probe without directions, a layer that lies behind the dose's, a rule other than add, and a
    threshold that is no cosine.
    """
    if probe.is_map or not dose.added:
        raise InvalidEdit("a condition takes vectors of the residual stream; lm_steer and ablation have none")
    if dose.combine != "add":
        raise InvalidEdit(
            f"a dose with a condition is added apart from the others, so combine is 'add', not {dose.combine!r}"
        )
    if not -1 < above < 1:
        raise InvalidEdit(f"when.above is {above:g}; it is a cosine, between -1 and 1")
    begins = min(dose.added)
    has = [n for n, one in enumerate(probe.directions) if float(one.norm()) > 0]
    chosen = max([n for n in has if n <= begins], default=begins) if layer is None else layer
    if not 0 <= chosen <= begins:
        raise InvalidEdit(
            f"when.layer is {chosen}; the condition must be known where the dose begins, after layer {begins}: name "
            f"one from 0 to {begins}, or steer later layers"
        )
    if chosen not in has:
        raise InvalidEdit(
            f"the vector {name!r} has no direction at layer {chosen} but at {has}, and the dose acts from layer "
            f"{begins} on; name one of them up to there as when.layer, or steer later layers"
        )
    direction = probe.directions[chosen]
    unit = (direction / direction.norm()).float().contiguous()
    info = {**dose.info, "condition": {"vector": name, "layer": chosen, "above": above}}
    return replace(dose, condition=Condition(chosen, unit, above), info=info)


def ablation_of(name: str, vector: SteeringVector, layer: int | None = None) -> Dose:
    """The direction of one layer (by default the middle one of the vector's own), taken out of every state.

    h -> h - d dᵀ h after the embeddings and every layer (directional ablation, Arditi et al. 2024, arXiv 2406.11717,
    eq. 4). Raises InvalidEdit for a vector without directions and for a layer where it is zero.
    """
    if vector.is_map:
        raise InvalidEdit(f"{vector.method} is a map on the output embeddings and has no direction to ablate")
    chosen = vector.layers[len(vector.layers) // 2] if layer is None else layer
    direction = vector.directions[chosen]
    if not float(direction.norm()) > 0:
        raise InvalidEdit(
            f"the vector {name!r} has no direction at layer {chosen}; it has {list(vector.layers)}"
        )
    info = {
        "name": name,
        "multiplier": 1.0,
        "combine": "add",
        "prompt": True,
        "method": vector.method,
        "layers": [chosen],
        "mode": "ablate",
    }
    unit = (direction / direction.norm()).contiguous()
    return Dose(name, 1.0, "add", True, {}, ablated=unit, info=info)


def export_gguf(vector: SteeringVector, multiplier: float, path: Path, architecture: str) -> None:
    """Write a GGUF control vector for llama.cpp and repeng, where `direction.N` is added after layer N.

    Raises InvalidEdit for a vector that acts after layer 0: the format has no direction.0.
    """
    import gguf

    added = control_vectors(vector, multiplier)
    if 0 in added:
        raise InvalidEdit("the control-vector form has no layer 0; create the vector with later layers")
    writer = gguf.GGUFWriter(path, "controlvector")
    try:
        writer.add_string("controlvector.model_hint", architecture)
        writer.add_uint32("controlvector.layer_count", len(added))
        for layer, value in added.items():
            writer.add_tensor(f"direction.{layer}", value.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()

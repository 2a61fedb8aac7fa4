"""The parameters that all fine-tuning methods share, and the layers that they name."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from editors.advice import Remedy
from editors.constants import assumed, limit
from editors.errors import InvalidEdit
from editors.finetune.examples import ExampleOptions
from editors.method import Params
from editors.model.lm import LM

STRONGER = (
    Remedy("max_steps", "trains longer", factor=2.0, limit=160),
    Remedy("contexts", "trains on the prompt in more templates", value=6),
    Remedy("stop_probability", "stops later, when the target is more probable", value=0.99),
)


GENTLER = (
    Remedy("keep_weight", "preserves other predictions more strongly", factor=2.0, limit=8.0, start=1.0),
    Remedy("others", "preserves the answers for more other subjects", value=12),
)
EARLY = assumed(
    (0.15,),
    "depth of the layer that ft, lora and wise train, and that a memory is taught to",
    "close to rome's default layer; in early layers a subject's key is much the same in every wording",
)


class TrainParams(Params):
    """Parameters that all fine-tuning methods share."""

    layers: tuple[int, ...] | None = Field(
        None, min_length=1, max_length=200, description="Layers whose MLP output projection is adapted."
    )
    max_steps: int = Field(
        limit(
            40,
            "most steps of fine-tuning",
            "time: then the change stays as it is, and the report says what it achieves; mostly it stops before",
        ),
        ge=1,
        le=1000,
        description="Most optimisation steps; it stops early.",
    )
    lr: float = Field(1e-2, gt=0, le=10, description="Adam's step size.")
    stop_probability: float = Field(
        assumed(0.95, "target probability at which fine-tuning stops"),
        gt=0,
        lt=1,
        description="Stop once every prompt is answered greedily with the target, with this mean probability.",
    )
    contexts: int = Field(
        assumed(4, "templates that fine-tuning puts the prompt in"),
        ge=1,
        le=6,
        description="Templates the prompt is put in; the first is the plain prompt.",
    )
    others: int = Field(
        assumed(4, "other subjects whose answers fine-tuning preserves"),
        ge=0,
        le=12,
        description="Other subjects put in the prompt; their answers are preserved.",
    )
    keep_weight: float = Field(
        assumed(1.0, "weight of the KL divergence of preserved predictions"),
        ge=0,
        le=1000,
        description="Weight of the preserved predictions in the loss: KL(before || after).",
    )
    use_probes: bool = Field(
        True,
        description="Also learn from the edit's own paraphrases and neighbours. Those are then left out of generality "
        "and locality. False: train without them and measure with them.",
    )
    seed: int = Field(0, ge=0, le=2**31, description="Seed of the adapter's initial values.")
    rough: bool = Field(
        True, description="Train in bfloat16 where the processor is faster for it; the patch stays float32."
    )

    @property
    def example_options(self) -> ExampleOptions:
        return ExampleOptions(self.contexts, self.others, self.use_probes)


def resolve_layers(lm: LM, params: TrainParams, depths: Sequence[float]) -> tuple[int, ...]:
    """`params.layers` in ascending order, or the layers at these depths (0 to 1). Raises InvalidEdit."""
    if params.layers is None:
        return tuple(sorted({min(lm.n_layers - 1, round(d * lm.n_layers)) for d in depths}))
    for layer in params.layers:
        if not 0 <= layer < lm.n_layers:
            raise InvalidEdit(f"params.layers has {layer}; this model has layers 0 to {lm.n_layers - 1}")
    return tuple(sorted(set(params.layers)))


def last_trained(params: TrainParams) -> int | None:
    """The layer above which training may run in a lower precision; None where it must not."""
    assert params.layers is not None
    return max(params.layers) if params.rough else None

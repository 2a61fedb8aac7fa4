"""The parameters of the search for a target value."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from editors.advice import Remedy
from editors.constants import TWO_MODELS, assumed, published, tuned
from editors.model.lm import LM


class ValueParams(BaseModel):
    """Parameters of the search for a target value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contexts: int = Field(
        assumed(
            2,
            "templates the prompt is put into",
            "each makes a step slower; the code of ROME samples some twenty from the model",
        ),
        ge=1,
        le=5,
        description="Templates the prompt is put into.",
    )
    chat: bool = Field(
        False,
        description="Also put the prompt into a chat answer, where the model has a chat template. On the default "
        "model questions are answered as well without it, and it costs half as much again.",
    )
    wordings: int = Field(
        assumed(
            4,
            "other words before the subject, after which its key is mapped to the value too",
            "they take one forward pass together; no comparison of numbers is known",
        ),
        ge=0,
        le=5,
        description="Other words after which the subject's key is mapped to the value too.",
    )
    forms: bool = Field(
        False,
        description="Learn other wordings too, and hold the subject's other facts, both from the shipped data. Some "
        "ten times slower.",
    )
    max_steps: int = Field(
        published(
            25,
            "most steps of the search for a target value",
            "v_num_grad_steps for GPT-J in the code of MEMIT; it mostly stops before",
        ),
        ge=1,
        le=500,
        description="Most optimisation steps; it stops early.",
    )
    lr: float = Field(
        tuned(
            3.0,
            "Adam's step size in the search for a target value",
            models=TWO_MODELS,
            command="python -m benchmarks.constants editors.closed_form.value_params.ValueParams.lr --values 1 6 -n 8",
            figure="said / reworded / chat / neighbours / the subject's other facts, perplexity: 3 1.0 / .71 / .88 / "
            "1.0 / .64, x1.030; 1 .88 / .71 / .75 / .95 / .66, "
            "x1.042; 6 1.0 / .71 / 1.0 / .98 / .64, x1.053; on the second model (n 6) no difference but in chat: .33 "
            "with 3 and 1, .50 with 6; the code of ROME takes 0.5",
        ),
        gt=0,
        le=10,
        description="Adam's step size.",
    )
    stop_probability: float = Field(
        tuned(
            0.98,
            "target probability at which ROME's search stops",
            models=TWO_MODELS,
            command="python -m benchmarks.constants editors.closed_form.value_params.ValueParams.stop_probability "
            "--values 0.9 0.995 -n 6",
            figure="reworded / chat / neighbours / the subject's other facts, perplexity (worst), CPU s an edit, first "
            "model: 0.98 .72 / 1.0 / .97 / .33, x1.036 (1.21), 3.7; 0.9 .83 / .83 / .93 / .40, x1.034 (1.19), 2.0; "
            "0.995 .72 / .83 / 1.0 / .42, x1.089 (1.53), 5.2; second: 0.98 .61 / .33 / .93 / .61, x1.014 (1.09), 2.7; "
            "0.9 .67 / .33 / .93 / .23, x1.011 (1.07), 1.9; 0.995 .67 / .50 / .93 / .66, x1.018 (1.12), 3.9",
        ),
        gt=0,
        lt=1,
        description="Stop once the target's mean probability over the contexts is this. More generalises better, and "
        "takes longer.",
    )
    clamp: float = Field(
        tuned(
            5.0,
            "bound on |delta|, in units of |value|",
            models=TWO_MODELS,
            command="python -m benchmarks.constants editors.closed_form.value_params.ValueParams.clamp --values 3 8",
            figure="reworded / chat / neighbours / the subject's other facts, perplexity, of ten facts: 5 .67 / .90 / "
            "1.0 / .55, x1.026; 3 .73 / .70 / 1.0 / .61, x1.033; 8 .73 / .90 / .94 / .55, x1.035; second model "
            "(n 6), to which a clamp that is left out is fitted: fitted .61 / .33 / .93 / .61, x1.014; 5 .72 / .33 / "
            ".47 / .14, x1.101; 3 .72 / .33 / .60 / .14, x1.045; 8 .72 / .67 / .33 / .14, x1.253; the code of ROME "
            "takes 4",
        ),
        gt=0,
        le=100,
        description="Bound on |delta|, in units of |value|; if left out, less where a norm after the MLP lets the "
        "residual stream follow the value only so far.",
    )
    kl_weight: float = Field(
        published(0.0625, "weight of the essence term", "kl_factor in the code of Meng et al., NeurIPS 2022"),
        ge=0,
        description="Weight of the essence term that keeps '<subject> is a'.",
    )
    rough: bool = Field(
        True, description="Search in bfloat16 where the processor is faster for it; the patch stays float32."
    )
    decay: float = Field(
        published(
            0.5, "weight of |delta| / |value|^2", "v_weight_decay in the code of Meng et al., NeurIPS 2022"
        ),
        ge=0,
        description="Weight of |delta| / |value|^2.",
    )
    hold_weight: float = Field(
        assumed(
            1.0, "weight of the held facts in the search: mean KL(before || now) over their answers' tokens"
        ),
        ge=0,
        description="Weight of what the subject's other facts said before the edit, where there are such facts.",
    )
    anchor: bool = Field(
        False,
        description="Norm anchoring: scale the edited hidden state back to the norm it had, so that the norms of "
        "a long sequence of edits do not feed on each other (arXiv 2602.02543).",
    )


V = TypeVar("V", bound=ValueParams)


def fitted(lm: LM, params: V) -> V:
    """The same with a clamp that was left out lowered to what moves this model's residual stream (`value_room`)."""
    if "clamp" in params.model_fields_set:
        return params
    return params.model_copy(update={"clamp": min(params.clamp, lm.arch.value_room)})


STRONGER = (
    Remedy("clamp", "lets the value move further from the model's own", factor=1.5, limit=20.0),
    Remedy("max_steps", "searches longer", factor=2.0, limit=100),
)


GENTLER = (
    Remedy("clamp", "keeps the value nearer to the model's own", factor=0.67, limit=0.2),
    Remedy("stop_probability", "stops the search earlier", value=0.8),
)
"""What helps every method that searches for a target value (see `Editor.hint`)."""

"""The parameters that the batch methods share, and how the clamp is lowered on top of many facts."""

from __future__ import annotations

import math

from pydantic import Field

from editors.closed_form.value_params import ValueParams
from editors.constants import DEFAULT_MODEL, TWO_MODELS, assumed, published, tuned
from editors.method import Params
from editors.metric import RIDGE

MANY = assumed(
    30,
    "active earlier facts above which the clamp is lowered",
    "the clamp stays as it is for the batches of 30 that the defaults were measured with",
)


SLOPE = assumed(
    1 / 3,
    "the clamp falls with this power of the number of earlier facts",
    "many facts together then move the model less; no comparison of powers is known",
)


LEAST = assumed(
    2 / 3,
    "lowest share of the clamp that is left on top of many facts",
    f"seen once on {DEFAULT_MODEL}, command not recorded: alphaedit, 200 CounterFact facts in one batch, efficacy .92 "
    "and perplexity x1.109 at this share, .925 and x1.205 at the whole clamp",
)


class BatchParams(ValueParams, Params):
    """Parameters that the batch methods share."""

    layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="The layers the change is spread over; None: by this model's depth."
    )
    lr: float = Field(
        assumed(2.0, "Adam's step size of the batch methods"),
        gt=0,
        le=10,
        description="Adam's step size.",
    )
    clamp: float = Field(
        tuned(
            3.75,
            "bound on |delta| of the batch methods, in units of |value|; left out, it is fitted to the model",
            models=TWO_MODELS,
            command="python -m benchmarks.constants editors.closed_form.batch_params.BatchParams.clamp "
            "--values 2.5 5.5 -n 10 --together --method memit",
            figure="2.5 did at least as well on ten facts, which do not decide: reworded / chat / neighbours / the "
            "subject's other facts, perplexity, first model: 3.75 .60 / .80 / .94 / .63, x1.180; 2.5 .63 / 1.0 / .96 "
            "/ .68, x1.176; 5.5 .63 / .90 / .92 / .54, x1.230; second, not fitted: 3.75 .80 / .30 / .64 / .43, "
            "x1.579; 2.5 .73 / .40 / .80 / .57, x1.271; 5.5 .73 / .50 / .58 / .13, x2.330; fitted to it: .70 / .30 / "
            ".90 / .74, x1.051",
        ),
        gt=0,
        le=100,
        description="Bound on |delta|, in units of |value|; it decides most how far other facts of a batch move.",
    )
    soften: bool = Field(
        True,
        description="Lower the clamp, down to two thirds, on top of more than 30 active facts: each new one then "
        "moves ordinary text less, and holds less well in other wordings.",
    )
    stop_probability: float = Field(
        published(
            0.95,
            "target probability at which a batch stops",
            "the code of MEMIT (arXiv 2210.07229) stops at a loss below 0.05, which is a probability of .951",
        ),
        gt=0,
        lt=1,
        description="Stop once the target's mean probability over the contexts is this. Higher generalises "
        "better, takes longer, and moves ordinary text more.",
    )
    wordings: int = Field(
        2,
        ge=0,
        le=5,
        description="Other words before the subject, after which its key is mapped to the value too.",
    )
    hold_targets: bool = Field(
        True,
        description="Hold the keys of the targets' own tokens after the prompt still: other facts would change how "
        "the answer goes on.",
    )
    ridge: float = Field(
        RIDGE, gt=0, le=10, description="Added to the second moment, in units of its mean diagonal."
    )
    sample: str = Field("self", description="The second moment's sample: self, or a corpus computed before.")
    remember: bool = Field(
        True,
        description="Hold the keys of active earlier edits still, so that a sequence keeps what it learnt.",
    )


def softened(clamp: float, earlier: int) -> float:
    """The clamp on top of this many facts."""
    return clamp * max(LEAST, math.pow(MANY / max(MANY, earlier), SLOPE))

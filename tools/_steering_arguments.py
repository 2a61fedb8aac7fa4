"""The arguments that the steering tools share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from editors.steering.choices import Answers, Combine
from editors.steering.pairs import MAX_PAIRS, Pair

Name = Annotated[str, Field(min_length=1, max_length=64, description="The vector: letters, digits, - and _.")]


Layers = Annotated[
    list[Annotated[int, Field(ge=0)]] | None,
    Field(max_length=512, description="Layers to act after; left out: chosen by separation."),
]


Join = Annotated[
    Combine,
    Field(description="How it joins other active vectors; orthogonal: without its part along them."),
]


PromptTokens = Annotated[
    bool,
    Field(description="Steer the prompt's tokens too; false: from its last one on."),
]


Multiplier = Annotated[
    float,
    Field(
        allow_inf_nan=False,
        description="Dose in mean hidden norms: 0.1 to 0.3 is usual, negative reverses, 0 is off.",
    ),
]


Pairs = Annotated[
    list[Pair] | None,
    Field(
        max_length=MAX_PAIRS,
        description="Pairs of texts that differ in the trait.",
    ),
]


Spelled = Annotated[
    Answers,
    Field(description="texts: the answers are what (A) and (B) stand for."),
]


FilePath = Annotated[
    str | None,
    Field(
        max_length=4096,
        description="Instead of `pairs`: a .json or .jsonl file in HOME/data.",
    ),
]

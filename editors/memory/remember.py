"""Make a memory of facts: what in-context editing and constrained decoding share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from editors.constants import assumed
from editors.edit import Edit
from editors.forms.form import Material
from editors.memory.constrained_speaker import RememberedFact
from editors.memory.fact_memory import InContextPatch, embed
from editors.memory.relation_judge import fit
from editors.method import EditContext, Params
from editors.model.lm import LM

WORDINGS = assumed(
    1,
    "learned statements that are put before the edit's own sentence",
    "a small model copies better what it reads twice",
)


class MemoryParams(Params):
    """Parameters of a memory of facts."""

    facts: int = Field(2, ge=1, le=20, description="Most remembered facts put in front of one prompt.")
    min_similarity: float = Field(
        0.0,
        ge=-1,
        le=1,
        description="A prompt that names the subject gets no fact if its similarity to the edit's own prompt is lower "
        "than this (cosine of mean token embeddings).",
    )


def remember(
    lm: LM,
    edits: Sequence[Edit],
    params: MemoryParams,
    context: EditContext,
    *,
    judged: bool,
    constrained: bool,
) -> InContextPatch:
    """A memory with the facts as they were given; with `judged`, for prompts that ask their relations alone."""
    facts = []
    for i, edit in enumerate(edits):
        context.report(i / len(edits), edit.subject)
        facts.append(_fact(edit, context.materials[i] if context.materials else Material()))
    judge = fit(lm, edits, context.materials) if judged else None
    context.report(1.0, "remembered")
    embeddings = torch.stack([embed(lm, f.prompt) for f in facts])
    return InContextPatch.of(facts, embeddings, params.facts, params.min_similarity, judge, constrained)


def _fact(edit: Edit, material: Material) -> RememberedFact:
    """The fact with other sentences that say it, and the subject's names in other languages."""
    also = [f.prompt[slice(*f.span)] for f in material.learned if f.span and f.language != "en"]
    said = [
        f"{f.prompt} {f.target or edit.target}."
        for f in material.learned
        if f.language == "en"
        and f.kind in ("statement", "reworded")
        and not f.question
        and f.prompt != edit.text
    ]
    names = tuple(dict.fromkeys(name for name in also if name != edit.subject))
    return RememberedFact(edit.subject, edit.text, edit.target, names, tuple(said[:WORDINGS]))

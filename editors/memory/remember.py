"""Make a memory of facts: what in-context editing and constrained decoding share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from editors.constants import assumed
from editors.edit import Edit
from editors.forms.form import Material
from editors.forms.languages import in_language, in_languages, names_of
from editors.forms.relations import all_relations
from editors.memory.constrained_speaker import FactInLanguage, RememberedFact
from editors.memory.fact_memory import InContextPatch, embed
from editors.memory.relation_judge import fit
from editors.method import EditContext, Params
from editors.model.lm import LM
from editors.patch import with_training

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
    patch = InContextPatch.of(facts, embeddings, params.facts, params.min_similarity, judge, constrained)
    given = [m.learned_of(e.paraphrases) for e, m in zip(edits, context.materials, strict=False)]
    return with_training(patch, given) if judged and any(given) else patch


def _fact(edit: Edit, material: Material) -> RememberedFact:
    """The fact with other sentences that say it, and as it is said in other languages."""
    said = [
        f"{f.prompt} {f.target or edit.target}."
        for f in material.learned
        if f.language == "en"
        and f.kind in ("statement", "reworded")
        and not f.question
        and f.prompt != edit.text
    ]
    named = names_of(edit.subject)
    named |= {"genitive": f"{named['de']}s"} if "de" in named else {}
    names = dict.fromkeys(name for name in named.values() if name != edit.subject)
    relation = next((r for r in all_relations() if r.name == material.relation), None)
    statements = [] if relation is None else in_languages(relation, edit.subject, 0)
    languages = [
        FactInLanguage(f.language, f.filled.text, in_language(edit.target, f.language)) for f in statements
    ]
    return RememberedFact(
        edit.subject, edit.text, edit.target, tuple(names), tuple(said[:WORDINGS]), tuple(languages)
    )

"""In-context editing: the remembered fact is put in front of the prompts it is about (IKE; Zheng et al., EMNLP 2023).

No weight changes and nothing is trained. A prompt that names the subject of a remembered fact gets the
fact in front of it. Every other prompt goes to the model as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from editors.advice import Remedy
from editors.edit import Edit
from editors.memory.fact_memory import InContextPatch, RememberedFact, embed
from editors.method import EditContext, Editor, Params
from editors.model.lm import LM
from editors.patch import Patch


class InContextParams(Params):
    """Parameters of in-context editing."""

    facts: int = Field(2, ge=1, le=20, description="Most remembered facts put in front of one prompt.")
    min_similarity: float = Field(
        0.0,
        ge=-1,
        le=1,
        description="A prompt that names the subject gets no fact if its similarity to the edit's own prompt is lower "
        "than this (cosine of mean token embeddings).",
    )


class InContext(Editor[InContextParams]):
    name = "in_context"
    family = "memory"
    title = "In-context editing (IKE)"
    description = (
        "Remembers the fact as text and puts it in front of every prompt that names its subject, through the chat "
        "template for questions. Nothing is trained and no weight changes."
    )
    source = "Zheng et al., EMNLP 2023, arXiv 2305.12740"
    when = "When weights must not change and prompts are short; it works with any long answer, and forgets nothing."
    cost = "Nothing to compute; each prompt about a remembered subject becomes a sentence longer."
    kind = "memory"
    long_answers = True
    stronger = (Remedy("min_similarity", "answers every prompt that names the subject", value=-1.0),)
    gentler = (Remedy("facts", "puts only the nearest fact in front of a prompt", value=1),)
    params = InContextParams

    def compute(self, lm: LM, edits: Sequence[Edit], params: InContextParams, context: EditContext) -> Patch:
        """A memory with the facts as they were given."""
        facts = []
        for i, edit in enumerate(edits):
            context.report(i / len(edits), edit.subject)
            facts.append(RememberedFact(edit.subject, edit.text, edit.target))
        context.report(1.0, "remembered")
        embeddings = torch.stack([embed(lm, f.prompt) for f in facts])
        return InContextPatch.of(facts, embeddings, params.facts, params.min_similarity)

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """A memory with these facts only."""
        assert isinstance(patch, InContextPatch)
        facts = [patch.facts[i] for i in rows]
        embeddings = patch.embeddings[list(rows)].contiguous()
        return InContextPatch.of(facts, embeddings, patch.most, patch.min_similarity)

"""In-context editing: the remembered fact is put in front of the prompts it is about (IKE; Zheng et al., EMNLP 2023).

No weight changes and nothing is trained. A prompt that asks a remembered fact gets the fact in front of it. Every
other prompt goes to the model as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from editors.advice import Advice, Evidence, Problem, Remedy
from editors.edit import Edit
from editors.memory.fact_memory import InContextPatch
from editors.memory.reach import advised_reach
from editors.memory.remember import MemoryParams, remember
from editors.method import EditContext, Editor
from editors.model.lm import LM
from editors.patch import Patch


class InContextParams(MemoryParams):
    """Parameters of in-context editing."""

    judge: bool = Field(
        True,
        description="Only prompts that ask the fact's own relation get it. false: every prompt that names the subject.",
    )


class InContext(Editor[InContextParams]):
    name = "in_context"
    family = "memory"
    title = "In-context editing (IKE)"
    description = (
        "Remembers the fact as text and puts it in front of every prompt that asks it, through the chat template for "
        "questions. Nothing is trained and no weight changes."
    )
    source = "Zheng et al., EMNLP 2023, arXiv 2305.12740"
    when = "The retrieval baseline: weights must not change, and the model may word the answer as it likes."
    cost = "A few states to read; each prompt about a remembered fact becomes a few sentences longer."
    kind = "memory"
    long_answers = True
    holds_others = False
    stronger = (
        Remedy("judge", "gives the fact to every prompt that names the subject", value=False, widens=True),
    )
    gentler = (Remedy("min_similarity", "answers only prompts in words that are more alike", value=0.8),)
    params = InContextParams

    def compute(self, lm: LM, edits: Sequence[Edit], params: InContextParams, context: EditContext) -> Patch:
        """A memory with the facts as they were given."""
        return remember(lm, edits, params, context, judged=params.judge, constrained=False)

    def fitted(self, lm: LM, params: InContextParams, problem: Problem, evidence: Evidence) -> Advice | None:
        """The similarity that fits the prompts, or every prompt that names the subject."""
        reach = advised_reach(lm, params.min_similarity, problem, evidence)
        if reach is None and problem == "too_weak" and params.judge:
            return None
        return reach or self.no_advice()

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """A memory with these facts only."""
        assert isinstance(patch, InContextPatch)
        return patch.select(rows)

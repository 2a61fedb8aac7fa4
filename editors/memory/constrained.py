"""Constrained decoding: answers about a remembered fact must say it (DeepEdit; Wang et al. 2024, arXiv 2401.10471)."""

from __future__ import annotations

from collections.abc import Sequence

from editors.advice import Advice, Evidence, Problem, Remedy
from editors.edit import Edit
from editors.memory.fact_memory import InContextPatch
from editors.memory.reach import advised_reach
from editors.memory.remember import MemoryParams, remember
from editors.method import EditContext, Editor
from editors.model.lm import LM
from editors.patch import Patch


class Constrained(Editor[MemoryParams]):
    name = "constrained"
    family = "memory"
    title = "Memory with constrained decoding (DeepEdit)"
    description = (
        "Remembers the fact and puts it in front of every prompt that asks it; an answer that still does not say it is "
        "made to begin with it. Every other prompt, the subject's other facts too, goes to the model as it is."
    )
    source = "Wang et al. 2024, arXiv 2401.10471"
    when = (
        "When a fact must hold in every wording, in chat and in other languages, nothing else may change, and "
        "the edit need not be exported as weights; any length of answer, any number of facts of one subject."
    )
    cost = "As in_context; a prompt whose answer has to be mended is answered twice."
    kind = "memory"
    long_answers = True
    holds_others = False
    stronger = (
        Remedy("min_similarity", "answers prompts in words that are less alike", value=-1.0, widens=True),
    )
    gentler = (Remedy("min_similarity", "answers only prompts in words that are more alike", value=0.8),)
    params = MemoryParams

    def compute(self, lm: LM, edits: Sequence[Edit], params: MemoryParams, context: EditContext) -> Patch:
        """A memory with the facts as they were given."""
        return remember(lm, edits, params, context, judged=True, constrained=True)

    def fitted(self, lm: LM, params: MemoryParams, problem: Problem, evidence: Evidence) -> Advice | None:
        """The similarity that fits the prompts."""
        reach = advised_reach(lm, params.min_similarity, problem, evidence)
        return reach or self.no_advice()

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """A memory with these facts only."""
        assert isinstance(patch, InContextPatch)
        return patch.select(rows)

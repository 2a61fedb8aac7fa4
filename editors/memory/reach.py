"""How far a memory of facts should reach: which similarity to require, so that it claims the right prompts only.

A memory claims a prompt that names the subject, asks the relation, and is at least `min_similarity` like the fact's own
prompt (cosine of mean token embeddings). Only the similarity can be set. A good value follows from the prompts that
were asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from editors.advice import Advice, Evidence, Problem
from editors.memory.fact_memory import embed
from editors.model.lm import LM

STEP = 100  # similarities are advised in hundredths


def advised_reach(lm: LM, min_similarity: float, problem: Problem, evidence: Evidence) -> Advice | None:
    """The similarity to require, by the prompts that were asked; None if none helps.

    Too strong: just above the prompts that the memory must not claim, if at least half of the forms that hold stay
    claimed. Too weak: just below the missed forms, if some of them lie below the present similarity.
    """
    if problem == "too_weak":
        missed = (
            []
            if evidence.unsaid
            else [s for s in _nearness(lm, evidence.missed, evidence.own) if s < min_similarity]
        )
        if not missed:
            return None
        value = max(-1.0, math.floor(min(missed) * STEP) / STEP)
        effect = (
            f"answers prompts in words that are less alike: {_forms(len(missed))} that it does not answer now"
        )
        return Advice(f"params.min_similarity={value!r} {effect}", {"min_similarity": value})
    moved = [s for s in _nearness(lm, evidence.moved, evidence.own) if s >= min_similarity]
    if not moved:
        return None
    value = (math.floor(max(moved) * STEP) + 1) / STEP
    held = _nearness(lm, evidence.held, evidence.own)
    lost = sum(s < value for s in held)
    if value >= 1 or 2 * lost > len(held):
        return None
    effect = f"leaves alone the {len(moved)} that moved and all that are less alike"
    cost = f", and {_forms(lost)} of {len(held)} that hold now" if lost else ""
    return Advice(f"params.min_similarity={value!r} {effect}{cost}", {"min_similarity": value})


def _nearness(lm: LM, prompts: Sequence[str], own: Sequence[str]) -> list[float]:
    """The similarity of each prompt to the nearest of the edits' own."""
    facts = [embed(lm, text) for text in own]
    return [max((float(embed(lm, prompt) @ fact) for fact in facts), default=-1.0) for prompt in prompts]


def _forms(count: int) -> str:
    return f"{count} form{'s' * (count != 1)}"

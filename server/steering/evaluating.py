"""Measure the effect of several doses of a vector: a score, perplexity and sample texts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from editors.constants import limit
from editors.errors import InvalidEdit
from editors.model.lm import LM, Prompt
from editors.steering.pairs import check_pairs, spelled_out
from editors.steering.scores import NEUTRAL_PROMPTS, fixed_texts, mean, perplexity, preference, text_score
from server.request_context import RequestContext
from server.steering.requests import EvaluationRequest
from server.steering.results import Evaluation, EvaluationRow, SampleTexts, ScoredText
from server.steering.steered import STRONGEST_MEASURED, SteeredModel, stack_without, texts_of
from server.steering.stored import vector_named
from server.transaction.transaction import Transaction
from server.transaction.workspace import Workspace

MAX_PROMPTS = 200
MAX_DOSES = 25
DOSES = limit(
    (-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3),
    "multipliers that evaluate_steering measures when none are given",
    "what is shown when the caller names no doses; 0.1 to 0.3 are the usual ones",
)


@dataclass(frozen=True)
class _DoseRow:
    """The measurements at one multiplier."""

    scores: list[float]
    texts: list[str]
    perplexity: float | None
    fixed: float  # perplexity of the fixed texts


def evaluate(workspace: Workspace, request: EvaluationRequest, ctx: RequestContext) -> Evaluation:
    """Measure a score, perplexity and texts at every multiplier and at 0. Changes nothing."""
    started = time.monotonic()
    vector = vector_named(workspace, request.name).at_layers(request.layers, workspace.lm.n_layers)
    doses = _doses(request.multipliers)
    _check(request)
    if request.pairs and request.answers == "texts":
        request = replace(request, pairs=spelled_out(request.pairs))
    rows: dict[float, _DoseRow] = {}
    with Transaction(workspace) as tx:
        tx.stage(stack_without(workspace, request.name))
        measure = SteeredModel(workspace, vector, request.name, request.combine, request.prompt_tokens)
        for done, dose in enumerate(doses):
            ctx.check()
            ctx.progress(done, len(doses), f"multiplier {dose:+g}")
            rows[dose] = (
                _choice(measure, request, dose)
                if request.score == "choice"
                else _texted(measure, request, dose)
            )
    table = _table(rows)
    scores = [row.score for row in table]
    return Evaluation(
        name=request.name,
        score=request.score,
        prompts=len(rows[0.0].scores),
        table=table,
        monotone=_monotone(scores),
        samples=_samples(request, rows),
        seconds=time.monotonic() - started,
        next="Choose the dose with the largest change whose perplexity_ratio and text_ratio stay near 1; "
        "set_steering switches "
        "it on.",
    )


def _doses(multipliers: Sequence[float] | None) -> list[float]:
    values = DOSES if multipliers is None else multipliers
    for value in values:
        if not math.isfinite(value) or abs(value) > STRONGEST_MEASURED:
            raise InvalidEdit(
                f"multiplier {value!r} is out of range; it must be between {-STRONGEST_MEASURED:g} "
                f"and {STRONGEST_MEASURED:g}"
            )
    doses = sorted({0.0, *(float(value) for value in values)})
    if len(doses) > MAX_DOSES:
        raise InvalidEdit(
            f"multipliers has {len(doses)} values with 0; at most {MAX_DOSES} are measured in one call"
        )
    return doses


def _check(request: EvaluationRequest) -> None:
    if request.score == "choice":
        if not request.pairs:
            raise InvalidEdit(
                "score 'choice' needs pairs (or path) of questions with a positive (matching) and a negative answer"
            )
        check_pairs(request.pairs)
        without_prompt = [i for i, pair in enumerate(request.pairs) if not pair.prompt]
        if without_prompt:
            raise InvalidEdit(f"pairs[{without_prompt[0]}] has no prompt; a choice needs the question")
        return
    if request.score == "completion" and not request.completions:
        raise InvalidEdit("score 'completion' needs completions, the answers whose probability is measured")
    if request.prompts is not None and not 0 < len(request.prompts) <= MAX_PROMPTS:
        raise InvalidEdit(
            f"prompts has {len(request.prompts)} entries; give 1 to {MAX_PROMPTS}, or leave it out"
        )
    blank = [i for i, text in enumerate(request.prompts or ()) if not text.strip()]
    if blank:
        raise InvalidEdit(f"prompts[{blank[0]}] is empty")


def _prompts(lm: LM, request: EvaluationRequest) -> list[Prompt]:
    return [lm.prompt(text, chat=request.chat) for text in (request.prompts or NEUTRAL_PROMPTS)]


def _texted(measure: SteeredModel, request: EvaluationRequest, dose: float) -> _DoseRow:
    lm = measure.lm
    prompts = _prompts(lm, request)
    with measure.at(dose):
        texts = texts_of(lm, prompts, request.max_new_tokens)
        fixed = perplexity(lm, fixed_texts(lm))
        if request.score == "completion":
            scores = _completion(lm, prompts, request.completions or ())
        elif request.score == "choice":
            raise AssertionError("a choice writes no text")
        else:
            scores = [text_score(request.score, text) for text in texts]
    return _DoseRow(scores, texts, perplexity(lm, list(zip(prompts, texts, strict=True))), fixed)


def _completion(lm: LM, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """The probability, for each prompt, that one of the completions follows."""
    scored = iter(lm.score([(p, c) for p in prompts for c in completions]))
    return [min(1.0, sum(math.exp(next(scored).logprob) for _ in completions)) for _ in prompts]


def _choice(measure: SteeredModel, request: EvaluationRequest, dose: float) -> _DoseRow:
    lm = measure.lm
    questions = [
        (lm.prompt(pair.prompt or "", chat=pair.chat), pair.positive, pair.negative)
        for pair in request.pairs or ()
    ]
    with measure.at(dose):
        scores = preference(lm, questions, per_token=request.answers == "texts")
        return _DoseRow(scores, [], None, perplexity(lm, fixed_texts(lm)))


def _table(rows: dict[float, _DoseRow]) -> list[EvaluationRow]:
    base = rows[0.0]
    return [
        EvaluationRow(
            multiplier=dose,
            score=mean(row.scores),
            change=mean(row.scores) - mean(base.scores),
            perplexity=row.perplexity,
            perplexity_ratio=row.perplexity / base.perplexity if row.perplexity and base.perplexity else None,
            text_ratio=row.fixed / base.fixed,
        )
        for dose, row in rows.items()
    ]


def _monotone(scores: Sequence[float]) -> bool:
    steps = [b - a for a, b in pairwise(scores)]
    return all(s >= 0 for s in steps) or all(s <= 0 for s in steps)


def _samples(request: EvaluationRequest, rows: dict[float, _DoseRow], shown: int = 4) -> list[SampleTexts]:
    if request.score == "choice":
        return []
    prompts = list(request.prompts or NEUTRAL_PROMPTS)[:shown]
    return [
        SampleTexts(
            prompt=prompt,
            texts=[
                ScoredText(multiplier=d, text=row.texts[i], score=row.scores[i]) for d, row in rows.items()
            ],
        )
        for i, prompt in enumerate(prompts)
    ]

"""How well an edit holds: what greedy generation says, never teacher forcing (Yang et al., ACL 2025).

reliability  the prompt is answered with the target
generality   its paraphrases are too (share)
locality     neighbours' answers state what they stated, in whatever words (share)
portability  prompts whose answers follow from the edit are answered so (share)
fluency      weighted entropy of bigrams and trigrams of generated text, bits (Zhang et al. 2018; ROME, sec. 3.4)
drift        distance of the whole model from the pristine one on fixed canary texts
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from editors.edit import Edit, find_subject, is_question
from editors.model.answer_inputs import answer_inputs, columns_of, final_states, text_row
from editors.model.lm import LM
from editors.scoring import answered_with, is_looping, same_fact, short_answer

ProbeKind = Literal["paraphrase", "neighbour", "portability"]
ANSWER_TOKENS = 6  # a completion's answer is looked for in so many tokens (more for a longer target)
CHAT_TOKENS = 24  # a chat answer may be a sentence
FLUENCY_TOKENS = 40


@dataclass(frozen=True)
class ProbeResult:
    kind: ProbeKind
    prompt: str
    expected: str
    before: str
    after: str
    held: bool
    trained: bool = False  # the edit was trained on this prompt, so that it is left out of the rate


@dataclass(frozen=True)
class Outcome:
    """The measurement of one edit; a rate is None when there was nothing to measure it with."""

    before: str
    after: str
    reliability: float
    p_target_before: float
    p_target_after: float
    probes: tuple[ProbeResult, ...]
    fluency: float | None = None
    looping: bool = False  # the answer says the same words again and again, which is never a hit

    def rate(self, kind: ProbeKind) -> float | None:
        held = [p.held for p in self.probes if p.kind == kind and not p.trained]
        return sum(held) / len(held) if held else None


@dataclass(frozen=True)
class Observation:
    """What the model says at one moment about a set of edits."""

    answers: Mapping[str, str]  # prompt -> greedy continuation
    p_target: tuple[float, ...]  # per edit
    fluency: tuple[float | None, ...]


def ask(lm: LM, prompts: Sequence[str], tokens: int) -> dict[str, str]:
    """Greedy continuations of distinct prompts, questions through the chat template."""
    unique = list(dict.fromkeys(prompts))
    chats = [p for p in unique if is_question(p)]
    plain = [p for p in unique if not is_question(p)]
    answers: dict[str, str] = {}
    for group, length in ((plain, tokens), (chats, max(tokens, CHAT_TOKENS))):
        for prompt, g in zip(
            group, lm.generate([lm.prompt(p) for p in group], length) if group else [], strict=True
        ):
            answers[prompt] = g.text.strip()
    return answers


def observe(lm: LM, edits: Sequence[Edit], *, fluency: bool = False) -> Observation:
    """Ask the model everything the edits name: prompts, paraphrases, neighbours, probes."""
    prompts = [p for e in edits for p in prompts_of(e)]
    targets = [t for e in edits for t in (e.target, *(p.answer for p in e.portability))]
    targets += [n.answer for e in edits for n in e.neighbours if n.answer]
    longest = max((len(lm.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in targets), default=1)
    answers = ask(lm, prompts, max(ANSWER_TOKENS, longest + 3))
    scores = lm.score([(lm.prompt(e.text), e.target) for e in edits])
    flow: list[float | None] = [None] * len(edits)
    if fluency:
        texts = lm.generate([lm.prompt(e.text) for e in edits], FLUENCY_TOKENS)
        flow = [ngram_entropy(lm.tokenizer(g.text, add_special_tokens=False)["input_ids"]) for g in texts]
    return Observation(answers, tuple(math.exp(s.logprob) for s in scores), tuple(flow))


def prompts_of(edit: Edit) -> list[str]:
    """Every prompt an edit is measured with, the edit's own first."""
    return [
        edit.text,
        *edit.paraphrases,
        *(n.prompt for n in edit.neighbours),
        *(p.prompt for p in edit.portability),
    ]


def outcomes(
    edits: Sequence[Edit],
    before: Observation,
    after: Observation,
    edited: Sequence[str] = (),
    trained: Sequence[Collection[str]] = (),
) -> list[Outcome]:
    """Compare two observations of the same edits.

    A neighbour that is about a subject edited in the same call, or one of `edited`, is left out of
    locality: its answer is meant to change. `trained` are, for each edit, the prompts that it was trained on
    (Editor.trained_prompts): they are marked, and left out of every rate.
    """
    subjects = {*edited, *(e.subject for e in edits)}
    results = [_outcome(edit, i, subjects, before, after) for i, edit in enumerate(edits)]
    return [_mark_trained(*each) for each in zip(results, trained, strict=True)] if trained else results


def _mark_trained(outcome: Outcome, prompts: Collection[str]) -> Outcome:
    return replace(outcome, probes=tuple(replace(p, trained=p.prompt in prompts) for p in outcome.probes))


def _outcome(edit: Edit, i: int, subjects: set[str], before: Observation, after: Observation) -> Outcome:
    probes: list[ProbeResult] = []
    for p in edit.paraphrases:
        held = answered_with(p, after.answers[p], edit.target)
        probes.append(ProbeResult("paraphrase", p, edit.target, before.answers[p], after.answers[p], held))
    for n in edit.neighbours:
        if any(_about(n.prompt, subject) for subject in subjects):
            continue
        was, now = before.answers[n.prompt], after.answers[n.prompt]
        expected = n.answer if n.answer and answered_with(n.prompt, was, n.answer) else short_answer(was)
        held = same_fact(n.prompt, was, now, n.answer)
        probes.append(ProbeResult("neighbour", n.prompt, expected, was, now, held))
    for q in edit.portability:
        held = answered_with(q.prompt, after.answers[q.prompt], q.answer)
        probes.append(
            ProbeResult(
                "portability", q.prompt, q.answer, before.answers[q.prompt], after.answers[q.prompt], held
            )
        )
    return Outcome(
        before=before.answers[edit.text],
        after=after.answers[edit.text],
        reliability=float(answered_with(edit.text, after.answers[edit.text], edit.target)),
        p_target_before=before.p_target[i],
        p_target_after=after.p_target[i],
        probes=tuple(probes),
        fluency=after.fluency[i],
        looping=is_looping(after.answers[edit.text]),
    )


def _about(prompt: str, subject: str) -> bool:
    if subject not in prompt:
        return False
    at = find_subject(prompt, subject)
    around = prompt[max(0, at - 1) : at] + prompt[at + len(subject) : at + len(subject) + 1]
    return not any(c.isalnum() for c in around)


def ngram_entropy(ids: Sequence[int]) -> float:
    """2/3 of the bigram plus 4/3 of the trigram entropy, averaged: (2 H2 / 3 + 4 H3 / 3) / 2, in bits."""
    entropies = [_entropy(Counter(zip(*(ids[k:] for k in range(n)), strict=False))) for n in (2, 3)]
    return (2 / 3 * entropies[0] + 4 / 3 * entropies[1]) / 2


def _entropy(counts: Counter[tuple[int, ...]]) -> float:
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


# --- drift -------------------------------------------------------------------------------------

# Self-written everyday texts of several kinds; fixed, so that drift is comparable over time.
CANARIES = (
    "The sun rises in the east and sets in the west.",
    "Water boils at one hundred degrees Celsius at sea level.",
    "She opened the window because the room was too warm.",
    "def add(a, b):\n    return a + b",
    "William Shakespeare wrote many plays, such as Romeo and Juliet.",
    "The capital of Norway is Oslo, and the capital of Chile is Santiago.",
    "Please send me the report before Friday afternoon.",
    "Three plus four equals seven.",
)


@dataclass(frozen=True)
class DriftResult:
    kl: float  # mean KL(pristine || live) per position, nats
    perplexity_before: float
    perplexity_after: float


class Canaries:
    """The pristine model's next-token distributions on the canary texts, recorded once."""

    def __init__(self, lm: LM) -> None:
        self._rows = [text_row(lm, lm.encode(lm.prompt(text, chat=False))[0]) for text in CANARIES]
        self._base, self._nll = self._distributions(lm)

    def drift(self, lm: LM) -> DriftResult:
        """Distance of the model as it is now from the recorded one."""
        now, nll = self._distributions(lm)
        base = self._base.float()
        kl = float((base.exp() * (base - now.float())).sum(-1).mean())
        return DriftResult(max(kl, 0.0), math.exp(self._nll), math.exp(nll))

    @torch.no_grad()
    def _distributions(self, lm: LM) -> tuple[Tensor, float]:
        """Log-probabilities (positions, vocabulary) in half precision, and mean negative log-likelihood."""
        inputs = answer_inputs(lm, self._rows)
        states = final_states(lm, inputs)[columns_of(inputs, inputs.lengths)]
        logp = lm.head(states).float().log_softmax(-1)
        answers = torch.tensor([token for _, answer in self._rows for token in answer], device=logp.device)
        return logp.half().cpu(), float(-logp.gather(1, answers[:, None]).mean())

"""How well an edit holds: what greedy generation says, never teacher forcing (Yang et al., ACL 2025).

reliability  the prompt is answered with the target
generality   its paraphrases are too (share)
locality     neighbours' answers state what they stated, in whatever words (share)
portability  prompts whose answers follow from the edit are answered so (share)
forms        the same fact in forms that the edit did not learn: reworded, in chat, in other languages (shares)
subject_locality  the subject's other facts, those not held by the edit, that are still said (share)
fluency      weighted entropy of bigrams and trigrams of generated text, bits (Zhang et al. 2018; ROME, sec. 3.4)
drift        distance of the whole model from the pristine one on fixed canary texts
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from editors.edit import Edit, find_subject, is_question
from editors.forms.form import Form, Hold, Material
from editors.model.answer_inputs import answer_inputs, columns_of, final_states, text_row
from editors.model.lm import LM, Prompt
from editors.scoring import answered_with, is_looping, same_fact, says, short_answer

ProbeKind = Literal["paraphrase", "neighbour", "portability", "form", "sibling", "hold"]
"""form: the fact as it was not learned; sibling: another fact of the subject; hold: one that the edit was to keep."""
ANSWER_TOKENS = 6  # a completion's answer is looked for in so many tokens (more for a longer target)
CHAT_TOKENS = 24  # a chat answer may be a sentence
FLUENCY_TOKENS = 40
_SENTENCE_END = re.compile(r"[.!?](\s|$)|[。！？\n]")
Asked = Form | Hold
Decided = Callable[[Any, str], bool]
"""Whether what was generated so far for a prompt or an Asked says all that is judged."""
Unchanged = Callable[[Prompt], bool]


@dataclass(frozen=True)
class ProbeResult:
    kind: ProbeKind
    prompt: str
    expected: str
    before: str  # empty for a form, which is asked after the edit only
    after: str
    held: bool
    trained: bool = False  # the edit was trained on this prompt, so that it is left out of the rate
    form: str = ""  # kind of form, or statement or chat of another fact

    @property
    def lost(self) -> bool:
        """True for what was right before and is not now."""
        return not self.held and self.kind in ("neighbour", "sibling", "hold")


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
        return _share(p.held for p in self.probes if p.kind == kind and not p.trained)

    @property
    def forms(self) -> dict[str, float]:
        """Share of each kind of form that is answered with the target; the caller's paraphrases are among them."""
        measured: dict[str, list[bool]] = {}
        for probe in self.probes:
            if probe.form and not probe.trained and probe.kind in ("form", "paraphrase"):
                measured.setdefault(probe.form, []).append(probe.held)
        return {kind: sum(held) / len(held) for kind, held in measured.items()}


@dataclass(frozen=True)
class Observation:
    """What the model says at one moment about a set of edits."""

    answers: Mapping[str, str]  # prompt -> greedy continuation
    p_target: tuple[float, ...]  # per edit
    fluency: tuple[float | None, ...]
    material: Mapping[Asked, str] = field(default_factory=dict)  # forms and other facts -> answer


def ask(lm: LM, prompts: Sequence[str], tokens: int) -> dict[str, str]:
    """Greedy continuations of distinct prompts, questions through the chat template."""
    unique = list(dict.fromkeys(prompts))
    return _generated(lm, {p: (lm.prompt(p), _length(is_question(p), tokens)) for p in unique})


def _length(chat: bool, tokens: int) -> int:
    return max(tokens, CHAT_TOKENS) if chat else tokens


K = TypeVar("K", bound=Hashable)


def _generated(
    lm: LM, wanted: Mapping[K, tuple[Prompt, int]], decided: Decided | None = None
) -> dict[K, str]:
    """Answers to prompts with their lengths, all in one run. `decided` may end an answer earlier."""
    keys = list(wanted)
    until = None if decided is None else lambda i, text: decided(keys[i], text)
    said = lm.generate([wanted[k][0] for k in keys], [wanted[k][1] for k in keys], until=until)
    return {key: g.text.strip() for key, g in zip(keys, said, strict=True)}


def _is_decided(asked: Any, text: str) -> bool:
    """Whether the answer to another fact's chat question has said the fact and ended its sentence."""
    fact = asked if isinstance(asked, Hold) else None
    if fact is None or not fact.chat or not fact.answer or not _SENTENCE_END.search(text):
        return False
    return asked_says(fact, text.strip(), fact.answer)


def _of_materials(
    lm: LM, materials: Sequence[Material], tokens: int, forms: bool
) -> dict[Asked, tuple[Prompt, int]]:
    """The measured forms, if wanted, and the subjects' other facts. `tokens`: in which the target is looked for.

    Of a fact in several forms the statement and the chat question are asked, of a held one the statement alone, unless
    the caller gave it: what an edit was to keep is asked to name what it lost, and every answer costs time.
    """
    wanted: dict[Asked, tuple[Prompt, int]] = {}
    for material in materials:
        measured = material.measured if forms else ()
        wanted |= {form: (form.in_model(lm), _length(form.chat, tokens)) for form in measured}
        facts = [fact for fact in material.siblings if not fact.question]
        facts += [
            fact for fact in material.held if not fact.question and (not fact.chat or fact.source == "caller")
        ]
        wanted |= {fact: (fact.in_model(lm), _length(fact.chat, ANSWER_TOKENS)) for fact in facts}
    return wanted


def observe(
    lm: LM,
    edits: Sequence[Edit],
    *,
    fluency: bool = False,
    materials: Sequence[Material] = (),
    forms: bool = True,
    known: Observation | None = None,
    unchanged: Unchanged | None = None,
) -> Observation:
    """Ask the model everything the edits and their materials name: prompts, probes, forms, other facts.

    Without `forms`, the measured forms are left out: before an edit nothing is judged by them. Answers of `known` are
    taken over for the prompts whose answer cannot have changed since, by `unchanged`.
    """
    own = [p for e in edits for p in (e.text, *e.paraphrases)]
    others = [prompt for e in edits for prompt in _prompts_of_others(e)]
    tokens = _room(lm, [e.target for e in edits])
    short = _room(lm, [answer for e in edits for answer in _answers_of_others(e)])
    lengths = dict.fromkeys(others, short) | dict.fromkeys(own, tokens)
    plain = {p: (lm.prompt(p), _length(is_question(p), length)) for p, length in lengths.items()}
    wanted: dict[Any, tuple[Prompt, int]] = {**plain, **_of_materials(lm, materials, tokens, forms)}
    said: dict[Any, str] = {}
    if known is not None and unchanged is not None:
        had: dict[Any, str] = dict(known.answers) | dict(known.material)
        said = {key: had[key] for key, (prompt, _) in wanted.items() if key in had and unchanged(prompt)}
    said |= _generated(lm, {k: v for k, v in wanted.items() if k not in said}, _is_decided)
    answers = {prompt: said[prompt] for prompt in plain}
    scores = lm.score([(lm.prompt(e.text), e.target) for e in edits])
    flow: list[float | None] = [None] * len(edits)
    if fluency:
        texts = lm.generate([lm.prompt(e.text) for e in edits], FLUENCY_TOKENS)
        flow = [ngram_entropy(lm.tokenizer(g.text, add_special_tokens=False)["input_ids"]) for g in texts]
    material = {asked: answer for asked, answer in said.items() if not isinstance(asked, str)}
    return Observation(answers, tuple(math.exp(s.logprob) for s in scores), tuple(flow), material)


def _prompts_of_others(edit: Edit) -> list[str]:
    return [*(n.prompt for n in edit.neighbours), *(p.prompt for p in edit.portability)]


def _answers_of_others(edit: Edit) -> list[str]:
    return [*(n.answer for n in edit.neighbours if n.answer), *(p.answer for p in edit.portability)]


def _room(lm: LM, answers: Sequence[str]) -> int:
    """Tokens in which an answer is looked for: those of the longest one and a few more."""
    longest = max((len(lm.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in answers), default=1)
    return max(ANSWER_TOKENS, longest + 3)


def outcomes(
    edits: Sequence[Edit],
    before: Observation,
    after: Observation,
    edited: Sequence[str] = (),
    trained: Sequence[Collection[str]] = (),
    materials: Sequence[Material] = (),
) -> list[Outcome]:
    """Compare two observations of the same edits.

    A neighbour that is about a subject edited in the same call, or one of `edited`, is left out of
    locality: its answer is meant to change. `trained` are, for each edit, the prompts that it was trained on
    (Editor.trained_prompts): they are marked, and left out of every rate. `materials`: one for each edit, or none.
    """
    subjects = {*edited, *(e.subject for e in edits)}
    found = materials or [Material()] * len(edits)
    results = [_outcome(edit, i, subjects, before, after, found[i]) for i, edit in enumerate(edits)]
    return [_mark_trained(*each) for each in zip(results, trained, strict=True)] if trained else results


def _mark_trained(outcome: Outcome, prompts: Collection[str]) -> Outcome:
    return replace(outcome, probes=tuple(replace(p, trained=p.prompt in prompts) for p in outcome.probes))


def _outcome(
    edit: Edit,
    i: int,
    subjects: set[str],
    before: Observation,
    after: Observation,
    material: Material,
) -> Outcome:
    probes: list[ProbeResult] = []
    for p in edit.paraphrases:
        held = answered_with(p, after.answers[p], edit.target)
        form = "chat_reworded" if is_question(p) else "reworded"
        probes.append(
            ProbeResult("paraphrase", p, edit.target, before.answers[p], after.answers[p], held, form=form)
        )
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
    probes += _form_probes(edit, material, before, after)
    probes += _fact_probes("sibling", material.siblings, before, after)
    probes += _fact_probes("hold", material.held, before, after)
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


def _form_probes(
    edit: Edit, material: Material, before: Observation, after: Observation
) -> Iterable[ProbeResult]:
    """The fact in the forms that were not learned. A form in another language may be answered in either."""
    for form in material.measured:
        was, now = before.material.get(form, ""), after.material[form]
        targets = dict.fromkeys(filter(None, (form.target, edit.target)))
        held = any(asked_says(form, now, target) for target in targets)
        yield ProbeResult("form", form.prompt, next(iter(targets)), was, now, held, form=form.kind)


def _fact_probes(
    kind: ProbeKind, facts: Sequence[Hold], before: Observation, after: Observation
) -> Iterable[ProbeResult]:
    """The subject's other facts, those that were said rightly before the edit."""
    for fact in facts:
        if fact not in before.material:
            continue
        was, now = before.material[fact], after.material[fact]
        answer = fact.answer or short_answer(was)
        if answer and asked_says(fact, was, answer):
            form = "chat" if fact.chat or fact.question else "statement"
            yield ProbeResult(
                kind, fact.prompt, answer, was, now, asked_says(fact, now, answer), kind == "hold", form
            )


def asked_says(asked: Asked, answer: str, target: str) -> bool:
    """Whether a form or fact is answered with the target: anywhere in a free chat answer, else at once."""
    return says(answer, target, anywhere=asked.chat, question=asked.prompt if asked.chat else "")


def _share(held: Iterable[bool]) -> float | None:
    values = list(held)
    return sum(values) / len(values) if values else None


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

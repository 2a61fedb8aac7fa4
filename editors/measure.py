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
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from editors.asked import Asked
from editors.edit import Edit, is_question
from editors.forms.form import Material
from editors.judged import AnswerEnds
from editors.model.lm import LM, Generation, Prompt, Score

ANSWER_TOKENS = 6  # a completion's answer is looked for in so many tokens (more for a longer target)
CHAT_TOKENS = 24  # a chat answer may be a sentence
FLUENCY_TOKENS = 40
Decided = Callable[[Any, str], bool]
"""Whether what was generated so far for a prompt or an Asked says all that is judged."""
Unchanged = Callable[[Prompt], bool]


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
    return {key: g.text.strip() for key, g in _generations(lm, wanted, decided, {}).items()}


def _generations(
    lm: LM,
    wanted: Mapping[K, tuple[Prompt, int]],
    decided: Decided | None,
    answers: Mapping[K, Sequence[str]],
) -> dict[K, Generation]:
    """The same, with the scores of answers to some of the prompts where they come with it."""
    keys = list(wanted)
    until = None if decided is None else lambda i, text: decided(keys[i], text)
    scored = {i: answers[key] for i, key in enumerate(keys) if key in answers}
    said = lm.generate(
        [wanted[k][0] for k in keys], [wanted[k][1] for k in keys], until=until, answers=scored
    )
    return dict(zip(keys, said, strict=True))


def _scores(
    lm: LM, edits: Sequence[Edit], answers: Mapping[str, Sequence[str]], said: Mapping[Any, Generation]
) -> list[Score]:
    """The scores of the edits' targets: those that came with what was said, the others by themselves."""
    found = {
        (prompt, answer): score
        for prompt, wanted in answers.items()
        if prompt in said and said[prompt].scores
        for answer, score in zip(wanted, said[prompt].scores, strict=True)
    }
    left = [(e.text, e.target) for e in edits if (e.text, e.target) not in found]
    found |= dict(zip(left, lm.score([(lm.prompt(p), t) for p, t in left]), strict=True)) if left else {}
    return [found[edit.text, edit.target] for edit in edits]


def _of_materials(
    lm: LM, materials: Sequence[Material], tokens: int, forms: bool
) -> dict[Asked, tuple[Prompt, int]]:
    """The measured forms, if wanted, and the subjects' other facts. `tokens`: in which the target is looked for.

    A fact has several forms, and every answer costs time. Of a fact that only measures, the statement and the chat
    question are asked. Of a held fact the statement is asked, and the chat question only where the caller gave it.
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
    first: bool = False,
) -> Observation:
    """Ask the model everything the edits and their materials name: prompts, probes, forms, other facts.

    Without `forms`, the measured forms are left out: before an edit nothing is judged by them. For prompts whose
    answer cannot have changed (`unchanged` says which), the answer is taken from `known`.

    An answer ends where what follows cannot change how it is judged. Of what must stay this is known if it is observed
    `first`, before an edit, or if `known` has what was said then.
    """
    tokens = _room(lm, [e.target for e in edits])
    lengths = _lengths(lm, edits)
    plain = {p: (lm.prompt(p), _length(is_question(p), length)) for p, length in lengths.items()}
    wanted: dict[Any, tuple[Prompt, int]] = {**plain, **_of_materials(lm, materials, tokens, forms)}
    said: dict[Any, str] = {}
    had: dict[Any, str] = {} if known is None else dict(known.answers) | dict(known.material)
    if unchanged is not None:
        said = {key: had[key] for key, (prompt, _) in wanted.items() if key in had and unchanged(prompt)}
    targets: dict[Any, list[str]] = {}
    for edit in edits:
        targets.setdefault(edit.text, []).append(edit.target)
    judged = AnswerEnds(edits, materials, None if first else had)
    asked = {k: v for k, v in wanted.items() if k not in said}
    new = _generations(lm, asked, judged.is_over, targets)
    said |= {key: generation.text.strip() for key, generation in new.items()}
    answers = {prompt: said[prompt] for prompt in plain}
    scores = _scores(lm, edits, targets, new)
    flow: list[float | None] = [None] * len(edits)
    if fluency:
        flow = list(fluencies(lm, [e.text for e in edits]))
    material = {asked: answer for asked, answer in said.items() if not isinstance(asked, str)}
    return Observation(answers, tuple(math.exp(s.logprob) for s in scores), tuple(flow), material)


def _lengths(lm: LM, edits: Sequence[Edit]) -> dict[str, int]:
    """Tokens in which each edit's answers are looked for, by prompt; the most where several edits have it."""
    lengths: dict[str, int] = {}
    for edit in edits:
        own, short = _room(lm, [edit.target]), _room(lm, _answers_of_others(edit))
        asked = dict.fromkeys(_prompts_of_others(edit), short)
        asked |= dict.fromkeys((edit.text, *edit.paraphrases), own)
        for prompt, room in asked.items():
            lengths[prompt] = max(room, lengths.get(prompt, 0))
    return lengths


def _prompts_of_others(edit: Edit) -> list[str]:
    return [*(n.prompt for n in edit.neighbours), *(p.prompt for p in edit.portability)]


def _answers_of_others(edit: Edit) -> list[str]:
    return [*(n.answer for n in edit.neighbours if n.answer), *(p.answer for p in edit.portability)]


def _room(lm: LM, answers: Sequence[str]) -> int:
    """Tokens in which an answer is looked for: those of the longest one and a few more."""
    longest = max((len(lm.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in answers), default=1)
    return max(ANSWER_TOKENS, longest + 3)


def fluencies(lm: LM, prompts: Sequence[str]) -> list[float]:
    """Of each prompt the entropy of what is generated for it, in bits (see `ngram_entropy`)."""
    texts = lm.generate([lm.prompt(prompt) for prompt in prompts], FLUENCY_TOKENS)
    return [ngram_entropy(lm.tokenizer(g.text, add_special_tokens=False)["input_ids"]) for g in texts]


def ngram_entropy(ids: Sequence[int]) -> float:
    """2/3 of the bigram plus 4/3 of the trigram entropy, averaged: (2 H2 / 3 + 4 H3 / 3) / 2, in bits."""
    entropies = [_entropy(Counter(zip(*(ids[k:] for k in range(n)), strict=False))) for n in (2, 3)]
    return (2 / 3 * entropies[0] + 4 / 3 * entropies[1]) / 2


def _entropy(counts: Counter[tuple[int, ...]]) -> float:
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


# --- drift -------------------------------------------------------------------------------------

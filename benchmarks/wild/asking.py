"""What a model answers to the prompts of the benchmark, and whether that is right."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.wild.facts import FORMS, Asked, WildFact
from editors.model.lm import LM
from editors.scoring import says

TOKENS, CHAT_TOKENS = 8, 32  # generated after a statement and in a chat
Key = tuple[str, bool]
Answers = Mapping[Key, str]


def ask(lm: LM, asked: Sequence[Asked]) -> Answers:
    """Greedy answers to distinct prompts, those of a chat through the chat template."""
    answers: dict[Key, str] = {}
    for chat, tokens in ((False, TOKENS), (True, CHAT_TOKENS)):
        prompts = list(dict.fromkeys(a.prompt for a in asked if a.chat == chat))
        if prompts:
            said = lm.generate([lm.prompt(p, chat=chat) for p in prompts], tokens)
            answers |= {(p, chat): g.text for p, g in zip(prompts, said, strict=True)}
    return answers


def is_right(asked: Asked, answers: Answers, right: Sequence[str] = ()) -> bool:
    """Whether one of the right answers is given: at once after a statement, asserted anywhere in a chat."""
    said = answers[asked.prompt, asked.chat]
    return any(
        says(said, r, anywhere=asked.chat, question=asked.prompt if asked.chat else "")
        for r in right or asked.right
    )


def share(asked: Sequence[Asked], answers: Answers) -> float | None:
    """Share that is right; None of nothing."""
    return statistics.fmean(is_right(a, answers) for a in asked) if asked else None


def known_before(asked: Sequence[Asked], before: Answers) -> list[Asked]:
    """Those the model answered rightly before: only they can be lost."""
    return [a for a in asked if is_right(a, before, a.before)]


def rates(fact: WildFact, before: Answers, after: Answers) -> dict[str, float | None]:
    """Every rate of one fact.

    A form is what share of its wordings is answered with the target. `language` counts where the model answered the
    true fact in that language before. Siblings and neighbours count where they were answered rightly before.
    """
    found: dict[str, float | None] = {}
    for form in FORMS:
        asked: Sequence[Asked] = fact.forms[form]
        found[form] = share(known_before(asked, before) if form == "language" else asked, after)
    for name, group in (("siblings", fact.siblings), ("neighbours", fact.neighbours)):
        for chat, suffix in ((False, "statement"), (True, "chat")):
            known = known_before([a for a in group if a.chat == chat], before)
            found[f"{name} {suffix}"] = share(known, after)
    return found


@torch.no_grad()
def perplexity(lm: LM, texts: Sequence[str]) -> float:
    """Of the texts, token by token."""
    total, count = 0.0, 0
    for text in texts:
        ids = lm.encode(lm.prompt(text, chat=False))[0]
        x = torch.tensor([ids], device=lm.device)
        logits = lm.head(lm.hidden(x, torch.ones_like(x))[0, :-1]).float()
        total += float(torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum"))
        count += len(ids) - 1
    return math.exp(total / count)


def described(fact: WildFact, before: Answers, after: Answers) -> dict[str, Any]:
    """Prompts and answers of a fact, for reading what went wrong."""
    return {
        f"{'chat' if a.chat else 'text'}: {a.prompt}": [before[a.prompt, a.chat], after[a.prompt, a.chat]]
        for a in fact.asked
    }

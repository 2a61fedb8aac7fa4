"""The patch of in-context editing: remembered facts, and a route that puts them in front of prompts.

Zheng et al., EMNLP 2023, arXiv 2305.12740.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from editors.errors import EditError
from editors.model.lm import LM, Claim, Prompt
from editors.patch import Detach, LivePatch, cpu_float

# One demonstration, then the fact: small models copy better after an example.
PLAIN = (
    "New fact: The patron of Elmstead is Mr Brown.\nPrompt: Elmstead has as its patron Mr Brown.\n\n"
    "New fact: {fact}\nPrompt: "
)
CHAT = "Take this as true: {fact} "


@dataclass(frozen=True)
class RememberedFact:
    """One remembered fact."""

    subject: str
    prompt: str
    target: str

    @property
    def sentence(self) -> str:
        end = "" if self.target.endswith((".", "!", "?")) else "."
        return f"{self.prompt} {self.target}{end}"


@dataclass(frozen=True)
class InContextPatch(LivePatch):
    """Remembered facts. While attached, they are put in front of the prompts about them."""

    kind: ClassVar[str] = "memory"
    facts: tuple[RememberedFact, ...]
    embeddings: Tensor = field(repr=False)  # (n, d_model) of the facts' prompts, of unit length
    most: int = 2
    min_similarity: float = 0.0

    def tensors(self) -> dict[str, Tensor]:
        return {"embeddings": self.embeddings}

    @classmethod
    def of(
        cls, facts: Sequence[RememberedFact], embeddings: Tensor, most: int, min_similarity: float
    ) -> InContextPatch:
        """The patch, with its facts and settings in `info`, where they are saved."""
        info = {"facts": [vars(f) for f in facts], "most": most, "min_similarity": min_similarity}
        return cls(tuple(facts), embeddings, most, min_similarity, info=info)

    @classmethod
    def from_parts(
        cls, tensors: dict[str, Tensor], extra: dict[str, Tensor], info: dict[str, Any]
    ) -> InContextPatch:
        try:
            facts = [
                RememberedFact(str(f["subject"]), str(f["prompt"]), str(f["target"])) for f in info["facts"]
            ]
            return cls.of(facts, tensors["embeddings"], int(info["most"]), float(info["min_similarity"]))
        except (KeyError, TypeError, ValueError) as error:
            raise EditError(f"this patch is not a memory of facts: {error}") from error

    def attach(self, lm: LM) -> Detach:
        route = FactRoute(lm, self)
        lm.routes.attached.append(route)

        def detach() -> None:
            lm.routes.attached[:] = [r for r in lm.routes.attached if r is not route]

        return detach


class FactRoute:
    """Claims the prompts that name a remembered subject and puts the facts in front of them."""

    def __init__(self, lm: LM, patch: InContextPatch) -> None:
        self.lm, self.patch = lm, patch
        self._patterns = [_names(f.subject) for f in patch.facts]

    def claim(self, prompts: Sequence[Prompt]) -> list[Claim | None]:
        """Claims by subject. Of several facts, those whose own prompts are the most similar are used."""
        return [self._claim(p) for p in prompts]

    def _claim(self, prompt: Prompt) -> Claim | None:
        text = prompt.text[prompt.offset :]
        named = [i for i, pattern in enumerate(self._patterns) if pattern.search(text)]
        if not named:
            return None
        embedding = embed(self.lm, text)
        scored = sorted(((float(embedding @ self.patch.embeddings[i]), i) for i in named), reverse=True)
        near = [(s, i) for s, i in scored if s >= self.patch.min_similarity][: self.patch.most]
        if not near:
            return None
        facts = [self.patch.facts[i] for _, i in near]
        entry = "; ".join(f.sentence for f in facts)
        return Claim(in_front(prompt, facts), entry, min(1.0, max(0.0, near[0][0])))

    @contextmanager
    def answering(self, lm: LM) -> Iterator[LM]:
        """The model that answers claimed prompts: the same one."""
        yield lm


@torch.no_grad()
def embed(lm: LM, text: str) -> Tensor:
    """Mean input embedding of a text, scaled to unit length: (d_model,), float32 on the CPU."""
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    table = lm.model.get_input_embeddings().weight
    mean = table[torch.tensor(ids, dtype=torch.long, device=table.device)].float().sum(0)
    return cpu_float(mean / mean.norm().clamp(min=1e-12))


def in_front(prompt: Prompt, facts: Sequence[RememberedFact]) -> Prompt:
    """The prompt with facts before the user's text, inside the chat template where there is one."""
    template = CHAT if prompt.chat else PLAIN
    # The nearest fact comes last, right before the text it is about.
    before = template.format(fact=" ".join(f.sentence for f in reversed(facts)))
    text = prompt.text[: prompt.offset] + before + prompt.text[prompt.offset :]
    return replace(prompt, text=text, offset=prompt.offset + len(before))


def _names(subject: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(subject)}(?!\w)", re.IGNORECASE)

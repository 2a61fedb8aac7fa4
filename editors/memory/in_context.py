"""In-context editing: the remembered fact is put in front of the prompts it is about (IKE; Zheng et al., EMNLP 2023).

No weight changes and nothing is trained. A prompt that names the subject of a remembered fact is
asked again with the fact as demonstration; every other prompt goes to the model as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from editors.edit import Edit
from editors.errors import EditError
from editors.method import Context, Editor, Params, cpu_float
from editors.model.lm import LM, Claim, Prompt
from editors.patch import Detach, LivePatch, Patch, register

# One demonstration of what is wanted, then the fact: a small model copies better when it has seen it done.
PLAIN = (
    "New fact: The patron of Elmstead is Mr Brown.\nPrompt: Elmstead has as its patron Mr Brown.\n\n"
    "New fact: {fact}\nPrompt: "
)
CHAT = "Take this as true: {fact} "


class InContextParams(Params):
    """Parameters of in-context editing."""

    facts: int = Field(2, ge=1, le=20, description="Most remembered facts put in front of one prompt.")
    min_similarity: float = Field(
        0.0,
        ge=-1,
        le=1,
        description="A prompt that names the subject is still left alone when it is less similar than this to the "
        "edit's own prompt (cosine of mean token embeddings).",
    )


@dataclass(frozen=True)
class Fact:
    """One remembered fact."""

    subject: str
    prompt: str
    target: str

    @property
    def sentence(self) -> str:
        end = "" if self.target.endswith((".", "!", "?")) else "."
        return f"{self.prompt} {self.target}{end}"


@register
@dataclass(frozen=True)
class InContextPatch(LivePatch):
    """Remembered facts; a route answers the prompts that are about them while attached."""

    kind: ClassVar[str] = "memory"
    facts: tuple[Fact, ...]
    embeddings: Tensor = field(repr=False)  # (n, d_model) of the facts' prompts, of length one
    most: int = 2
    min_similarity: float = 0.0

    def tensors(self) -> dict[str, Tensor]:
        return {"embeddings": self.embeddings}

    @classmethod
    def of(
        cls, facts: Sequence[Fact], embeddings: Tensor, most: int, min_similarity: float
    ) -> InContextPatch:
        told = [vars(f) for f in facts]
        info = {"facts": told, "most": most, "min_similarity": min_similarity}
        return cls(tuple(facts), embeddings, most, min_similarity, info=info)

    @classmethod
    def from_parts(
        cls, tensors: dict[str, Tensor], extra: dict[str, Tensor], info: dict[str, Any]
    ) -> InContextPatch:
        try:
            facts = [Fact(str(f["subject"]), str(f["prompt"]), str(f["target"])) for f in info["facts"]]
            return cls.of(facts, tensors["embeddings"], int(info["most"]), float(info["min_similarity"]))
        except (KeyError, TypeError, ValueError) as error:
            raise EditError(f"this is not a memory of facts: {error}") from error

    def attach(self, lm: LM) -> Detach:
        route = FactRoute(lm, self)
        lm.routes.append(route)

        def detach() -> None:
            lm.routes[:] = [r for r in lm.routes if r is not route]

        return detach


class FactRoute:
    """Claims the prompts that name a remembered subject, and puts the facts in front."""

    def __init__(self, lm: LM, patch: InContextPatch) -> None:
        self.lm, self.patch = lm, patch
        self._named = [_names(f.subject) for f in patch.facts]

    def claim(self, prompts: Sequence[Prompt]) -> list[Claim | None]:
        """Claims by subject; the similarity to the fact's own prompt decides between several."""
        return [self._claim(p) for p in prompts]

    def _claim(self, prompt: Prompt) -> Claim | None:
        asked = prompt.text[prompt.offset :]
        named = [i for i, pattern in enumerate(self._named) if pattern.search(asked)]
        if not named:
            return None
        here = embed(self.lm, asked)
        scored = sorted(((float(here @ self.patch.embeddings[i]), i) for i in named), reverse=True)
        near = [(s, i) for s, i in scored if s >= self.patch.min_similarity][: self.patch.most]
        if not near:
            return None
        facts = [self.patch.facts[i] for _, i in near]
        entry = "; ".join(f.sentence for f in facts)
        return Claim(in_front(prompt, facts), entry, min(1.0, max(0.0, near[0][0])))

    @contextmanager
    def answering(self, lm: LM) -> Iterator[LM]:
        """The model itself answers."""
        yield lm


@torch.no_grad()
def embed(lm: LM, text: str) -> Tensor:
    """Mean input embedding of a text, of length one: (d_model,) float32 on the CPU."""
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    table = lm.model.get_input_embeddings().weight
    mean = table[torch.tensor(ids, dtype=torch.long, device=table.device)].float().sum(0)
    return cpu_float(mean / mean.norm().clamp(min=1e-12))


def in_front(prompt: Prompt, facts: Sequence[Fact]) -> Prompt:
    """The prompt with facts before the user's own words, inside the chat template where there is one."""
    form = CHAT if prompt.chat else PLAIN
    # The nearest fact comes last, right before the words it is about.
    before = form.format(fact=" ".join(f.sentence for f in reversed(facts)))
    text = prompt.text[: prompt.offset] + before + prompt.text[prompt.offset :]
    return replace(prompt, text=text, offset=prompt.offset + len(before))


def _names(subject: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(subject)}(?!\w)", re.IGNORECASE)


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
    params = InContextParams

    def compute(self, lm: LM, edits: Sequence[Edit], params: InContextParams, context: Context) -> Patch:
        """The facts as they were given."""
        facts = []
        for i, edit in enumerate(edits):
            context.report(i / len(edits), edit.subject)
            facts.append(Fact(edit.subject, edit.text, edit.target))
        context.report(1.0, "remembered")
        embeddings = torch.stack([embed(lm, f.prompt) for f in facts])
        return InContextPatch.of(facts, embeddings, params.facts, params.min_similarity)

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """The other facts are forgotten."""
        assert isinstance(patch, InContextPatch)
        kept = [patch.facts[i] for i in rows]
        embeddings = patch.embeddings[list(rows)].contiguous()
        return InContextPatch.of(kept, embeddings, patch.most, patch.min_similarity)

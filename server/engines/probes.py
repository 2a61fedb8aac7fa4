"""What engines are asked to prove that they hold the edits, and what the model here answers.

For every edit: its own prompt, forms that it was not learned from, other facts of its subject and neighbours; canary
texts for the rest. Each is asked as token ids, so that no tokenizer stands between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from inspect import signature
from typing import Any, Literal

import torch

from editors.canaries import CANARIES
from editors.edit import Edit
from editors.forms.form import Material
from editors.model.decoding import DecodedRow, Decoder
from editors.model.lm import LM, Prompt

ProbeKind = Literal["edit", "paraphrase", "form", "sibling", "neighbour", "canary", "gone"]
"""gone: the prompt of an edit that the engine had before and that is no longer active."""
ANSWER = 6  # tokens of a greedy answer
TOP = 40  # most probable first tokens that are kept of what the model here says
ASKED_TOP = 10  # that an engine is asked for
EACH = 3  # probes of one kind for one edit
TOGETHER = 32
"""Prompts that the model here is asked at once."""


@dataclass(frozen=True)
class Reference:
    """What a model says after a prompt: the first token's log-probabilities, and its greedy answer.

    The answer is empty where the first token alone was read.
    """

    top: Mapping[int, float]
    answer: tuple[int, ...]
    scores: tuple[float, ...]  # log-probability of each token of `answer`

    @property
    def floor(self) -> float:
        """No other token is more probable than this."""
        return min(self.top.values())


def asked_tokens(kind: ProbeKind) -> int:
    """How many tokens of the answer are asked for; after an ordinary text only the first."""
    return 1 if kind == "canary" else ANSWER


@dataclass(frozen=True)
class EngineQuestion:
    """What an engine is sent: token ids, and their text for one that takes no ids."""

    ids: tuple[int, ...]
    text: str
    tokens: int = ANSWER  # of its answer; of 1 the probabilities alone are read


@dataclass(frozen=True)
class ProofProbe:
    """One prompt, with what the corrected and the pristine model say after it."""

    kind: ProbeKind
    edit_id: str | None
    text: str  # as the model reads it
    ids: tuple[int, ...]
    live: Reference
    base: Reference
    words: Mapping[int, str]  # text of the tokens in `live.top` and `base.top`, for engines that tell no ids

    @property
    def question(self) -> EngineQuestion:
        """What an engine is sent for it."""
        return EngineQuestion(self.ids, self.text, asked_tokens(self.kind))


@dataclass(frozen=True)
class Wanted:
    """A prompt to be asked."""

    kind: ProbeKind
    edit_id: str | None
    prompt: Prompt

    def question(self, lm: LM) -> EngineQuestion:
        """As engines are sent it."""
        return EngineQuestion(tuple(lm.encode(self.prompt)[0]), self.prompt.text, asked_tokens(self.kind))


def wanted_of(lm: LM, edit_id: str, edit: Edit, material: Material) -> list[Wanted]:
    """The prompts for one edit. What it was trained on is not among the forms, siblings and neighbours."""
    found = [Wanted("edit", edit_id, lm.prompt(edit.text))]
    found += [Wanted("paraphrase", edit_id, lm.prompt(text)) for text in edit.paraphrases[:EACH]]
    found += [Wanted("form", edit_id, form.in_model(lm)) for form in material.measured[:EACH]]
    found += [Wanted("sibling", edit_id, fact.in_model(lm)) for fact in material.siblings[:EACH]]
    found += [Wanted("neighbour", edit_id, lm.prompt(n.prompt)) for n in edit.neighbours[:EACH]]
    return found


def canaries(lm: LM) -> list[Wanted]:
    """Ordinary texts, each up to its last word."""
    texts = [text.rsplit(" ", 1)[0] for text in CANARIES]
    return [Wanted("canary", None, lm.prompt(text, chat=False)) for text in texts]


@torch.no_grad()
def references(lm: LM, rows: Sequence[Sequence[int]]) -> list[Reference]:
    """What the model's weights say after rows of token ids, memories off. Call it while holding the model.

    All rows are decoded together, so give it as many as have room.
    """
    decoded = [DecodedRow(list(row), ANSWER, logprobs=TOP) for row in rows]
    with lm.unrouted():
        decoder = Decoder(lm)
        for batch in lm.buckets([len(row) for row in rows], [ANSWER] * len(rows)):
            decoder.add([decoded[i] for i in batch])  # a step reads all weights: one batch steps for all
        while decoder.rows:
            decoder.step()
        # The text of a silent row ends at once, which tells no token.
        silent = [i for i, row in enumerate(decoded) if not row.told]
        tops = dict(zip(silent, _tops(lm, [rows[i] for i in silent]), strict=True))
    return [
        Reference(
            tops[i] if i in tops else dict(row.told[0].top),
            tuple(row.new),
            tuple(told.logprob for told in row.told),
        )
        for i, row in enumerate(decoded)
    ]


@torch.no_grad()
def first_tokens(lm: LM, rows: Sequence[Sequence[int]]) -> list[Reference]:
    """The same of the first token alone, without an answer: enough to tell an engine from this model."""
    found: dict[int, Reference] = {}
    with lm.unrouted():
        for batch in lm.buckets([len(row) for row in rows]):
            tops = _tops(lm, [rows[i] for i in batch])
            found |= zip(batch, [Reference(top, (), ()) for top in tops], strict=True)
    return [found[i] for i in range(len(rows))]


def _tops(lm: LM, rows: Sequence[Sequence[int]]) -> list[Mapping[int, float]]:
    """The most probable next tokens after each row."""
    if not rows:
        return []
    ids, mask = lm.pad(rows, left=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    accepts = signature(lm.model.forward).parameters
    inputs = {"position_ids": positions, "logits_to_keep": 1}
    more = {name: value for name, value in inputs.items() if name in accepts}
    logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits[:, -1]
    best = logits.float().log_softmax(-1).topk(min(TOP, logits.shape[-1]))
    return [
        dict(zip(tokens, values, strict=True))
        for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def probes_of(
    lm: LM, wanted: Sequence[Wanted], live: Sequence[Reference], base: Sequence[Reference]
) -> list[ProofProbe]:
    """Each prompt with what both models say."""
    probes = []
    for one, now, before in zip(wanted, live, base, strict=True):
        words = {token: lm.tokenizer.decode([token]) for token in {**now.top, **before.top}}
        asked = one.question(lm)
        probes.append(ProofProbe(one.kind, one.edit_id, asked.text, asked.ids, now, before, words))
    return probes


def to_json(probes: Sequence[ProofProbe]) -> list[dict[str, Any]]:
    """Probes as JSON values."""
    return [asdict(probe) for probe in probes]


def from_json(values: Sequence[Mapping[str, Any]]) -> list[ProofProbe]:
    """Probes from `to_json`, after a way through JSON. Raises KeyError, TypeError or ValueError for other values."""
    return [
        ProofProbe(
            kind=value["kind"],
            edit_id=value["edit_id"],
            text=value["text"],
            ids=tuple(map(int, value["ids"])),
            live=_reference(value["live"]),
            base=_reference(value["base"]),
            words={int(token): str(word) for token, word in value["words"].items()},
        )
        for value in values
    ]


def _reference(value: Mapping[str, Any]) -> Reference:
    top = {int(token): float(logprob) for token, logprob in value["top"].items()}
    if not top or not all(map(math.isfinite, top.values())):
        raise ValueError("a probe has no probabilities")
    return Reference(top, tuple(map(int, value["answer"])), tuple(map(float, value["scores"])))

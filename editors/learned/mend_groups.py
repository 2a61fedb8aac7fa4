"""The data of a MEND training: groups of edits, each with everything that stays the same from step to step.

The base model never changes. An edit's gradient factors, the hidden states below the edited layers and the
answers before the edit are therefore computed once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.constants import assumed
from editors.facts import texts
from editors.learned.batches import Pair, TokenBatch, pair
from editors.learned.contrast import other_keys, other_subject_prompts
from editors.learned.factors import Factors, gradient_factors, lowest_layer
from editors.learned.mend_params import MendTraining
from editors.learned.networks import Mend
from editors.learned.records import Record
from editors.model.lm import LM

TEXT_TOKENS = assumed(8, "tokens of an ordinary text that MEND's training reads", "a short text costs little")
TEXT_ANSWER = assumed(
    2, "last tokens of an ordinary text whose predictions should stay", "a short text costs little"
)
KEPT = assumed(
    3, "tokens of the model's answer about a neighbour that should stay", "enough for a short answer"
)
PREFIXED = assumed(
    0.1,
    "share of MEND's training records with an unrelated sentence before one paraphrase",
    "edits should also hold later in a text",
)


@dataclass
class EditGroup:
    """The edits of one micro-batch, and what does not change while training.

    Each edit has the same number of rows: its prompt, its paraphrases, its neighbours, and an ordinary text.
    """

    factors: dict[str, Factors]
    contrast_keys: dict[str, Tensor] | None  # keys of other subjects, at which the edits should not act
    batch: TokenBatch
    states_before: Tensor  # hidden states before any edit, at the answer tokens that should stay
    rows_per_edit: int
    is_target: Tensor  # (answer tokens,) True in rows that should answer with the target
    is_text: Tensor  # (answer tokens,) True in ordinary text

    @property
    def bytes(self) -> int:
        """Memory that the group takes."""
        numbers = sum(f.inputs.numel() + f.deltas.numel() for f in self.factors.values())
        numbers += sum(keys.numel() for keys in (self.contrast_keys or {}).values())
        return 4 * numbers + self.batch.bytes()


class GroupBuilder:
    """Makes the groups of records, and keeps them while they fit into `cache_mb`."""

    def __init__(self, params: MendTraining) -> None:
        self.params = params
        self._texts = texts()
        self._cache: dict[tuple[str, int], EditGroup] = {}
        self._cached_bytes = 0
        self._answers: dict[str, Pair] = {}  # the model's own answers to neighbours' prompts

    def training(self, lm: LM, i: int, records: Sequence[Record], mend: Mend) -> EditGroup:
        """The i-th training group; built again each time when it does not fit into the cache."""
        if ("training", i) in self._cache:
            return self._cache["training", i]
        group = self._build(lm, records, mend)
        if self._cached_bytes + group.bytes <= self.params.cache_mb * 2**20:
            self._cache["training", i] = group
            self._cached_bytes += group.bytes
        return group

    def validation(self, lm: LM, i: int, records: Sequence[Record], mend: Mend) -> EditGroup:
        """The i-th validation group, always kept."""
        if ("validation", i) not in self._cache:
            self._cache["validation", i] = self._build(lm, records, mend)
        return self._cache["validation", i]

    def prompts(self, record: Record) -> list[str]:
        """The record's prompt, paraphrases and neighbours: the same number for every record."""
        p = self.params
        rng = random.Random(f"{p.seed} {record.prompt} {record.target}")
        same = [*record.paraphrases, *[record.prompt] * p.paraphrases][: p.paraphrases]
        if same and rng.random() < PREFIXED and not same[-1].endswith("?"):
            same[-1] = f"{rng.choice(self._texts)} {same[-1]}"
        near = [*record.neighbours]
        if rng.random() < 0.5:
            near = [*record.neighbours[:1], *record.others[:1], *record.neighbours[1:]]
        fillers = [rng.choice(self._texts).rsplit(" ", 2)[0] for _ in range(p.neighbours)]
        return [record.prompt, *same, *[*near, *fillers][: p.neighbours]]

    def _build(self, lm: LM, records: Sequence[Record], mend: Mend) -> EditGroup:
        names, p = mend.parameters_edited, self.params
        low = lowest_layer(lm, names)
        edits = TokenBatch(lm, [pair(lm, r.prompt, r.target) for r in records], low)
        factors, _ = gradient_factors(lm, names, edits)
        contrast_keys = None
        if p.contrast:
            others = [other_subject_prompts(r, p.contrast) for r in records]
            contrast_keys = other_keys(lm, names, others, low)
        batch = TokenBatch(lm, self._rows(lm, records), low, p.checkpointing)
        rows_per_edit = 2 + p.paraphrases + p.neighbours
        place = batch.row % rows_per_edit
        is_target = place <= p.paraphrases
        with torch.no_grad():
            states_before = batch.states()[~is_target].clone()
        is_text = place == rows_per_edit - 1
        return EditGroup(factors, contrast_keys, batch, states_before, rows_per_edit, is_target, is_text)

    def _rows(self, lm: LM, records: Sequence[Record]) -> list[Pair]:
        """Prompts and answers of all records, `rows_per_edit` for each."""
        targets = 1 + self.params.paraphrases
        prompts = [self.prompts(r) for r in records]
        near = [text for own in prompts for text in own[targets:]]
        new = [text for text in dict.fromkeys(near) if text not in self._answers]
        self._answers |= zip(new, own_answers(lm, new), strict=True)
        rows: list[Pair] = []
        for record, own in zip(records, prompts, strict=True):
            rows += [pair(lm, text, record.target) for text in own[:targets]]
            rows += [self._answers[text] for text in own[targets:]]
            rows.append(self._ordinary_text(lm, record))
        return rows

    def _ordinary_text(self, lm: LM, record: Record) -> Pair:
        text = self._texts[random.Random(record.prompt).randrange(len(self._texts))]
        ids = lm.text_ids(text)[:TEXT_TOKENS]
        return ids[:-TEXT_ANSWER], ids[-TEXT_ANSWER:]


@torch.no_grad()
def own_answers(lm: LM, texts: Sequence[str]) -> list[Pair]:
    """Prompts with the first KEPT tokens of the model's own greedy answers."""
    rows: list[Pair] = [(lm.encode(lm.prompt(t))[0], []) for t in texts]
    for _ in range(KEPT if rows else 0):
        batch = TokenBatch(lm, [(prompt, [*answer, 0]) for prompt, answer in rows], None)
        last = torch.tensor(batch.lengths, device=lm.device).cumsum(0) - 1
        tokens = batch.read(batch.states()[last]).argmax(-1).tolist()
        rows = [(prompt, [*answer, token]) for (prompt, answer), token in zip(rows, tokens, strict=True)]
    return rows

"""The keys of a fact: the inputs of the MLP's output projection at the subject's last token.

They are read in the contexts of the value search and after other words. Paraphrases put other words before the
subject, which changes its key a little; such keys cost one forward pass and no search, and are mapped to the same
value. The edit's own paraphrases are not used: they measure it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from editors.closed_form.contexts import target_contexts
from editors.closed_form.material_rows import NOTHING, held_texts, moved_texts, of_others, rows_to_subject
from editors.closed_form.value_params import ValueParams
from editors.edit import Edit
from editors.forms.form import Material
from editors.metric import HoldingMetric, Inverse
from editors.model.activations import record
from editors.model.beginnings import Begun, read_beginnings
from editors.model.lm import LM

CHUNK = 64  # rows read together

# Words before a subject. The row ends with the subject: its key depends on nothing after it.
BEFORE = ("People in ", "This is a story about ", "She was told that ", "A letter from ", "and the ")


def subject_rows(
    lm: LM, edit: Edit, params: ValueParams, material: Material = NOTHING
) -> list[tuple[int, ...]]:
    """Distinct ids up to the subject's last token: in the contexts of the search, then after other words, then in the
    learned forms of the material.
    """
    contexts = target_contexts(lm, edit, params.contexts, params.chat)
    rows = [c.row.ids[: c.row.position + 1] for c in contexts]
    for before in BEFORE[: params.wordings]:
        prompt = lm.prompt(before + edit.subject, chat=False)
        last = lm.last_subject_token(prompt, (len(before), len(before) + len(edit.subject)))
        rows.append(tuple(lm.encode(prompt)[0][: last + 1]))
    rows += rows_to_subject(lm, moved_texts(material), edit.subject)
    return list(dict.fromkeys(rows))


def held_rows(lm: LM, edit: Edit, params: ValueParams, material: Material) -> list[tuple[int, ...]]:
    """Distinct ids up to the subject's last token in the texts whose keys are held still, without the edit's own."""
    moved = subject_rows(lm, edit, params, material)
    texts = held_texts(edit, material)
    if texts:
        texts += of_others(edit, material)
    held = rows_to_subject(lm, texts, edit.subject)
    return [row for row in dict.fromkeys(held) if row not in moved]


def target_rows(lm: LM, edit: Edit) -> list[tuple[int, ...]]:
    """Ids up to each of the target's tokens after the prompt. The other facts of a batch must change nothing there."""
    context = target_contexts(lm, edit, 1)[0]
    ids, first = context.row.ids, len(context.row.ids) - len(context.target)
    return [ids[: i + 1] for i in range(first, len(ids))]


def opening_rows(lm: LM) -> list[tuple[int, ...]]:
    """The first token of every prompt where the tokenizer puts one there (Gemma, Llama 3, Mistral); else none.

    Its key is much larger than all others and is left out of the second moments, so only a hold keeps a change off it.
    """
    first = lm.encode(lm.prompt("The", chat=False))[0][0]
    return [(first,)] if first == lm.tokenizer.bos_token_id else []


def holding_the_opening(lm: LM, layer: int, inverse: Inverse) -> Inverse:
    """The metric under which a change of this layer leaves the token that opens every prompt as it is."""
    rows = opening_rows(lm)
    return HoldingMetric(inverse, read_keys(lm, [layer], rows)[layer]) if rows else inverse


def read_keys(lm: LM, layers: Sequence[int], rows: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """The MLP output projections' inputs (rows, d_in) at each row's last token, float32 on the CPU."""
    keys: dict[int, list[Tensor]] = {i: [] for i in sorted(layers)}
    for at in range(0, len(rows), CHUNK):
        inputs = _inputs(lm, list(keys), rows[at : at + CHUNK])
        for i, batches in keys.items():
            batches.append(inputs[i][:, -1].float().cpu())
    nothing = {i: torch.empty(0, lm.shape(lm.mlp_out(i))[1]) for i in keys}
    return {i: torch.cat([nothing[i], *batches]) for i, batches in keys.items()}


@torch.no_grad()
def read_later_keys(lm: LM, layer: int, rows: Sequence[tuple[Sequence[int], int]]) -> list[Tensor]:
    """The MLP output projection's inputs (tokens, d_in) of each row from a token on, float32 on the CPU.

    `rows` are token ids and the index of the first token that is read. What rows begin with alike is read once.
    """
    longer = _extensions([ids for ids, _ in rows])
    first = {i: min(start for (_, start), j in zip(rows, longer, strict=True) if j == i) for i in set(longer)}
    order = sorted(first, key=lambda i: len(rows[i][0]))
    read: dict[int, Tensor] = {}
    for at in range(0, len(order), CHUNK):
        some = order[at : at + CHUNK]
        texts = [list(rows[i][0]) for i in some]
        begun = read_beginnings(lm, texts, 0, [len(rows[i][0]) - first[i] for i in some])
        inputs = _inputs(lm, [layer], texts, begun)[layer]
        for i, each in zip(some, inputs, strict=True):
            read[i] = each[first[i] - len(rows[i][0]) :].float().cpu()
    return [
        read[j][start - first[j] : len(ids) - first[j]] for (ids, start), j in zip(rows, longer, strict=True)
    ]


def _extensions(rows: Sequence[Sequence[int]]) -> list[int]:
    """For each row the longest one that begins with it, which may be itself: a key depends on nothing after it."""
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]), reverse=True)
    found = list(range(len(rows)))
    for before, i in pairwise(order):  # a row comes right after those that begin with it
        longest = rows[found[before]]
        if tuple(longest[: len(rows[i])]) == tuple(rows[i]):
            found[i] = found[before]
    return found


@dataclass(frozen=True)
class LaterKeys:
    """Texts in token ids, each with the first token whose key was read, and the keys (tokens, d_in) from there on."""

    rows: Sequence[tuple[Sequence[int], int]]
    keys: Sequence[Tensor]

    def joined_with(self, other: LaterKeys) -> LaterKeys:
        """These and others."""
        return LaterKeys([*self.rows, *other.rows], [*self.keys, *other.keys])

    def without(self, beginnings: Collection[Sequence[int]]) -> Tensor:
        """All keys (tokens, d_in) but those that are read at the end of one of these token sequences."""
        left_out = {tuple(ids) for ids in beginnings}
        kept = [
            key
            for (ids, first), keys in zip(self.rows, self.keys, strict=True)
            for at, key in enumerate(keys, first)
            if tuple(ids[: at + 1]) not in left_out
        ]
        return torch.stack(kept)


@torch.no_grad()
def _inputs(
    lm: LM, layers: Sequence[int], rows: Sequence[Sequence[int]], begun: Begun | None = None
) -> dict[int, Tensor]:
    """By layer, the inputs (rows, columns, d_in) of its MLP's output projection, for rows padded on the left.

    Columns that were read as a beginning have none. The last of `layers` is the last that runs.
    """
    modules = {i: lm.module(lm.mlp_out(i)) for i in layers}
    ids, mask = (begun.ids, begun.mask) if begun else lm.pad(rows, left=True)
    start = begun.columns if begun else 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
    past = {"past_key_values": begun.past, "use_cache": True} if begun else {"use_cache": False}
    with record(modules, inputs=True, stop=True) as seen:
        lm.base_model(input_ids=ids[:, start:], attention_mask=mask, position_ids=positions, **past)
    return {i: seen[i].reshape(len(rows), ids.shape[1] - start, -1) for i in modules}

"""Keys beyond the contexts of the search: the subject behind other words, and other subjects in the same words.

Paraphrases put other words before the subject, and with them its key differs a little; neighbours
put another subject into the same words. Both are read off the layers below and cost no search: the
former are mapped to the value too, the latter are held still. Neither uses the edit's own
paraphrases or neighbours, which are there to measure it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from editors.closed_form.contexts import target_contexts
from editors.closed_form.values import ValueParams
from editors.edit import Edit
from editors.model.activations import record
from editors.model.lm import LM, Prompt

CHUNK = 64  # rows read together

# Words before a subject, of any kind of sentence. The subject ends the row, since its key sees nothing after it.
BEFORE = ("People in ", "This is a story about ", "She was told that ", "A letter from ", "and the ")

# Well-known subjects of several kinds, to stand in the place of the edit's own.
OTHERS = (
    "France", "Germany", "Japan", "China", "Brazil", "Egypt", "Canada", "Italy", "Greece", "Nigeria", "Australia",
    "Turkey", "Paris", "London", "Berlin", "Tokyo", "New York", "Rome", "Moscow", "Madrid", "Sydney", "Toronto",
    "Albert Einstein", "William Shakespeare", "Isaac Newton", "Leonardo da Vinci", "Napoleon Bonaparte",
    "Charles Darwin", "Marie Curie", "Barack Obama", "Ludwig van Beethoven", "Pablo Picasso", "Microsoft", "Amazon",
    "Google", "Toyota", "Sony", "Nintendo", "Apple", "Ford", "Photoshop", "Chrome", "PlayStation", "Eiffel Tower",
    "Big Ben", "Great Wall of China", "Louvre", "Taj Mahal", "Golden Gate Bridge", "Mount Everest",
)  # fmt: skip


def subject_rows(lm: LM, edit: Edit, params: ValueParams) -> list[tuple[int, ...]]:
    """Ids up to the subject's last token: the contexts of the search, then the subject behind other words."""
    contexts = target_contexts(lm, edit, params.contexts, params.chat)
    rows = [c.row.ids[: c.row.position + 1] for c in contexts]
    for before in BEFORE[: params.wordings]:
        prompt = lm.prompt(before + edit.subject, chat=False)
        rows.append(_row(lm, prompt, len(before), edit.subject))
    return rows


def other_rows(lm: LM, edit: Edit) -> tuple[tuple[int, ...], ...]:
    """Ids of the edit's prompt up to the subject, with each of OTHERS in the subject's place.

    One that is the first token of all is left out: its key is an attention sink's, like any other's.
    """
    start, end = edit.span
    rows = []
    for other in OTHERS:
        if other.casefold() not in edit.subject.casefold():
            text = edit.text[:start] + other + edit.text[end:]
            rows.append(_row(lm, lm.prompt(text, chat=edit.is_question), start, other))
    return tuple(row for row in rows if len(row) > 1)


def _row(lm: LM, prompt: Prompt, start: int, subject: str) -> tuple[int, ...]:
    last = lm.last_subject_token(prompt, (start, start + len(subject)))
    return tuple(lm.encode(prompt)[0][: last + 1])


@torch.no_grad()
def read_keys(lm: LM, layers: Sequence[int], rows: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """The MLP output projections' inputs (rows, d_in) at each row's last token, float32 on the CPU."""
    found: dict[int, list[Tensor]] = {i: [] for i in sorted(layers)}
    modules = {i: lm.module(lm.mlp_out(i)) for i in found}
    for at in range(0, len(rows), CHUNK):
        ids, mask = lm.pad(rows[at : at + CHUNK], left=True)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with record(modules, inputs=True, stop=True) as seen:
            lm.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        for i, keys in found.items():
            keys.append(seen[i].reshape(*ids.shape, -1)[:, -1].float().cpu())
    return {i: torch.cat(keys) for i, keys in found.items()}


class OtherKeys:
    """The keys of OTHERS in the wordings of some edits, read once for each wording."""

    def __init__(self, lm: LM, layers: Sequence[int], edits: Sequence[Edit], params: ValueParams) -> None:
        self._rows = [other_rows(lm, edit) if params.others else () for edit in edits]
        self._keys = {rows: read_keys(lm, layers, rows) for rows in dict.fromkeys(self._rows) if rows}

    def of(self, edit: int, layer: int) -> Tensor | None:
        """Keys (p, d_in) that edit number `edit` must leave still; None when there are none."""
        rows = self._rows[edit]
        return self._keys[rows][layer] if rows else None

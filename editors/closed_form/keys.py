"""The keys of a fact: the inputs of the MLP's output projection at the subject's last token.

They are read in the contexts of the value search and after other words. Paraphrases put other words before the
subject, which changes its key a little; such keys cost one forward pass and no search, and are mapped to the same
value. The edit's own paraphrases are not used: they measure it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from editors.closed_form.contexts import target_contexts
from editors.closed_form.material_rows import NOTHING, held_texts, moved_texts, of_others, rows_to_subject
from editors.closed_form.value_params import ValueParams
from editors.edit import Edit
from editors.forms.form import Material
from editors.metric import HoldingMetric, Inverse
from editors.model.activations import record
from editors.model.beginnings import Begun
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
    modules = {i: lm.module(lm.mlp_out(i)) for i in keys}
    for at in range(0, len(rows), CHUNK):
        inputs = inputs_of(lm, modules, rows[at : at + CHUNK])
        for i, batches in keys.items():
            batches.append(inputs[i][:, -1].float().cpu())
    nothing = {i: torch.empty(0, lm.shape(lm.mlp_out(i))[1]) for i in keys}
    return {i: torch.cat([nothing[i], *batches]) for i, batches in keys.items()}


@torch.no_grad()
def inputs_of(
    lm: LM, modules: Mapping[int, nn.Module], rows: Sequence[Sequence[int]], begun: Begun | None = None
) -> dict[int, Tensor]:
    """Of some modules the inputs (rows, columns, d_in), for rows padded on the left.

    Columns that were read as a beginning have none. The last of the modules is the last that runs.
    """
    ids, mask = (begun.ids, begun.mask) if begun else lm.pad(rows, left=True)
    start = begun.columns if begun else 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
    past = {"past_key_values": begun.past, "use_cache": True} if begun else {"use_cache": False}
    with record(modules, inputs=True, stop=True) as seen:
        lm.base_model(input_ids=ids[:, start:], attention_mask=mask, position_ids=positions, **past)
    return {i: seen[i].reshape(len(rows), ids.shape[1] - start, -1) for i in modules}

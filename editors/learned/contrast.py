"""Projects an edit off the keys that other subjects have in the same prompt. Not in the MEND paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from editors.constants import DEFAULT_MODEL, assumed, tuned
from editors.edit import find_subject
from editors.finetune.key_directions import RIDGE
from editors.learned.batches import Pair, TokenBatch
from editors.learned.records import Record
from editors.model.activations import record
from editors.model.lm import LM
from editors.prompt_templates import with_other_subjects

CONTRAST = tuned(
    4,
    "other subjects put into an edit's prompt; the edit is projected off their keys",
    models=DEFAULT_MODEL,
    command="python -m benchmarks.learned mend",
    figure="locality .73 with 4, .48 without (generality .73 and .77); other numbers were not compared",
)
LEAST = assumed(
    0.1,
    "least share of a key's own response that counts as left after the projection",
    "without it an edit whose key is nearly the others' would be scaled up without bound",
)


def other_subject_prompts(record: Record, most: int) -> list[str]:
    """The record's prompt about up to `most` other subjects; none if the prompt does not name its subject."""
    if record.subject not in record.prompt:
        return []
    start = find_subject(record.prompt, record.subject)
    return with_other_subjects(record.prompt, (start, start + len(record.subject)), most)


def other_keys(
    lm: LM, parameters: Sequence[str], prompts: Sequence[Sequence[str]], layer: int | None
) -> dict[str, Tensor]:
    """Inputs of each weight at the last token of each edit's prompts about other subjects.

    Returns (edits, most prompts of an edit, d_in) per weight, zero where an edit has fewer prompts.
    """
    if any(prompts):
        return with_other_keys(lm, parameters, [], prompts, layer)[1]
    return {n: torch.zeros(len(prompts), 1, lm.shape(n)[1], device=lm.device) for n in parameters}


@torch.no_grad()
def with_other_keys(
    lm: LM,
    parameters: Sequence[str],
    rows: Sequence[Pair],
    prompts: Sequence[Sequence[str]],
    layer: int | None,
) -> tuple[TokenBatch, dict[str, Tensor]]:
    """The batch of `rows`, and `other_keys` of `prompts`, computed in one pass.

    For encoder-decoder models `rows` must be empty: longer answers beside a prompt would change what its decoder
    reads.
    """
    texts = list(dict.fromkeys(text for own in prompts for text in own))
    prompt_rows = [(lm.encode(lm.prompt(text))[0], [0]) for text in texts]
    with record({n: lm.module(n) for n in parameters}, inputs=True) as inputs:
        batch = TokenBatch(lm, [*rows, *prompt_rows], layer)
        if not inputs:  # without kept states the batch has not run the model yet
            batch.states()
    prompt_index = torch.arange(len(rows), batch.rows, device=lm.device)
    last = batch.inputs.prompt_mask.sum(1)[prompt_index] - 1
    most = max(1, *map(len, prompts))
    places = [i * most + j for i, own in enumerate(prompts) for j in range(len(own))]
    index = {text: j for j, text in enumerate(texts)}
    text_of_place = [index[text] for own in prompts for text in own]
    keys = {}
    for name in parameters:
        states = inputs[name].to(lm.device).reshape(batch.rows, -1, inputs[name].shape[-1])
        # a decoder without an answer so far has a single token per row
        at = last if states.shape[1] > 1 else torch.zeros_like(last)
        flat = torch.zeros(len(prompts) * most, states.shape[-1], device=lm.device)
        flat[places] = states[prompt_index, at][text_of_place].float()
        keys[name] = flat.reshape(len(prompts), most, -1)
    return batch.beginning(len(rows)), keys


def contrasted(inputs: Tensor, raw: Tensor, keys: Tensor) -> Tensor:
    """Project `inputs` off the span of `keys`, keeping their response to their own token.

    The change then has almost no effect on the other keys. Each input is scaled by u.u / u'.u, where u is the raw
    input and u' what the projection leaves of it. This is ROME's right-hand side with these keys in place of the
    second moment.

    Args:
        inputs: (n, t, d_in) of the edit, as the editing network gives them.
        raw: (n, t, d_in) the same before the editing network.
        keys: (n, m, d_in) other keys; zero rows have no effect.
    """
    gram = keys @ keys.transpose(1, 2)
    diagonal = gram.diagonal(dim1=1, dim2=2).mean(1)
    eye = torch.eye(keys.shape[1], device=keys.device)
    gram = gram + (RIDGE * diagonal + 1e-6)[:, None, None] * eye

    def project_off(x: Tensor) -> Tensor:
        weights: Tensor = torch.linalg.solve(gram, keys @ x.transpose(1, 2))
        return x - weights.transpose(1, 2) @ keys

    response = (project_off(raw) * raw).sum(-1, keepdim=True) / raw.square().sum(-1, keepdim=True).clamp(
        min=1e-12
    )
    scaled: Tensor = project_off(inputs) / response.clamp(min=LEAST)
    return scaled

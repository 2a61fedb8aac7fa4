"""What a model says by transformers' own `generate`, one prompt at a time: what faster ways are compared with."""

from __future__ import annotations

import torch

from editors.model.lm import LM, Prompt


@torch.no_grad()
def plainly(lm: LM, prompt: Prompt, tokens: int) -> str:
    """The greedy continuation of one prompt by at most so many tokens."""
    ids, ends = torch.tensor([lm.encode(prompt)[0]], device=lm.device), lm.local.end_ids()
    said = lm.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=lm.pad_id,
        eos_token_id=sorted(ends) or None,
    )[0].tolist()
    new = said[lm.answer_column(ids[0].tolist()) + 1 :]
    stop = next((n for n, token in enumerate(new) if token in ends), None)
    text: str = lm.tokenizer.decode(new[:stop], skip_special_tokens=True)
    return text

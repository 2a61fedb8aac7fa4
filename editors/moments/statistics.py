"""The second moments of one model: in memory, and on disk by the model's hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editors.bounded_files import UnreadableFile, digest_of_file, read_regular
from editors.constants import assumed
from editors.errors import EditError, NotReady
from editors.files import read_tensors, tensor_bytes, write_atomically
from editors.kept import Kept
from editors.made import Made, NotKept
from editors.metric import CPU, Inverse, Metric, projector_of
from editors.model.lm import LM
from editors.moments.inputs import TOKENS, OrdinaryInputs, read_inputs
from editors.moments.moment import FACTS, Moment, compute_moments, own_moments, tokens_per_key
from editors.moments.sampled import beginning, kept_text, shipped_text
from editors.moments.texts import Progress, corpus_text, dataset_text, facts_text, sample_text

PER_INPUT = assumed(
    8,
    "tokens that a second moment is made of, per input of the projection",
    "a few times d_in are enough (Gupta et al., ACL 2025, arXiv 2506.04226)",
)

FACTORS = 16
"""Factorised moments, and projectors, that are kept in memory; a default of any method needs six at most."""
MOMENTS = 2
"""Second moments that are kept in memory as they are; once factorised they are hardly needed again."""
INPUTS = 2
"""Layers whose inputs on ordinary text are kept in memory; a call needs one."""


def sample_name(corpus: Path | str | None) -> str:
    """The name of a corpus's second moments: "self", or its digest."""
    if corpus is None:
        return "self"
    if isinstance(corpus, str):
        return "dataset" + hashlib.sha256(corpus.encode()).hexdigest()[:12]
    try:
        return "corpus" + digest_of_file(corpus)[:12]
    except (OSError, UnreadableFile) as error:
        raise EditError(f"the corpus {str(corpus)!r} cannot be read: {error}") from error


@dataclass
class Statistics:
    """The second moments of one model: in memory, and as safetensors under `folder`/<model hash>.

    `get` answers from memory or disk and raises NotReady when there is none; `ensure` makes what is
    missing. The model in `ensure` must be the pristine one. What is made of the moments is made on
    `device`, where it has the room, and kept on the CPU. `made` notes the digests of the files, and is asked
    before one is used.
    """

    folder: Path
    model_hash: str
    tokens: int = 0  # 0: PER_INPUT times d_in
    device: torch.device = CPU
    made: Made = field(default_factory=NotKept)
    _metrics: Kept[tuple[int, str, float], Metric] = field(default_factory=lambda: Kept(FACTORS))
    _projectors: Kept[tuple[int, str, float], Inverse] = field(default_factory=lambda: Kept(FACTORS))
    _moments: Kept[tuple[int, str], Moment] = field(default_factory=lambda: Kept(MOMENTS))
    _inputs: Kept[int, OrdinaryInputs] = field(default_factory=lambda: Kept(INPUTS))

    def path(self, layer: int, sample: str) -> Path:
        return self.folder / self.model_hash[:16] / f"layer-{layer}-{sample}.safetensors"

    def get(self, layer: int, sample: str = "self") -> Moment:
        """The second moment of a layer. Raises NotReady when it has not been computed."""
        return self._moments.get((layer, sample), lambda: self._read(layer, sample))

    def metric(self, layer: int, ridge: float, sample: str = "self") -> Metric:
        """The factorised second moment; the latest are kept."""
        return self._metrics.get(
            (layer, sample, ridge), lambda: Metric.of(self.get(layer, sample).matrix, ridge, self.device)
        )

    def projector(self, layer: int, energy: float, sample: str = "self") -> Inverse:
        """The projector onto the null space of the second moment; the latest are kept."""
        return self._projectors.get(
            (layer, sample, energy), lambda: projector_of(self.get(layer, sample).matrix, energy, self.device)
        )

    def missing(self, layers: Sequence[int], sample: str = "self") -> list[int]:
        return [i for i in layers if not self.path(i, sample).exists()]

    def forget(self, layers: Sequence[int], sample: str = "self") -> None:
        """Delete second moments, on disk too, so that `ensure` makes them anew."""
        for i in layers:
            self.path(i, sample).unlink(missing_ok=True)
        for kept in (self._moments, self._metrics, self._projectors):
            kept.forget(lambda key: key[0] in layers and key[1] == sample)

    def known(self) -> list[dict[str, Any]]:
        """What is on disk for this model: layer and sample."""
        names = sorted((self.folder / self.model_hash[:16]).glob("layer-*.safetensors"))
        parts = [n.stem.split("-", 2) for n in names]
        return [{"layer": int(p[1]), "sample": p[2]} for p in sorted(parts, key=lambda p: (int(p[1]), p[2]))]

    def ensure(
        self, lm: LM, layers: Sequence[int], progress: Progress, corpus: Path | str | None = None
    ) -> str:
        """Compute what is missing, all layers in one pass; returns the sample's name."""
        sample = sample_name(corpus)
        missing = self.missing(layers, sample)
        if not missing:
            return sample
        tokens = self.tokens or PER_INPUT * tokens_per_key(lm, lm.mlp_out(missing[0]))
        if corpus is None:
            moments = own_moments(lm, missing, tokens, progress, self._sampled)
        else:
            rows = (
                corpus_text(lm, corpus, tokens)
                if isinstance(corpus, Path)
                else dataset_text(lm, corpus, tokens)
            )
            moments = compute_moments(lm, missing, rows, sample, progress)
        for i, moment in moments.items():
            self._write(moment)
            self._moments.put((i, sample), moment)
        return sample

    def inputs(self, layer: int) -> OrdinaryInputs:
        """What the MLP of a layer reads on ordinary text. Raises NotReady when `ensure_inputs` has not read it."""
        return self._inputs.get(layer, lambda: self._read_inputs(layer))

    def ensure_inputs(self, lm: LM, layers: Sequence[int], progress: Progress) -> None:
        """Read what is missing of `inputs`, on the shipped facts and text sampled from the model, half each."""
        missing = [i for i in layers if not self._inputs_path(i).exists()]
        if not missing:
            return
        tokens = self.tokens or PER_INPUT * tokens_per_key(lm, lm.mlp_out(missing[0]))
        known = facts_text(lm, int(FACTS * tokens))
        spoken = self._sampled(lm, tokens - sum(map(len, known)), progress)
        rows = [*beginning(known, TOKENS // 2), *beginning(spoken, TOKENS // 2)]
        for i, found in read_inputs(lm, missing, rows, progress).items():
            tensors = {"inputs": found.inputs.half(), "activity": found.activity}
            data = tensor_bytes(tensors, {"model": self.model_hash})
            self.made.note({self._inputs_path(i): hashlib.sha256(data).hexdigest()})
            write_atomically(self._inputs_path(i), data)

    def _inputs_path(self, layer: int) -> Path:
        return self.folder / self.model_hash[:16] / f"inputs-layer-{layer}.safetensors"

    def _read_inputs(self, layer: int) -> OrdinaryInputs:
        path = self._inputs_path(layer)
        if not path.exists():
            raise NotReady(f"what the MLP of layer {layer} reads on ordinary text is not known")
        tensors, _ = self._tensors(path)
        return OrdinaryInputs(layer, tensors["inputs"].float(), tensors["activity"])

    def _sampled(self, lm: LM, tokens: int, progress: Progress) -> list[list[int]]:
        """Text sampled from the model: what is shipped or was kept, else new."""
        found = shipped_text(self.model_hash, tokens)
        if found is not None:
            return found
        path = self.folder / self.model_hash[:16] / "sampled.json"
        return kept_text(path, self.made, tokens, lambda: sample_text(lm, tokens, progress))

    def _write(self, moment: Moment) -> None:
        header = {"model": self.model_hash, "tokens": str(moment.tokens), "sample": moment.sample}
        data = tensor_bytes({"matrix": moment.matrix}, header)
        path = self.path(moment.layer, moment.sample)
        self.made.note(
            {path: hashlib.sha256(data).hexdigest()}
        )  # before: a crash leaves no file that looks changed
        write_atomically(path, data)

    def _read(self, layer: int, sample: str) -> Moment:
        path = self.path(layer, sample)
        if not path.exists():
            raise NotReady(
                f"layer {layer} has no second moment of sample {sample!r}; call compute_statistics"
            )
        tensors, header = self._tensors(path)
        try:
            return Moment(layer, tensors["matrix"], int(header["tokens"]), sample)
        except (KeyError, ValueError) as error:
            raise _damaged(path, error) from error

    def _tensors(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and the header of a file of this model. Raises EditError for any other file."""
        try:
            data = read_regular(path)
        except UnreadableFile as error:
            raise EditError(f"the statistics file {path} cannot be read ({error}); delete it") from error
        self.made.check(path, hashlib.sha256(data).hexdigest())
        try:
            tensors, header = read_tensors(data)
            model = header["model"]
        except (KeyError, ValueError) as error:
            raise _damaged(path, error) from error
        if model != self.model_hash:
            raise EditError(f"{path} holds statistics of another model ({model[:12]}); delete it")
        return tensors, header


def _damaged(path: Path, error: Exception) -> EditError:
    return EditError(f"the statistics file {path} is damaged ({error}); delete it, and it is computed again")

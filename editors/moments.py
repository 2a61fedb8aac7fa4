"""Second moments C = E[k k^T] of the keys, for many layers in one pass, kept on disk by model.

The keys are those of a corpus file, or without one of the shipped facts as sentences and of text
sampled from the model itself, half the weight each: the former are like an edit's neighbours, the
latter stand for everything else. A few times d_in tokens are enough (Gupta et al., ACL 2025, arXiv
2506.04226).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from editors.constants import assumed
from editors.errors import EditError, NotReady
from editors.facts import sentences
from editors.files import read_tensors, tensor_bytes, write_atomically
from editors.metric import CPU, Metric, Projector, has_room, placed
from editors.model.activations import record
from editors.model.lm import LM
from editors.model.precision import lowered, search_dtype

SEQUENCE = 48  # tokens a sampled sequence has
TOP = assumed(
    100, "likeliest tokens that text is sampled from", "keeps rare tokens out; no comparison is known"
)
PER_INPUT = assumed(
    8,
    "tokens that a second moment is made of, per input of the projection",
    "a few times d_in are enough (Gupta et al., ACL 2025, arXiv 2506.04226)",
)
FACTS = assumed(
    2 / 3,
    "share of those tokens that comes from the shipped facts, as far as they go",
    "sampling the rest from the model takes longer",
)
CACHE_BYTES = 2 * 2**30  # of keys and values, of the sequences sampled together
SEED = 20240607
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Moment:
    """Second moment of one layer's keys."""

    layer: int
    matrix: Tensor  # (d_in, d_in) float32
    tokens: int
    sample: str  # "self" or the corpus' digest


def facts_text(lm: LM, tokens: int) -> list[list[int]]:
    """The shipped facts as sentences, in sequences; about `tokens` ids, or fewer when there are no more facts."""
    rows: list[list[int]] = []
    have, text = 0, ""
    for sentence in sentences():
        text = f"{text} {sentence}".lstrip()
        ids: list[int] = lm.tokenizer(text)["input_ids"]
        if have + len(ids) > tokens:
            break
        if len(ids) >= SEQUENCE:
            rows.append(ids)
            have, text = have + len(ids), ""
    return rows


def sample_text(lm: LM, tokens: int, progress: Progress) -> list[list[int]]:
    """Sequences sampled from the model (temperature 1, the TOP likeliest), at least `tokens` ids in all.

    Each starts from an ordinary word of the vocabulary drawn at random (seeded), so that no corpus is needed.
    """
    generator = torch.Generator().manual_seed(SEED)
    starts = _word_tokens(lm)
    rows: list[list[int]] = []
    batch = min(256, -(-tokens // SEQUENCE), max(16, CACHE_BYTES // _cache_bytes(lm)))
    bos = lm.tokenizer("", add_special_tokens=True)["input_ids"][:1]
    while (have := sum(map(len, rows))) < tokens:
        picks = torch.randint(len(starts), (batch,), generator=generator).tolist()
        begin = torch.tensor([[*bos, starts[i]] for i in picks], device=lm.device)
        with lowered(lm, search_dtype(lm)):  # text need not be exact: any likely one will do
            tell = partial(_sampling, progress, have / tokens, batch / tokens)
            rows += _sampled(lm, begin, generator, tell).tolist()
    return rows


def _cache_bytes(lm: LM) -> int:
    """At most so many bytes of keys and values a sampled sequence holds."""
    return 2 * SEQUENCE * lm.n_layers * lm.d_model * lm.dtype.itemsize


def _sampling(progress: Progress, start: float, span: float, length: int) -> None:
    progress(min(1.0, start + span * length / SEQUENCE), "sampling text from the model")


@torch.no_grad()
def _sampled(lm: LM, ids: Tensor, generator: torch.Generator, tell: Callable[[int], None]) -> Tensor:
    """Continue rows of ids (n, k) by SEQUENCE tokens drawn from the TOP likeliest of each step."""
    cache = DynamicCache()
    step = ids
    for _ in range(SEQUENCE):
        tell(ids.shape[1])
        with record({"last": lm.layers[-1]}) as seen:
            lm.base_model(input_ids=step, past_key_values=cache, use_cache=True)
        likely = lm.head(seen["last"].reshape(*step.shape, -1)[:, -1]).float().topk(TOP)
        drawn = torch.multinomial(likely.values.softmax(-1).cpu(), 1, generator=generator).to(ids.device)
        step = likely.indices.gather(1, drawn)
        ids = torch.cat([ids, step], 1)
    return ids


def _word_tokens(lm: LM) -> list[int]:
    """Ids of vocabulary entries that decode to a capitalised word."""
    words = []
    for token, i in lm.tokenizer.get_vocab().items():
        text = token.replace("Ġ", "").replace("▁", "")
        if len(text) > 2 and text[0].isupper() and text.isalpha():
            words.append(i)
    return sorted(words) or list(range(min(256, len(lm.tokenizer))))


def corpus_text(lm: LM, path: Path, tokens: int) -> list[list[int]]:
    """The first `tokens` ids of a UTF-8 text file, in sequences. Raises EditError when there are too few."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EditError(f"the corpus {str(path)!r} cannot be read as UTF-8 text: {error}") from error
    ids: list[int] = lm.tokenizer(text[: tokens * 12], add_special_tokens=False)["input_ids"][:tokens]
    if len(ids) < SEQUENCE:
        raise EditError(f"the corpus {str(path)!r} has only {len(ids)} tokens; give at least {SEQUENCE}")
    return [ids[i : i + SEQUENCE] for i in range(0, len(ids) - 1, SEQUENCE)]


def dataset_text(lm: LM, name: str, tokens: int) -> list[list[int]]:
    """The first `tokens` ids of a data set's "text" column, read by the optional package `datasets`.

    `name` is "owner/name" or "owner/name:config". Raises NotReady without the package, EditError
    when the data set cannot be read or has no text.
    """
    try:
        import datasets
    except ImportError:
        raise NotReady(
            f"the data set {name!r} needs the package datasets (pip install datasets); or give a text file as corpus"
        ) from None
    path, _, config = name.partition(":")
    try:
        records = datasets.load_dataset(path, config or None, split="train", streaming=True)
        ids: list[int] = []
        for record in records:
            ids += lm.tokenizer(record["text"], add_special_tokens=False)["input_ids"]
            if len(ids) >= tokens:
                break
    except Exception as error:  # whatever the package raises for a wrong name or no network
        raise EditError(f"the data set {name!r} cannot be read: {error}") from error
    if len(ids) < SEQUENCE:
        raise EditError(
            f"the data set {name!r} has only {len(ids)} tokens of text; at least {SEQUENCE} are needed"
        )
    return [ids[i : i + SEQUENCE] for i in range(0, min(tokens, len(ids)) - 1, SEQUENCE)]


@dataclass(frozen=True)
class Condition:
    """How well a second moment is conditioned, before and after the ridge."""

    condition: float  # largest over smallest eigenvalue; inf when there are fewer tokens than inputs
    regularised: float  # the same with the ridge added
    effective_rank: float  # (sum of eigenvalues)^2 / sum of squares
    tokens_per_input: float  # below 1 the moment is singular; 2 and more are enough


def condition_of(moment: Moment, ridge: float, device: torch.device = CPU) -> Condition:
    """Spectrum of a second moment, found on `device`; `ridge` as the methods add it, in units of the mean diagonal."""
    matrix = placed(moment.matrix, device, 8)
    values = torch.linalg.eigvalsh(matrix.double()).clamp(min=0).cpu()
    top, floor = float(values[-1]), float(values[0])
    added = ridge * float(moment.matrix.diagonal().mean())
    return Condition(
        condition=top / floor if floor > 1e-12 * top else float("inf"),
        regularised=(top + added) / (floor + added),
        effective_rank=float(values.sum() ** 2 / values.square().sum()),
        tokens_per_input=moment.tokens / len(moment.matrix),
    )


@torch.no_grad()
def compute_moments(
    lm: LM, layers: Sequence[int], rows: Sequence[Sequence[int]], sample: str, progress: Progress
) -> dict[int, Moment]:
    """Second moments of the MLP output projections' inputs, all `layers` in one pass over `rows`.

    The first position of each sequence is left out: it is an attention sink whose key dwarfs all others.
    They are summed where the model is, or on the CPU when there is no room for them there.
    """
    modules = {i: lm.module(lm.mlp_out(i)) for i in layers}
    total: dict[int, Tensor] = {}
    count = 0
    for at in range(0, len(rows), 16):
        progress(at / len(rows), "second moments")
        batch = rows[at : at + 16]
        ids, mask = lm.pad(batch)
        inside = mask.clone()
        inside[:, 0] = 0
        with record(modules, inputs=True, stop=True) as seen:
            lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        for i, keys in seen.items():
            k = keys.reshape(*ids.shape, -1)[inside.bool().to(keys.device)].float()
            if i not in total:
                home = k.device if has_room(k.device, 3 * 4 * k.shape[1] ** 2) else CPU
                total[i] = torch.zeros(k.shape[1], k.shape[1], device=home)
            k = k.to(total[i].device)
            total[i].addmm_(k.t(), k)
        count += int(inside.sum())
    return {i: Moment(i, (total[i] / count).cpu(), count, sample) for i in layers}


def own_moments(lm: LM, layers: Sequence[int], tokens: int, progress: Progress) -> dict[int, Moment]:
    """The mean of two second moments that need no corpus: of the shipped facts, and of text sampled from the model.

    `tokens` in all, of which the facts are FACTS at most.
    """
    known = facts_text(lm, int(FACTS * tokens))
    spoken = sample_text(lm, tokens - sum(map(len, known)), lambda f, m: progress(0.5 * f, m))
    parts = [
        compute_moments(lm, layers, rows, "self", partial(_part, progress, start))
        for rows, start in ((known, 0.5), (spoken, 0.75))
        if rows
    ]
    return {i: _mean([part[i] for part in parts]) for i in layers}


def _part(progress: Progress, start: float, fraction: float, message: str) -> None:
    progress(start + 0.25 * fraction, message)


def _mean(parts: Sequence[Moment]) -> Moment:
    matrix = torch.stack([p.matrix for p in parts]).mean(0)
    return replace(parts[0], matrix=matrix, tokens=sum(p.tokens for p in parts))


def sample_name(corpus: Path | str | None) -> str:
    """What the second moments of a corpus are known by: "self", or its digest."""
    if corpus is None:
        return "self"
    try:
        data = corpus.read_bytes() if isinstance(corpus, Path) else corpus.encode()
    except OSError as error:
        raise EditError(f"the corpus {str(corpus)!r} cannot be read: {error}") from error
    return ("corpus" if isinstance(corpus, Path) else "dataset") + hashlib.sha256(data).hexdigest()[:12]


@dataclass
class Statistics:
    """The second moments of one model: in memory, and as safetensors under `folder`/<model hash>.

    `get` answers from memory or disk and raises NotReady when there is none; `ensure` makes what is
    missing. The model in `ensure` must be the pristine one. What is made of the moments is made on
    `device`, where it has the room, and kept on the CPU.
    """

    folder: Path
    model_hash: str
    tokens: int = 0  # 0: PER_INPUT times d_in
    device: torch.device = CPU
    _metrics: dict[tuple[int, str, float], Metric] = field(default_factory=dict)
    _projectors: dict[tuple[int, str, float], Projector] = field(default_factory=dict)
    _moments: dict[tuple[int, str], Moment] = field(default_factory=dict)

    def path(self, layer: int, sample: str) -> Path:
        return self.folder / self.model_hash[:16] / f"layer-{layer}-{sample}.safetensors"

    def get(self, layer: int, sample: str = "self") -> Moment:
        """The second moment of a layer. Raises NotReady when it has not been computed."""
        if (layer, sample) not in self._moments:
            path = self.path(layer, sample)
            if not path.exists():
                raise NotReady(
                    f"layer {layer} has no second moment of sample {sample!r}; call compute_statistics"
                )
            self._moments[layer, sample] = self._read(path, layer, sample)
        return self._moments[layer, sample]

    def metric(self, layer: int, ridge: float, sample: str = "self") -> Metric:
        """The factorised second moment, cached."""
        if (layer, sample, ridge) not in self._metrics:
            self._metrics[layer, sample, ridge] = Metric.of(
                self.get(layer, sample).matrix, ridge, self.device
            )
        return self._metrics[layer, sample, ridge]

    def projector(self, layer: int, energy: float, sample: str = "self") -> Projector:
        """The projector onto the null space of the second moment, cached."""
        if (layer, sample, energy) not in self._projectors:
            moment = self.get(layer, sample).matrix
            self._projectors[layer, sample, energy] = Projector.of(moment, energy, self.device)
        return self._projectors[layer, sample, energy]

    def missing(self, layers: Sequence[int], sample: str = "self") -> list[int]:
        return [i for i in layers if (i, sample) not in self._moments and not self.path(i, sample).exists()]

    def forget(self, layers: Sequence[int], sample: str = "self") -> None:
        """Delete second moments, on disk too, so that `ensure` makes them anew."""
        for i in layers:
            self.path(i, sample).unlink(missing_ok=True)
            self._moments.pop((i, sample), None)
            for key in [k for k in self._metrics if (k[0], k[1]) == (i, sample)]:
                del self._metrics[key]
            for key in [k for k in self._projectors if (k[0], k[1]) == (i, sample)]:
                del self._projectors[key]

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
        tokens = self.tokens or PER_INPUT * lm.weight(lm.mlp_out(missing[0])).shape[1]
        if corpus is None:
            made = own_moments(lm, missing, tokens, progress)
        else:
            rows = (
                corpus_text(lm, corpus, tokens)
                if isinstance(corpus, Path)
                else dataset_text(lm, corpus, tokens)
            )
            made = compute_moments(lm, missing, rows, sample, progress)
        for i, moment in made.items():
            self._write(moment)
            self._moments[i, sample] = moment
        return sample

    def _write(self, moment: Moment) -> None:
        header = {"model": self.model_hash, "tokens": str(moment.tokens), "sample": moment.sample}
        write_atomically(
            self.path(moment.layer, moment.sample), tensor_bytes({"matrix": moment.matrix}, header)
        )

    def _read(self, path: Path, layer: int, sample: str) -> Moment:
        try:
            tensors, header = read_tensors(path.read_bytes())
            matrix, model, tokens = tensors["matrix"], header["model"], int(header["tokens"])
        except (KeyError, ValueError) as error:
            raise EditError(
                f"the statistics file {path} is damaged ({error}); delete it and it is made anew"
            ) from error
        if model != self.model_hash:
            raise EditError(f"{path} holds statistics of another model ({model[:12]}); delete it")
        return Moment(layer, matrix, tokens, sample)

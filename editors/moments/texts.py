"""Text that second moments are computed from: the shipped facts, text sampled from the model, or a corpus."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from editors.bounded_files import UnreadableFile, read_start
from editors.constants import assumed
from editors.errors import EditError, NotReady
from editors.facts import sentences
from editors.model.activations import record
from editors.model.caches import new_cache
from editors.model.lm import LM
from editors.model.precision import forget, lowered, search_dtype

SEQUENCE = 48  # tokens of a sampled sequence
TOP = assumed(
    100, "likeliest tokens that text is sampled from", "keeps rare tokens out; no comparison is known"
)
CACHE_BYTES = 2 * 2**30  # of keys and values, for the sequences that are sampled together
CHARACTERS = 12  # of a corpus that are read for each token
SEED = 20240607
Progress = Callable[[float, str], None]
"""Called with a share done (0..1) and what is being done; may raise to cancel."""


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
    try:
        while (have := sum(map(len, rows))) < tokens:
            picks = torch.randint(len(starts), (batch,), generator=generator).tolist()
            begin = torch.tensor([[*bos, starts[i]] for i in picks], device=lm.device)
            tell = partial(_sampling, progress, have / tokens, batch / tokens)
            rows += _sampled(lm, begin, generator, tell).tolist()
    finally:
        forget(lm)
    return rows


def _cache_bytes(lm: LM) -> int:
    """At most so many bytes of keys and values a sampled sequence holds."""
    return 2 * SEQUENCE * lm.n_layers * lm.d_model * lm.dtype.itemsize


def _sampling(progress: Progress, start: float, span: float, length: int) -> None:
    progress(min(1.0, start + span * length / SEQUENCE), "sampling text from the model")


@torch.no_grad()
def _sampled(lm: LM, ids: Tensor, generator: torch.Generator, tell: Callable[[int], None]) -> Tensor:
    """Continue rows of ids (n, k) by SEQUENCE tokens drawn from the TOP likeliest of each step.

    `tell` is called between the steps, when the model is in its own precision: others may have it meanwhile.
    """
    cache = new_cache(lm)
    step = ids
    for _ in range(SEQUENCE):
        tell(ids.shape[1])
        with lowered(lm, search_dtype(lm), keep=True):  # text need not be exact: any likely one will do
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
    most = tokens * CHARACTERS  # more text than that many tokens need
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(
            read_start(path, 4 * most)
        )  # may end in a character
    except (OSError, UnreadableFile, UnicodeDecodeError) as error:
        raise EditError(f"the corpus {str(path)!r} cannot be read as UTF-8 text: {error}") from error
    ids: list[int] = lm.tokenizer(text[:most], add_special_tokens=False)["input_ids"][:tokens]
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
    if Path(path).exists():  # the package would take a folder of this name for the data set
        raise EditError(f"the data set {name!r} cannot be read: the name of a data set on the hub is needed")
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

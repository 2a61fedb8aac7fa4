"""Generation in a batch that prompts can join and leave between two tokens.

    decoder = Decoder(lm)
    decoder.add([DecodedRow([1, 2, 3], most=20)])
    while decoder.rows:
        decoder.step()         # one more token for each row
        decoder.add([...])     # others may join at any time

A row gets the same tokens whoever else is in the batch; only the last bits of their probabilities may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from editors.errors import Unsupported
from editors.model.beginnings import attends_to_all, read_beginnings, read_on
from editors.model.caches import join, keep_rows, new_cache
from editors.model.packing import may_pack, packs, read_packed
from editors.model.said import COLDEST, Score, TokenLogprob, token_logprob
from editors.model.scores_after import scores_after
from editors.model.spoken_model import SpokenModel


@dataclass(eq=False)
class DecodedRow:
    """One prompt and what has been generated for it."""

    prompt: list[int]
    most: int  # tokens to generate at most
    temperature: float = 0.0  # 0 is greedy
    seed: int | None = None
    top_p: float = 1.0  # sample from the fewest most probable tokens that have this share of the probability
    logprobs: int | None = None  # return the tokens' probabilities, with this many alternatives each
    answers: Sequence[
        Sequence[int]
    ] = ()  # token ids of answers to score after the prompt; see `Decoder.scores`
    scores: list[Score] = field(default_factory=list)  # of `answers`
    told: list[TokenLogprob] = field(default_factory=list)  # of each token in `new`
    new: list[int] = field(default_factory=list)  # without the end-of-text token
    finished: bool = False  # the model ended by itself
    full: bool = False  # `most` tokens are there

    @cached_property
    def random(self) -> torch.Generator:
        """The row's own random numbers, so that its sample does not depend on its neighbours in the batch."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def decodes_together(lm: SpokenModel) -> bool:
    """Whether prompts can be continued in one batch that others join: an encoder-decoder model cannot."""
    return not lm.is_seq2seq


class Decoder:
    """Decodes rows of one decoder-only model together, with a cache of what each row has read.

    The model must not change while there are rows. Raises Unsupported for an encoder-decoder model.
    """

    def __init__(self, lm: SpokenModel) -> None:
        if not decodes_together(lm):
            raise Unsupported("an encoder-decoder model is not decoded in a joint batch; use its `generate`")
        self._lm = lm
        self.rows: list[DecodedRow] = []  # those that are not complete yet
        self._cache: Any = None
        self._stale: tuple[list[int], int] | None = None
        """Rows of the cache that are still wanted, and from which column on, where others have left since."""
        self._mask = torch.empty(0, 0, dtype=torch.long)  # (rows, columns): 0 where a row has no token
        self._ends = lm.local.end_ids()
        penalty = getattr(lm.model.generation_config, "repetition_penalty", None) or 1.0
        self._penalty = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1.0 else None

    @property
    def width(self) -> int:
        """Columns of the cache: the longest row's tokens, and padding."""
        return int(self._mask.shape[1])

    def scores(self, columns: int) -> bool:
        """Whether rows may have `answers` to score, with so many columns in all."""
        return attends_to_all(self._lm, columns)

    @torch.no_grad()
    def add(self, rows: Sequence[DecodedRow]) -> None:
        """Read the prompts of these rows, those of similar length together, and generate their first tokens.

        Their answers are scored from there.
        """
        if not rows:
            return
        prompts = [row.prompt for row in rows]
        packed = may_pack(self._lm, 2 * max(len(row.prompt) + row.most for row in rows))
        groups = packs(self._lm, prompts) if packed else self._lm.buckets([len(ids) for ids in prompts])
        read = self._read_packed if packed else self._read
        logits = torch.cat([read([rows[i] for i in some]) for some in groups])
        new = self.rows[len(self.rows) - len(rows) :]
        if any(row.answers for row in new):
            self._score(new, logits)
        self._extend(new, logits)
        self._leave()

    def _score(self, new: Sequence[DecodedRow], logits: Tensor) -> None:
        """Score the answers of the last rows."""
        before = len(self.rows) - len(new)
        found = scores_after(self._lm, logits, self._mask, self._cache, before, [row.answers for row in new])
        for row, scores in zip(new, found, strict=True):
            row.scores = scores

    def _read_packed(self, rows: Sequence[DecodedRow]) -> Tensor:
        """As `_read`, all prompts in one row."""
        packed = read_packed(self._lm, [row.prompt for row in rows])
        width = max(len(row.prompt) for row in rows)
        self._put(rows, *packed.columns(range(len(rows)), width))
        last = torch.tensor([path[-1] for path in packed.places], device=packed.states.device)
        return self._lm.head(packed.states[last]).float()

    def _read(self, rows: Sequence[DecodedRow]) -> Tensor:
        """Read prompts, and put them below the rows there are; logits (n, vocabulary) of the tokens that follow."""
        begun = read_beginnings(self._lm, [row.prompt for row in rows], max(row.most for row in rows))
        if begun is not None:
            ids, mask, cache = begun.ids[:, begun.columns :], begun.mask, begun.past
        else:
            ids, mask = self._lm.pad([row.prompt for row in rows], left=True)
            cache = new_cache(self._lm)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with self._lm.local.ending_at([ids.shape[1] - 1] * len(rows)):
            logits = self._forward(ids, mask, positions, cache)
        self._put(rows, cache, mask)
        return logits

    def _put(self, rows: Sequence[DecodedRow], cache: Any, mask: Tensor) -> None:
        """Put rows whose prompts were read below those there are."""
        if self.rows:
            self._tidy()
            self._join(cache, mask)
        else:
            self._cache, self._mask = cache, mask
        self.rows = [*self.rows, *rows]

    @torch.no_grad()
    def step(self) -> None:
        """Generate one more token for every row; rows that are complete leave."""
        last = torch.tensor([[row.new[-1]] for row in self.rows], device=self._mask.device)
        self._tidy()
        self._mask = torch.cat([self._mask, torch.ones_like(last)], 1)
        positions = self._mask.sum(1, keepdim=True) - 1
        self._extend(self.rows, self._forward(last, self._mask, positions, self._cache))
        self._leave()

    def drop(self, rows: Sequence[DecodedRow]) -> None:
        """Take rows out before they are complete."""
        for row in rows:
            row.full = True
        self._leave()

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Logits (n, vocabulary) of the token after the last column; the cache grows by the columns of `ids`."""
        logits: Tensor = read_on(self._lm, ids, mask, positions, cache).logits[:, -1].float()
        return logits

    def _extend(self, rows: Sequence[DecodedRow], logits: Tensor) -> None:
        tokens = logits.argmax(-1).tolist() if self._penalty is None else [None] * len(rows)
        for i, row in enumerate(rows):
            token = tokens[i]
            if token is None or row.temperature > 0:
                token = self._choose(row, logits[i])
            if token in self._ends:
                row.finished = True
            else:
                row.new.append(token)
                row.full = len(row.new) >= row.most
                if row.logprobs is not None:
                    row.told.append(token_logprob(logits[i].log_softmax(-1), token, row.logprobs))

    def _choose(self, row: DecodedRow, logits: Tensor) -> int:
        if self._penalty is not None:
            said = torch.tensor([row.prompt + row.new], device=logits.device)
            logits = self._penalty(said, logits[None])[0]
        if row.temperature <= 0:
            return int(logits.argmax())
        shares = (logits / max(row.temperature, COLDEST)).softmax(-1).cpu()
        if row.top_p < 1:
            shares = nucleus(shares, row.top_p)
        return int(torch.multinomial(shares, 1, generator=row.random))

    def _join(self, cache: Any, mask: Tensor) -> None:
        """Put the rows of another cache below those there are, all padded on the left to the same width."""
        width = max(self._mask.shape[1], mask.shape[1])
        join(self._cache, cache, width)
        parts = [torch.nn.functional.pad(m, (width - m.shape[1], 0)) for m in (self._mask, mask)]
        self._mask = torch.cat(parts)

    def _leave(self) -> None:
        """Remove complete rows, and the columns that no other row fills."""
        stay = [i for i, row in enumerate(self.rows) if not (row.finished or row.full)]
        if len(stay) == len(self.rows):
            return
        kept, begin = self._stale or (list(range(len(self.rows))), 0)
        self.rows = [self.rows[i] for i in stay]
        if not stay:
            self._cache, self._mask, self._stale = None, self._mask[:0, :0], None
            return
        mask = self._mask[stay]
        start = int(mask.any(0).long().argmax())
        self._mask = mask[:, start:]
        self._stale = [kept[i] for i in stay], begin + start

    def _tidy(self) -> None:
        """Take out of the cache what rows have left there."""
        if self._stale is not None:
            keep_rows(self._cache, *self._stale)
            self._stale = None


def nucleus(shares: Tensor, top_p: float) -> Tensor:
    """The fewest most probable tokens that have `top_p` of the probability in all; the others get none.

    Holtzman et al. 2020, arXiv 1904.09751. `shares`: probabilities (vocabulary,); the result is not normalised.
    """
    ordered, index = shares.sort(descending=True)
    kept = ordered.cumsum(0) - ordered < top_p
    return torch.zeros_like(shares).scatter(0, index[kept], ordered[kept])

"""Greedy continuations of many prompts: as many at once as there is room for; what is complete makes room."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from editors.constants import limit
from editors.model.decoding import DecodedRow, Decoder
from editors.model.said import Generation, Until
from editors.model.spoken_model import SpokenModel
from editors.model.text import BATCH_TOKENS

LOGITS = limit(
    2**24,
    "next-token logits that are computed at once, at most",
    "memory: 64 MB in float32; it divides prompts into batches, by the size of the vocabulary",
)
LEAST = 16  # prompts at once, whatever the vocabulary
ALIKE = 8  # tokens: texts whose lengths differ by less may be continued side by side


def continued(
    lm: SpokenModel,
    prompts: Sequence[list[int]],
    lengths: Sequence[int],
    until: Until | None = None,
    answers: Mapping[int, Sequence[Sequence[int]]] | None = None,
    between: Callable[[bool], None] = lambda in_text: None,
) -> list[Generation]:
    """Continue prompts (token ids) greedily, each by at most so many tokens. Of a decoder-only model.

    Args:
        until: may end a text earlier; it is asked after every token.
        answers: token ids of answers to some of the prompts, by index; they are scored where the model can score them
            with the prompt that it reads.
        between: called before every pass, with whether that is in the middle of texts.
    """
    run = _Run(lm, prompts, lengths, answers or {})
    while run.waiting or run.rows:
        between(bool(run.rows))
        run.go_on()
        run.end(
            [
                i
                for i, row in run.rows.items()
                if row.finished or row.full or (until is not None and until(i, _text(lm, row)))
            ]
        )
    return [run.done[i] for i in range(len(prompts))]


def _text(lm: SpokenModel, row: DecodedRow) -> str:
    text: str = lm.tokenizer.decode(row.new, skip_special_tokens=True)
    return text


class _Run:
    """Prompts that wait, those that are being continued, and the texts of those that are complete."""

    def __init__(
        self,
        lm: SpokenModel,
        prompts: Sequence[list[int]],
        lengths: Sequence[int],
        answers: Mapping[int, Sequence[Sequence[int]]],
    ) -> None:
        self._lm, self._prompts, self._lengths = lm, prompts, lengths
        self._decoder = Decoder(lm)
        columns = max((len(p) + n for p, n in zip(prompts, lengths, strict=True)), default=0)
        self._answers = answers if answers and self._decoder.scores(2 * columns) else {}
        self._most = max(LEAST, LOGITS // lm.model.config.get_text_config().vocab_size)
        order = sorted(range(len(prompts)), key=lambda i: (-(lengths[i] // ALIKE), tuple(prompts[i])))
        self.waiting = deque(order)
        self.rows: dict[int, DecodedRow] = {}
        self.done: dict[int, Generation] = {}

    def go_on(self) -> None:
        """One more token for every text, and the first one for those that there is room for."""
        if self.rows:
            self._decoder.step()
        if 2 * len(self.rows) <= self._most:  # a few at a time would cost a pass each
            self._decoder.add(list(self._next()))

    def _next(self) -> Iterator[DecodedRow]:
        width = max((len(r.prompt) + r.most for r in self.rows.values()), default=0)
        while self.waiting and len(self.rows) < self._most:
            i = self.waiting[0]
            width = max(width, len(self._prompts[i]) + self._lengths[i])
            if self.rows and (len(self.rows) + 1) * width > BATCH_TOKENS:
                return
            self.waiting.popleft()
            self.rows[i] = DecodedRow(self._prompts[i], self._lengths[i], answers=self._answers.get(i, ()))
            yield self.rows[i]

    def end(self, complete: Sequence[int]) -> None:
        """Note the texts of prompts that are complete."""
        for i in complete:
            row = self.rows.pop(i)
            if not (row.finished or row.full):
                self._decoder.drop([row])
            self.done[i] = Generation(
                _text(self._lm, row), len(row.new), row.finished, scores=tuple(row.scores)
            )

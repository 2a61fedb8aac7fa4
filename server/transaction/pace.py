"""How often long work on the model lets waiting questions through, and for how long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from editors.constants import limit

LEAST = limit(
    1.0,
    "seconds that long work has the model between two turns that it gives to waiting questions, at least; and as long "
    "as the last such turn took",
    "the speed of edits: a person waits some seconds for an answer; an edit beside many questions takes "
    "twice as long at most",
)
SLICE = limit(
    2.0,
    "seconds that answering has the model at a time while other work waits for it",
    "the speed of edits: an edit and questions have the model in turn, for about as long each, however long the "
    "answers are",
)


class Pace:
    """The clock of the turn at the model that runs now. Holders of the model's lock use it."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._last = 0.0
        self.paused = 0.0
        """Seconds, in total, for which turns were interrupted to let others through."""

    def begin(self) -> None:
        """A turn begins."""
        self._since, self._last = time.monotonic(), 0.0

    def clock(self) -> float:
        """Seconds on a clock that stands still while a turn is interrupted to let others through."""
        return time.monotonic() - self.paused

    @property
    def is_due(self) -> bool:
        """Whether the turn has had the model for long enough to let others through."""
        return time.monotonic() - self._since >= max(LEAST, self._last)

    @property
    def slice_is_over(self) -> bool:
        """Whether a turn of answering has had the model for as long as others should wait for it."""
        return time.monotonic() >= self._since + SLICE

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Others have the model in this block."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._since = time.monotonic()
            self._last = self._since - started
            self.paused += self._last

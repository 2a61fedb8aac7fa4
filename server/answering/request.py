"""One request to the model: prompts to continue, answers to score, and the way back to whoever asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from editors.model.lm import Generation, Prompt, Score
from server.request_context import RequestContext


@dataclass(frozen=True)
class Question:
    """A prompt to continue."""

    prompt: Prompt
    max_new_tokens: int
    temperature: float = 0.0  # 0 is greedy
    seed: int | None = None


@dataclass(frozen=True)
class Answers:
    """What the model said, in the order of what was asked."""

    generations: list[Generation]
    scores: list[Score]


@dataclass(eq=False)
class Request:
    """What one client asks at once. All of it is answered by one state of the model.

    `base` asks the pristine model. `on_token(question, ids)` is called after every token with the index of the
    question and all its tokens so far, from the thread that decodes: it must be quick.
    """

    questions: Sequence[Question] = ()
    pairs: Sequence[tuple[Prompt, str]] = ()  # answers to score after prompts
    base: bool = False
    ctx: RequestContext = field(default_factory=RequestContext)
    on_token: Callable[[int, Sequence[int]], None] | None = None
    answer: Future[Answers] = field(default_factory=Future)

    @property
    def gone(self) -> bool:
        """True when nobody waits for the answer any more."""
        return self.answer.done() or self.ctx.cancelled.is_set()

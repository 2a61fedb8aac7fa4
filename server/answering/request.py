"""One request to the model: prompts to continue, answers to score, and the way back to whoever asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from editors.model.lm import Generation, Prompt, Score, TokenLogprob
from editors.steering.stack import Dose
from server.request_context import RequestContext


@dataclass(frozen=True)
class Continuation:
    """A prompt to continue."""

    prompt: Prompt
    max_new_tokens: int
    temperature: float = 0.0  # 0 is greedy
    seed: int | None = None
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    logprobs: int | None = None  # return the tokens' probabilities, with this many alternatives each
    until: Callable[[str], bool] | None = field(default=None, compare=False)
    """May end the text earlier, given what it says so far; a memory that answers may ignore it."""


@dataclass(frozen=True)
class Steered:
    """A steering vector at a dose, for the requests that name it alone."""

    name: str
    multiplier: float
    blob: str  # of the dose: the vector may be replaced by one of the same name, or get another condition
    dose: Dose = field(compare=False, repr=False)


@dataclass(frozen=True)
class Answers:
    """What the model said, in the order of what was asked."""

    generations: list[Generation]
    scores: list[Score]
    reads: list[list[TokenLogprob]] = field(default_factory=list)
    state: str = ""  # hash of the state that answered


View = tuple[bool, tuple[Steered, ...]]
"""The pristine model or the live one, and the doses on top."""
OnToken = Callable[[int, Sequence[int], Sequence[TokenLogprob]], None]


@dataclass(eq=False)
class Request:
    """What one client asks at once. All of it is answered by one state of the model.

    `base` asks the pristine model. Requests for different states of the model are never in one batch.
    `on_token(question, ids, logprobs)` is called after every token with the index of the question and all its tokens so
    far, with their probabilities where those are asked for, from the thread that decodes: it must be quick. For an
    answer of a memory, which comes whole, it is not called.
    """

    questions: Sequence[Continuation] = ()
    pairs: Sequence[tuple[Prompt, str]] = ()  # answers to score after prompts
    reads: Sequence[
        tuple[Sequence[int], int]
    ] = ()  # token ids whose probability is wanted; alternatives of each
    base: bool = False
    steering: tuple[Steered, ...] = ()  # on top of the doses that are on for everybody
    ctx: RequestContext = field(default_factory=RequestContext)
    on_token: OnToken | None = None
    answer: Future[Answers] = field(default_factory=Future)

    @property
    def view(self) -> View:
        """The state of the model that it asks for."""
        return self.base, self.steering

    @property
    def gone(self) -> bool:
        """True when nobody waits for the answer any more."""
        return self.answer.done() or self.ctx.cancelled.is_set()

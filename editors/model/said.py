"""What a model has said: scores, tokens with their probabilities, continuations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from editors.model.text import Prompt

COLDEST = 1e-6
"""The least temperature that is not 0; logits divided by a smaller one would not be finite."""
Until = Callable[[int, str], bool]
"""A function: whether a text is long enough, given the index of its prompt and the text so far."""


@dataclass(frozen=True)
class Score:
    """How probable an answer is after a prompt, with the answer's own tokens given one after another."""

    logprob: float  # sum over the answer's tokens, natural log
    tokens: int
    rank: int  # of the first answer token; 0 is the most probable


@dataclass(frozen=True)
class Claim:
    """A memory's claim to one prompt: what is asked instead, and why."""

    prompt: Prompt  # what the answering model is given, for example with the remembered fact in front
    entry: str  # the memory entry
    score: float  # how sure the scope decision is, 0..1


@dataclass(frozen=True)
class TokenLogprob:
    """One token of a text, and how probable it was where it stands (natural log, before temperature)."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # the most probable tokens there, the most probable first


@dataclass(frozen=True)
class Generation:
    """A continuation of one prompt."""

    text: str
    tokens: int
    finished: bool  # True when the model ended by itself, or said a stop string
    claim: Claim | None = None  # the memory that answered in place of the model's own weights
    logprobs: tuple[TokenLogprob, ...] | None = None  # if they were asked for and are known
    scores: tuple[Score, ...] = ()  # of the answers that were given to score, if they were scored with it


def token_logprob(logp: Tensor, token: int, top: int) -> TokenLogprob:
    """The TokenLogprob of one token: `logp` (vocabulary) are the log-probabilities at its place."""
    best = logp.topk(min(top, len(logp)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return TokenLogprob(token, float(logp[token]), tuple(pairs))

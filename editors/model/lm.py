"""One loaded model as the editors see it: its text, its weights, and its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.model.activations import record
from editors.model.routes import Route, Routes
from editors.model.said import Claim, Generation, Score, TokenLogprob, Until
from editors.model.speaking import LocalSpeaker, Speaker
from editors.model.spoken_model import SpokenModel
from editors.model.text import BATCH_TOKENS, END, Prompt, PromptEncoder, separator_after
from editors.model.weights import Weights, hash_tensor

__all__ = [
    "BATCH_TOKENS",
    "END",
    "LM",
    "Claim",
    "Generation",
    "Prompt",
    "Route",
    "Score",
    "TokenLogprob",
    "hash_tensor",
    "separator_after",
]


class LM(SpokenModel):
    """A causal or encoder-decoder language model with its tokenizer.

    Every parameter is frozen and the model is in evaluation mode from here on. Not thread-safe: the host's lock
    guards it.
    """

    local: LocalSpeaker

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        Weights.__init__(self, model)
        PromptEncoder.__init__(self, tokenizer, name, seq2seq=self.arch.is_seq2seq)
        self.name = name
        self.local = LocalSpeaker(self)
        self.speaker: Speaker = self.local  # what answers; another engine may take its place
        self.routes = Routes(self)
        self._extensions = {}

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Residual stream after the last layer, before the final norm: (n, length, d_model)."""
        with record({"last": self.layers[-1]}) as seen:
            self.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return seen["last"].to(self.device)

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """Probability and rank of answers after prompts; memories answer the prompts in their scope."""
        return (self.routes if self.routes.acting else self.speaker).score(pairs)

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | Sequence[int],
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        until: Until | None = None,
        answers: Mapping[int, Sequence[str]] | None = None,
    ) -> list[Generation]:
        """As Speaker.generate; memories answer in their scope.

        `answers` to some of the prompts, by index, are scored where this costs next to nothing; see
        `Generation.scores`.
        """
        if self.routes.acting:
            return self.routes.generate(
                prompts, max_new_tokens, temperature=temperature, seed=seed, until=until, answers=answers
            )
        scored = {"answers": answers} if answers and self.speaker is self.local else {}
        return self.speaker.generate(
            prompts, max_new_tokens, temperature=temperature, seed=seed, until=until, **scored
        )

    def unrouted(self) -> AbstractContextManager[None]:
        """The model's own weights answer everything in this block."""
        return self.routes.off()

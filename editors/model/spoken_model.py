"""The protocol of the model that a speaker runs: its weights and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from editors.model.text import Prompt, PromptEncoder
from editors.model.weights import Weights

E = TypeVar("E")


class TextEnds(Protocol):
    """What is known of the ends of prompts and texts."""

    def end_ids(self) -> set[int]:
        """The tokens that end a text."""

    def ending_at(self, ends: Sequence[int]) -> AbstractContextManager[None]:
        """Note where the prompts of the running batch end."""


class SpokenModel(Weights, PromptEncoder):
    """A model with its tokenizer."""

    local: TextEnds
    _extensions: dict[type, Any]

    def room_after(self, prompt: Prompt, wanted: int) -> int:
        """How many of so many tokens the model has positions for after a prompt."""
        if (
            self.context is None or not self.decoder_reads_prompt
        ):  # an encoder reads the prompt: the answer has all positions
            return wanted
        return min(wanted, self.context - len(self.encode(prompt)[0]))

    def extension(self, kind: type[E]) -> E:
        """The one object of a class that belongs to this model, made at first use as `kind(lm)`.

        So what acts on a model (steering doses, lowered copies) keeps its state here without being known here.
        """
        if kind not in self._extensions:
            self._extensions[kind] = kind(self)  # type: ignore[call-arg]
        found: E = self._extensions[kind]
        return found

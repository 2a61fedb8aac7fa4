"""The protocol of the model that a speaker runs: its weights and its tokenizer."""

from __future__ import annotations

from editors.model.text import PromptEncoder
from editors.model.weights import Weights


class SpokenModel(Weights, PromptEncoder):
    """A model with its tokenizer."""

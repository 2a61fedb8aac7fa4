"""Prompt vectors: the change that an instruction makes to the model's states on the same words.

As in repeng and in Zou et al. 2023 (arXiv 2310.01405), the model reads the same openings after two
different instructions, and the states at the openings' tokens are compared.
"""

from __future__ import annotations

from torch import Tensor

from editors.errors import InvalidEdit
from editors.model.lm import LM, Prompt
from editors.steering.directions import mean_difference
from editors.steering.method import ResidualMethod, VectorInput
from editors.steering.states import Side

# Everyday beginnings of sentences, written for this project.
OPENINGS = (
    "I think that",
    "The first thing to say is",
    "Yesterday, when I came home,",
    "To answer that,",
    "Let me tell you about",
    "It was a morning like",
    "The people in the street",
    "When I look at this, I",
    "My view of the matter is",
    "There are several ways to",
    "In the end, we",
    "The book on the table",
    "What happened next was",
    "My friend said to me that",
    "This kind of work",
    "Nobody had expected that",
    "If you ask me,",
    "The house at the corner",
    "On the one hand,",
    "Thank you for the question, I",
    "During the meeting, she",
    "The weather that day",
    "Every time I try to",
    "So here is what",
)
_REQUESTS = ("Write something.", "What do you think?", "Tell me about your day.", "Go on.")


class InstructionVector(ResidualMethod):
    """What an instruction does to the model's states, as a vector."""

    name = "prompt"
    description = "what an instruction does, as a vector"
    when = "You can say what you want in one sentence and have no pairs."
    source = "Zou et al. 2023, arXiv 2310.01405; repeng"
    takes = "prompts"

    def sides(self, lm: LM, given: VectorInput) -> list[tuple[Side, Side]]:
        if given.pairs is not None:
            raise InvalidEdit(
                "method prompt takes positive_prompt and negative_prompt, not pairs; leave pairs out"
            )
        if not given.positive_prompt or not given.positive_prompt.strip():
            raise InvalidEdit(
                "method prompt needs positive_prompt, the instruction that the vector stands for"
            )
        negative = (given.negative_prompt or "").strip() or None
        if negative == given.positive_prompt.strip():
            raise InvalidEdit("positive_prompt and negative_prompt are the same; they must differ")
        return instruction_sides(lm, given.positive_prompt.strip(), negative)

    def direction(self, differences: Tensor) -> Tensor:
        return mean_difference(differences)


def instruction_sides(lm: LM, positive: str, negative: str | None) -> list[tuple[Side, Side]]:
    """The openings after each instruction (the negative one may be none at all), as pairs."""
    return [
        (
            Side(_under(lm, positive, _REQUESTS[i % len(_REQUESTS)]), opening),
            Side(_under(lm, negative, _REQUESTS[i % len(_REQUESTS)]), opening),
        )
        for i, opening in enumerate(OPENINGS)
    ]


def _under(lm: LM, instruction: str | None, request: str) -> Prompt:
    text = f"{instruction} {request}" if instruction else request
    if not lm.decoder_reads_prompt:
        return Prompt(text, False, 0, "")
    prompt = lm.prompt(text, chat=True)
    return prompt if lm.tokenizer.chat_template else Prompt(f"{text}\n", False, 0, "")

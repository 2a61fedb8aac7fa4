"""The request every method understands: one fact to correct, and what to measure it with."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from editors.normal_form import difference, spelled_in

MAX_CHARS = 4_000
PLACEHOLDER = "{}"


def _clean(text: str) -> str:
    if "\x00" in text:
        raise ValueError("contains a NUL byte; remove it")
    if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        raise ValueError("contains a lone surrogate, which is not valid text; send well-formed Unicode")
    if not text.strip():
        raise ValueError("is empty; give at least one visible character")
    if len(text) > MAX_CHARS:
        raise ValueError(f"has {len(text):,} characters; the most is {MAX_CHARS:,}")
    return text


Text = Annotated[str, AfterValidator(_clean)]


ProbeKind = Literal["paraphrase", "neighbour", "portability", "form", "sibling", "hold"]
"""form: the fact as it was not learned; sibling: another fact of the subject; hold: one that the edit was to keep."""


class Neighbour(BaseModel):
    """A prompt whose answer must stay as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Text = Field(description="A sentence up to its answer, or a question.")
    answer: Text | None = Field(None, description="Left out: the model's own answer before the edit.")


class Probe(BaseModel):
    """A prompt whose answer must follow from the edit (one hop further, an alias ...)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Text = Field(description="The prompt.")
    answer: Text = Field(description="The answer that should follow.")


class Edit(BaseModel):
    """One fact to correct.

    `prompt` contains the subject (or `{}` in its place) and ends where the answer begins:
    "The capital of {} is" or "The capital of France is". A question ("What is the capital
    of France?") is put to the model in its chat template where it has one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: Text = Field(description="What the fact is about, as it stands in the prompt.")
    prompt: Text = Field(
        description="The sentence up to where the answer begins, or a question, with the subject or {} in it."
    )
    target: Text = Field(description="The right answer.")
    previous: Text | None = Field(None, description="The answer it corrects.")
    paraphrases: tuple[Text, ...] = Field(
        (), description="Other wordings, to measure generality; {} is the subject."
    )
    neighbours: tuple[Neighbour, ...] = Field((), description="Other subjects' prompts, to measure locality.")
    portability: tuple[Probe, ...] = Field((), description="Prompts whose answers follow from the edit.")
    holds: tuple[Neighbour, ...] = Field(
        (),
        description="Other facts that the edit must keep, of the subject above all; {} is the subject.",
    )
    reason: Text | None = Field(None, description="Why; kept on the ledger.")
    source: Text | None = Field(None, description="Where the answer comes from.")

    @field_validator("subject", "target", mode="after")
    @classmethod
    def _strip(cls, value: str) -> str:
        return value.strip()

    @field_validator("holds", mode="after")
    @classmethod
    def _fill_holds(cls, holds: tuple[Neighbour, ...], info: ValidationInfo) -> tuple[Neighbour, ...]:
        subject = info.data.get("subject", PLACEHOLDER)
        return tuple(
            hold.model_copy(update={"prompt": hold.prompt.replace(PLACEHOLDER, subject).rstrip()})
            for hold in holds
        )

    @field_validator("paraphrases", mode="after")
    @classmethod
    def _fill_paraphrases(cls, texts: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        subject = info.data.get("subject", PLACEHOLDER)
        return tuple(text.replace(PLACEHOLDER, subject) for text in texts)

    @field_validator("prompt", mode="after")
    @classmethod
    def _no_trailing_space(cls, value: str) -> str:
        return value.rstrip()

    @model_validator(mode="after")
    def _subject_in_prompt(self) -> Edit:
        if self.prompt.count(PLACEHOLDER) > 1:
            raise ValueError(
                f"prompt {self.prompt!r} has more than one {{}}; keep one, where the subject stands"
            )
        if PLACEHOLDER in self.prompt or self.subject in self.prompt:
            return self
        spelled = spelled_in(self.prompt, self.subject)
        if spelled is None:
            raise ValueError(
                f"prompt {self.prompt!r} does not contain the subject {self.subject!r}{self._nearly()}; "
                "write the subject exactly as it stands in the prompt, or put {} in its place"
            )
        self.__dict__["subject"] = spelled  # only apostrophes, spaces or composition differ
        return self

    def _nearly(self) -> str:
        found = difference(self.prompt, self.subject)
        return f" ({found})" if found else ""

    @model_validator(mode="after")
    def _holds_another_fact(self) -> Edit:
        if any(hold.prompt == self.text for hold in self.holds):
            raise ValueError(
                f"holds has the edit's own prompt {self.text!r}, whose answer is to change; take it out of holds"
            )
        return self

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace(PLACEHOLDER, self.subject)

    @property
    def span(self) -> tuple[int, int]:
        """Character range of the subject in `text`: the `{}`, else its last whole-word occurrence."""
        placed = PLACEHOLDER in self.prompt
        start = self.prompt.index(PLACEHOLDER) if placed else find_subject(self.text, self.subject)
        return start, start + len(self.subject)

    @property
    def is_question(self) -> bool:
        """True when the prompt is a question, which is put to the model through its chat template."""
        return is_question(self.text)


def find_subject(text: str, subject: str) -> int:
    """Index of the last whole-word occurrence of `subject` in `text` (last of any kind if none is whole).

    Raises ValueError when it does not occur.
    """
    whole = [m.start() for m in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text)]
    return whole[-1] if whole else text.rindex(subject)


def ends_in_word(text: str) -> bool:
    """True for a text whose last word could continue, as "Krakow" to "Krakowian". Never for Chinese, for example."""
    return text[-1:].isascii() and text[-1:].isalnum()


def is_question(text: str) -> bool:
    """True for a text that ends in a question mark (any script's)."""
    return text.rstrip().endswith(("?", "？", "؟", "\u037e"))

"""One fact in one form, a fact that must stay, and all of both that belong to one edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from editors.edit import is_question
from editors.model.lm import LM, Prompt

FormKind = Literal["statement", "reworded", "chat", "chat_reworded", "language"]
HoldSource = Literal["ledger", "checked", "relation", "caller"]


def prompt_in(lm: LM, text: str, question: str = "", chat: bool | None = None) -> Prompt:
    """A text as the model sees it. With a `question`: as the beginning of the assistant's answer to it.

    The prompt's `offset` is where `text` starts, so a span in `text` can be given to `lm.last_subject_token`.
    """
    return lm.prompt_in_answer(text, question, chat)


def asked_in(lm: LM, statement: str, question: str) -> Prompt:
    """A statement to be continued: inside the answer to a question if the model has a chat template.

    A chat model knows more there than of the bare statement (default model: 62 of 156 facts against 47).
    """
    return prompt_in(lm, statement, question if lm.has_chat_template else "", chat=False)


@dataclass(frozen=True)
class Form:
    """One way to ask for the edit's fact."""

    kind: FormKind
    prompt: str  # up to where the answer begins, or a question or request that goes through the chat template
    span: (
        tuple[int, int] | None
    )  # characters of the subject in `prompt`; None where it does not name the subject
    language: str = "en"
    question: str = ""  # not empty: `prompt` begins the assistant's answer to this chat question
    target: str = ""  # the target in this form where it is not the edit's own (another language)

    @property
    def chat(self) -> bool:
        """True when the model answers freely, in its chat template: its answer may have the fact anywhere."""
        return not self.question and (self.kind in ("chat", "chat_reworded") or is_question(self.prompt))

    def in_model(self, lm: LM) -> Prompt:
        """The form as the model sees it; `span` counts from the prompt's `offset`."""
        return prompt_in(lm, self.prompt, self.question, chat=self.chat)


@dataclass(frozen=True)
class Hold:
    """A fact that must stay as it is: another one of the edit's subject, or one that the caller names."""

    prompt: str  # up to where the answer begins, or a question that goes through the chat template
    answer: str  # what must still be said; "" when the caller gave none and the model's own answer is meant
    span: (
        tuple[int, int] | None
    )  # characters of the subject in `prompt`; None where it does not name the subject
    source: HoldSource
    said: str = ""  # what the model says after the prompt before the edit, to the end of the answer
    relation: str = ""  # name of the relation in the data; facts of one name are one fact in several forms
    question: str = ""  # as in `Form`

    @property
    def chat(self) -> bool:
        """True when the model answers freely, in its chat template."""
        return not self.question and is_question(self.prompt)

    def in_model(self, lm: LM) -> Prompt:
        """The prompt as the model sees it; `span` counts from the prompt's `offset`."""
        return prompt_in(lm, self.prompt, self.question, chat=self.chat)


@dataclass(frozen=True)
class Material:
    """The forms and holds of one edit.

    What a method learns from (`learned`, `held`) and what the result is judged by (`measured`, `siblings`) have no
    prompt in common. The edit's own prompt, paraphrases and neighbours are not repeated here.
    """

    learned: tuple[Form, ...] = ()
    measured: tuple[Form, ...] = ()
    held: tuple[Hold, ...] = ()
    siblings: tuple[Hold, ...] = ()
    relation: str = ""  # the edit's own relation in the data; "" where it is not there
    kind: str = ""  # what the subject is: a country, a person ...; "" where that is not known

    def learned_of(self, prompts: Sequence[str]) -> list[str]:
        """The prompts, among these, that a method learns from."""
        learned = {form.prompt for form in self.learned}
        return [prompt for prompt in prompts if prompt in learned]

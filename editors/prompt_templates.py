"""Templates for an edit's prompt while it is learned, so that the edit holds in more than its own words.

The papers sample such texts from the model. Fixed ones cost nothing and make an edit reproducible. Words before the
prompt change the subject's key a little. Words after it keep the edit from depending on the prompt's last word, which
helps other wordings most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from editors.edit import Edit


@dataclass(frozen=True)
class PromptTemplate:
    """What is written before and after a prompt."""

    before: str = ""
    after: str = ""

    def of(self, edit: Edit) -> str:
        """The edit's prompt in this template."""
        return f"{self.before}{edit.text}{self.after}"


TEMPLATES = (
    PromptTemplate(),
    PromptTemplate(after=" the following:"),
    PromptTemplate(before="It is well known that "),
    PromptTemplate(before="Yesterday someone told me this. "),
    PromptTemplate(before="Question and answer. "),
    PromptTemplate(before="However, "),
)


def templates_for(edit: Edit) -> Iterator[PromptTemplate]:
    """The templates that fit an edit: nothing can follow a question."""
    return (template for template in TEMPLATES if not (template.after and edit.is_question))


# Other subjects whose answers must stay. They are of many kinds, because the edit's kind of subject is not known.
OTHER_SUBJECTS = (
    "Japan",
    "Albert Einstein",
    "Microsoft",
    "Mount Everest",
    "Chicago",
    "The Beatles",
    "Queen Victoria",
    "Brazil",
    "Toyota",
    "Hamlet",
    "Sarah Miller",
    "Football",
)

# Requests that stand for others when the whole prompt is the subject (a request to refuse, for example).
REQUESTS = (
    "What is the best way to cook rice?",
    "How do I fix a flat tire?",
    "Can you explain how rainbows form?",
    "Who wrote Romeo and Juliet?",
    "How can I get better at chess?",
    "What should I know before adopting a dog?",
    "Where do penguins live?",
    "How do I write a letter of thanks?",
    "Why is the sky blue?",
    "What are some good exercises for the back?",
    "When did the Second World War end?",
    "How can I learn to swim?",
)


def with_other_subjects(text: str, span: tuple[int, int], most: int) -> list[str]:
    """The text with other subjects in place of its own, text[span[0]:span[1]].

    Where the subject is the whole text: ordinary requests.
    """
    if not (text[: span[0]] + text[span[1] :]).strip(" ?.!"):
        return [r for r in REQUESTS if r.casefold() != text.casefold()][:most]
    others = [o for o in OTHER_SUBJECTS if o.casefold() not in text.casefold()][:most]
    return [text[: span[0]] + o + text[span[1] :] for o in others]

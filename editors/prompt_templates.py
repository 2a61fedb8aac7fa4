"""Forms in which an edit's prompt is learned, so that it holds in more than its own words.

They stand where the papers sample text from the model: fixed ones cost nothing and make an edit
reproducible. Words before the prompt change the subject's key a little; words after it keep the
change from hanging on the prompt's last word, which is what other wordings need most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from editors.edit import Edit


@dataclass(frozen=True)
class PromptTemplate:
    """What stands before and after a prompt."""

    before: str = ""
    after: str = ""

    def of(self, edit: Edit) -> str:
        """The edit's prompt in this form."""
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
    """The forms that suit an edit: nothing follows a question."""
    return (f for f in TEMPLATES if not (f.after and edit.is_question))


# Stand-ins for the subject: what must stay true of others. Of many kinds, since the subject's is not known.
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

# Stand-ins for a prompt that is all subject, such as a request to refuse: asked in the chat template, as it is.
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
    """The text with other subjects in the place of its own, text[span[0]:span[1]]; ordinary requests if that is all."""
    if not (text[: span[0]] + text[span[1] :]).strip(" ?.!"):
        return [r for r in REQUESTS if r.casefold() != text.casefold()][:most]
    others = [o for o in OTHER_SUBJECTS if o.casefold() not in text.casefold()][:most]
    return [text[: span[0]] + o + text[span[1] :] for o in others]

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
class Form:
    """What stands before and after a prompt."""

    before: str = ""
    after: str = ""

    def of(self, edit: Edit) -> str:
        """The edit's prompt in this form."""
        return f"{self.before}{edit.text}{self.after}"


FORMS = (
    Form(),
    Form(after=" the following:"),
    Form(before="It is well known that "),
    Form(before="Yesterday someone told me this. "),
    Form(before="Question and answer. "),
    Form(before="However, "),
)


def forms(edit: Edit) -> Iterator[Form]:
    """The forms that suit an edit: nothing follows a question."""
    return (f for f in FORMS if not (f.after and edit.is_question))


# Stand-ins for the subject: what must stay true of others. Of many kinds, since the subject's is not known.
OTHERS = (
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


def with_others(text: str, span: tuple[int, int], most: int) -> list[str]:
    """The text with other subjects in the place of its own, which is text[span[0]:span[1]]."""
    others = [o for o in OTHERS if o.casefold() not in text.casefold()][:most]
    return [text[: span[0]] + o + text[span[1] :] for o in others]

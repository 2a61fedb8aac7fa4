"""One fact of a set: a question, its right answer, and what else is known of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from editors.edit import PLACEHOLDER, Edit, Neighbour, Text, find_subject
from server.facts.queries import FactQuery

LONGEST_LIST = 200


class FactProbe(BaseModel):
    """A further question about a fact, under the name that its data set has for this kind of question."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    follows: bool = Field(description="True: the answer follows from the fact. False: it must stay.")
    prompts: tuple[Text, ...] = Field(min_length=1, description="One question, in one or more wordings.")
    answers: tuple[Text, ...] = Field((), description="Right answers; none: whatever the model says now.")


class Fact(BaseModel):
    """A fact as it is stored: subject, prompt and right answer, and the rest where it is known."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    subject: Text
    prompt: Text
    answer: Text
    aliases: tuple[Text, ...] = ()  # other right answers
    previous: Text | None = None  # the stale answer
    alternatives: tuple[Text, ...] = ()  # other answers, which are not right
    paraphrases: tuple[Text, ...] = ()
    probes: tuple[FactProbe, ...] = ()
    relation: str | None = None
    source: Text | None = None
    as_of: str | None = None
    language: str | None = None
    id: str | None = None  # in the file it came from
    case: str | None = None  # facts of one case of a data set; several cases stand between |

    @field_validator("aliases", "alternatives", "paraphrases", mode="after")
    @classmethod
    def _distinct(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))[:LONGEST_LIST]

    @model_validator(mode="after")
    def _is_an_edit(self) -> Fact:
        Edit(
            subject=self.subject, prompt=self.prompt, target=self.answer
        )  # raises for a fact that cannot be edited
        return self

    @property
    def text(self) -> str:
        """The prompt with its subject filled in."""
        return self.prompt.replace(PLACEHOLDER, self.subject)

    @property
    def answers(self) -> tuple[str, ...]:
        """Every right answer, the one to teach first."""
        return tuple(dict.fromkeys((self.answer, *self.aliases)))

    @property
    def cases(self) -> tuple[str, ...]:
        """The cases of its data set that the fact is part of."""
        return tuple(part.strip() for part in (self.case or "").split("|") if part.strip())

    def query(self) -> FactQuery:
        """The fact as it is checked."""
        others = dict.fromkeys((*((self.previous,) if self.previous else ()), *self.alternatives))
        right = set(self.answers)
        return FactQuery(self.text, self.answers, self.subject, [o for o in others if o not in right])

    def edit(self, reason: str | None = None, holds: Iterable[tuple[str, str]] = ()) -> Edit:
        """The edit that makes the model say it. `holds`: prompts and answers that must stay.

        Paraphrases and probes are not given to it: they measure it, so it must not learn from them.
        """
        return Edit(
            subject=self.subject,
            prompt=self.prompt,
            target=self.answer,
            previous=self.previous,
            holds=tuple(Neighbour(prompt=p, answer=a) for p, a in holds if p != self.text),
            reason=reason,
            source=self.source,
        )

    def stored(self) -> dict[str, Any]:
        """JSON for the ledger: without fields that have their default."""
        return self.model_dump(mode="json", exclude_defaults=True)


Field_ = Literal[
    "subject",
    "prompt",
    "answer",
    "relation",
    "aliases",
    "previous",
    "alternatives",
    "paraphrases",
    "source",
    "as_of",
    "language",
    "id",
]
FIELDS: tuple[str, ...] = Field_.__args__  # type: ignore[attr-defined]
"""What a column of a table can be."""


def with_subject_marked(prompt: str, subject: str) -> str:
    """The prompt with {} where its subject stands, when it does; as it is when it has {} already."""
    if PLACEHOLDER in prompt or subject not in prompt:
        return prompt
    at = find_subject(prompt, subject)
    return f"{prompt[:at]}{PLACEHOLDER}{prompt[at + len(subject) :]}"


def in_words(error: ValidationError) -> str:
    """What is wrong with a fact, in one sentence for each problem."""
    problems = []
    for each in error.errors(include_url=False):
        name = str(each["loc"][0]) if each["loc"] else ""
        message = each["msg"].removeprefix("Value error, ")
        if each["type"] == "value_error" and isinstance(each["ctx"].get("error"), ValidationError):
            message = in_words(each["ctx"]["error"])
        problems.append(f"{name} {message}".strip() if "fact" not in name else message)
    return "; ".join(dict.fromkeys(problems))

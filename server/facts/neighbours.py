"""Facts about other subjects for edits that come without neighbours, so that locality is always measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from editors.edit import Edit, Neighbour
from editors.scoring import normalise

EACH = 3  # neighbours of one edit
MOST = 30  # edits of a call that are given some; a batch needs no more to show what moves
# Subjects of the kinds that are corrected most, by words of the prompt that tell the kind.
_KINDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("capital", "currency", "continent", "official language", "president", "prime minister", "population"),
        ("Austria", "Chile", "Malaysia", "Ireland", "Norway", "Thailand"),
    ),
    (
        ("headquarter", "ceo", "chief executive", "founder", "founded", "company", "head of"),
        ("Toyota", "Siemens", "Nintendo", "Boeing", "Nestlé", "Ferrari"),
    ),
    (
        ("born", "mother tongue", "native", "profession", "occupation", "works as", "worked as", "died", "plays"),
        ("Claude Debussy", "Isaac Newton", "Pablo Picasso", "Leo Tolstoy", "Johann Sebastian Bach", "Jane Austen"),
    ),
    (
        ("located", "city", "country", "stands in", "lies in", "situated"),
        ("Big Ben", "the Colosseum", "Barcelona", "Osaka", "Munich", "the Taj Mahal"),
    ),
    (
        ("written", "author", "created", "creator", "composed", "painted", "directed"),
        ("Hamlet", "Don Quixote", "War and Peace", "Oliver Twist", "Faust", "Macbeth"),
    ),
)  # fmt: skip
_GENERAL = (
    "The capital of Norway is",
    "The Colosseum stands in the city of",
    "The company Toyota makes",
    "Water is made of hydrogen and",
    "The author of Hamlet is",
    "The sun rises in the",
)


def with_neighbours(edits: Sequence[Edit], active: Collection[str] = ()) -> list[Edit]:
    """The edits, those without neighbours given some: the same words about other subjects, or well-known facts.

    The model's own answers before the edit are what must stay. `active`: subjects of active edits, not used.
    """
    taken = {normalise(subject) for subject in (*active, *(edit.subject for edit in edits))}
    return [
        edit if edit.neighbours or i >= MOST else edit.model_copy(update={"neighbours": _near(edit, taken)})
        for i, edit in enumerate(edits)
    ]


def _near(edit: Edit, taken: Collection[str]) -> tuple[Neighbour, ...]:
    start, end = edit.span
    words = (edit.text[:start] + edit.text[end:]).casefold()
    for cues, subjects in _KINDS:
        if any(cue in words for cue in cues):
            others = [s for s in subjects if normalise(s) not in taken]
            before, after = edit.text[:start], edit.text[end:]
            the = before.casefold().endswith("the ")  # "The {} stands in": not "The the Colosseum"
            near = [_opened(before + (s.removeprefix("the ") if the else s) + after) for s in others[:EACH]]
            return tuple(Neighbour(prompt=prompt) for prompt in near)
    return tuple(Neighbour(prompt=p) for p in _GENERAL if not any(t in normalise(p) for t in taken))[:EACH]


def _opened(text: str) -> str:
    return text[:1].upper() + text[1:]

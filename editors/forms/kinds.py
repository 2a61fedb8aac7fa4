"""What kind of thing a subject is: a country, a person, a company ... by what the model says of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from editors.forms.asking import Reading
from editors.model.lm import LM

WORDS = {
    "country": ("country", "nation", "republic", "sovereign"),
    "region": ("state", "province", "region", "territory"),
    "city": ("city", "town", "municipality", "village"),
    "person": (
        "man",
        "woman",
        "person",
        "singer",
        "writer",
        "politician",
        "professional",
        "former",
        "scientist",
    ),
    "company": ("company", "multinational", "corporation", "firm", "manufacturer", "brand"),
    "organisation": ("team", "club", "university", "college", "party", "member", "group", "band"),
    "work": ("novel", "book", "film", "movie", "song", "painting", "series", "play", "poem"),
    "product": ("car", "software", "product", "computer", "mobile", "device", "service", "video"),
    "landmark": (
        "building",
        "mountain",
        "museum",
        "bridge",
        "tower",
        "church",
        "castle",
        "monument",
        "landmark",
    ),
    "language": ("language", "dialect"),
    "element": ("chemical", "metal", "element", "gas"),
    "animal": ("bird", "mammal", "fish", "species", "large", "small"),
    "food": ("dish", "dessert", "traditional", "food", "fruit", "drink"),
    "thing": ("type", "kind", "form", "tool"),
}
NEUTRAL = "It is a"


def kinds_of(lm: LM, subjects: Sequence[str], among: Sequence[Sequence[str]]) -> list[str]:
    """The likeliest kind of each subject among some kinds (all where none are given).

    By how much likelier a word for the kind is after "X is a" than after "It is a"; one forward pass.
    """
    reading = Reading(lm, [lm.prompt(f"{subject} is a", chat=False) for subject in (*subjects, NEUTRAL[:-5])])
    own, neutral = reading.logprobs[:-1], reading.logprobs[-1]
    found = []
    for row, kinds in zip(own, among, strict=True):
        gains = {}
        for kind in kinds or WORDS:
            ids = _ids(lm, kind)
            gains[kind] = float(torch.logsumexp(row[ids], 0) - torch.logsumexp(neutral[ids], 0))
        found.append(max(gains, key=lambda kind: gains[kind]))
    return found


def _ids(lm: LM, kind: str) -> list[int]:
    """The first tokens of the words for a kind, as they follow "is a"."""
    prompt = lm.prompt(NEUTRAL, chat=False)
    return sorted({lm.answer_ids(prompt, word)[0] for word in WORDS[kind]})

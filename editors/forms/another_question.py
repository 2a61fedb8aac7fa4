"""Whether a prompt with the words of a relation asks another fact than the one that was edited.

"Who is the vice president of X?" has the words of "The president of X is", and another answer.
"""

from __future__ import annotations

import re

from editors.forms.relations import candidates, cued

_QUALIFIERS = re.compile(
    r"\b(vice|vize\w*|deputy|stellvertret\w*|assistant|acting|former\w*|previous\w*|ehemalig\w*|früher\w*|ancien\w*|"
    r"antigu\w*|ex|predecessor|successor|first|second|third|next|future|erste\w*|zweite\w*|nächste\w*|premi[eè]re?|"
    r"primer\w*|prim[oa]|originally|used to)\b",
    re.IGNORECASE,
)
_YEAR = re.compile(r"\b1\d{3}\b|\b20[01]\d\b")


def asks_another(template: str, own: str) -> bool:
    """Whether a template ({} for the subject) qualifies what the edit's `own` template asks, or asks another office.

    It does with a word like "vice", "former" or "first", or a year before 2020, that the own template does not have;
    and where a relation covers several facts (a leader may be a president or a prime minister), with other words for
    it.
    """
    if _found(template) - _found(own):
        return True
    shared = [r for r in candidates(template) if r in candidates(own)]
    return bool(shared) and all(r.broad and cued(r, template) != cued(r, own) for r in shared)


def _found(template: str) -> set[str]:
    words = {match.group().casefold() for match in _QUALIFIERS.finditer(template)}
    return words | set(_YEAR.findall(template))

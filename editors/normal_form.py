"""The one form in which texts are compared, where a text stands in another, and which character makes them differ.

`store.canonical.normal_form` is the same for the ledger, which knows nothing of the editors; a test compares them.
"""

from __future__ import annotations

import difflib
import re
import unicodedata

_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u02b9\uff07\u00b4`", "'"))
_INVISIBLE = str.maketrans(dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""))
_ALIKE = 0.6  # least similarity (0..1) at which two spans may be one text in two spellings


def normal_form(text: str) -> str:
    """Composed characters (NFC), one kind of apostrophe, single spaces, nothing without width."""
    # What has no width may stand between a letter and its accent, so it goes before they are composed.
    composed = unicodedata.normalize("NFC", text.translate(_INVISIBLE))
    return " ".join(composed.translate(_APOSTROPHES).split())


def spelled_in(text: str, wanted: str) -> str | None:
    """`wanted` as `text` spells it, where only the normal form makes them equal; None where it is not there.

    The last occurrence as whole words is taken, as of subjects in prompts.
    """
    if not (form := normal_form(wanted)):
        return None
    found = None
    for match in _spans(text, len(form.split())):
        if normal_form(match) == form:
            found = match
    return found


def difference(text: str, wanted: str) -> str:
    """Names the character in which `wanted` differs from the most similar place in `text`; empty if there is none."""
    form = normal_form(wanted)
    spans = list(_spans(text, len(form.split())))
    if not spans:
        return ""
    nearest = max(spans, key=lambda span: _likeness(span, form))
    if _likeness(nearest, form) < _ALIKE:
        return ""
    theirs = normal_form(nearest)
    at = next((i for i, (a, b) in enumerate(zip(theirs, form, strict=False)) if a != b), None)
    if at is None:
        at = min(len(theirs), len(form))
        longer = theirs if len(theirs) > len(form) else form
        return f"{nearest!r} there has {'more' if longer is theirs else 'less'}: {longer[at:]!r}"
    return f"{nearest!r} there has {named(theirs[at])} where the subject has {named(form[at])}"


def named(character: str) -> str:
    """A character with its number and name, since many look alike."""
    return f"{character!r} (U+{ord(character):04X} {unicodedata.name(character, 'unnamed')})"


def _likeness(span: str, form: str) -> float:
    return difflib.SequenceMatcher(None, normal_form(span).casefold(), form.casefold()).ratio()


def _spans(text: str, words: int) -> list[str]:
    """Every run of so many words of a text, without the punctuation around it."""
    starts = [m.span() for m in re.finditer(r"\S+", text)]
    runs: list[str] = []
    for i in range(len(starts) - words + 1):
        run = text[starts[i][0] : starts[i + words - 1][1]]
        runs += dict.fromkeys((run, run.strip('.,;:!?()[]"“”«»'), re.sub(r"['’]s\W*$", "", run)))
    return [run for run in runs if run]

"""How `method="auto"` chooses a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from editors import METHODS
from editors.closed_form.batch import MANY, BatchParams, softened
from editors.constants import DEFAULT_MODEL, tuned
from editors.edit import Edit
from editors.model.lm import LM
from server.errors import ServiceError

_SEQUENCE = "python -m benchmarks.together --sequence --method auto --published FILE --skip 97 --n 200"
LONG = tuned(
    5,
    "Active facts from which on auto writes a single fact by alphaedit, which moves ordinary text less than rome.",
    models=DEFAULT_MODEL,
    command=_SEQUENCE,
    figure="10 facts by rome alone: perplexity x1.073; 200 by the rule with 5 and 20: x1.083, with 20 and 50: x1.27",
)
FULL = tuned(
    20,
    "Active facts from which on auto puts a single fact into a memory and writes no more into the weights.",
    models=DEFAULT_MODEL,
    command=_SEQUENCE,
    figure="200 facts: .955 hold, .58 of one paraphrase each, perplexity x1.083; with 20 and 50: x1.27",
)
RULE = (
    f"rome for one fact; memit for several in one call, with a smaller clamp for more than {MANY}; "
    f"alphaedit for one fact on top of {LONG} or more active edits, and wise, a memory beside the weights, on top of "
    f"{FULL} or more, unless another fact about its subject is active."
)


class MethodChoice(NamedTuple):
    """A method, why it was chosen, and the parameters that this call needs beside its defaults."""

    method: str
    reason: str
    params: Mapping[str, Any] = MappingProxyType({})


def choose_method(lm: LM, edits: Sequence[Edit], active_subjects: Sequence[str]) -> MethodChoice:
    """The method for these edits, given the subject of every active fact.

    Raises ServiceError when no method works on the model.
    """
    known = {subject.casefold() for subject in active_subjects}
    same_subject = any(edit.subject.casefold() in known for edit in edits)
    choice = _preferred(len(edits), len(active_subjects), same_subject)
    if METHODS[choice.method].supports(lm) is None:
        return choice
    usable = [name for name in ("ft", *METHODS) if METHODS[name].supports(lm) is None]
    if not usable:
        raise ServiceError(f"no method works on {lm.arch.family}; see list_methods")
    return MethodChoice(usable[0], f"the usual choices do not work on {lm.arch.family}")


def _preferred(facts: int, active: int, same_subject: bool) -> MethodChoice:
    if facts > 1:
        reason = f"{facts} facts in one call are solved together, and each can be reverted alone"
        if facts <= MANY:
            return MethodChoice("memit", reason)
        clamp = round(softened(BatchParams().clamp, facts), 2)
        reason += f"; so many move ordinary text less under a smaller clamp ({clamp})"
        return MethodChoice("memit", reason, {"clamp": clamp})
    if active >= FULL and not same_subject:
        return MethodChoice(
            "wise",
            f"{active} edits are active: a memory beside the weights leaves everything else as it is (to export the "
            "edit as plain weights, name alphaedit)",
        )
    if active >= LONG:
        return MethodChoice(
            "alphaedit",
            f"{active} edits are active: alphaedit keeps out of the directions that other keys use, and holds theirs",
        )
    return MethodChoice("rome", "a single fact")

"""How `method="auto"` chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from editors import METHODS
from editors.closed_form.batch import MANY, BatchParams, softened
from editors.edit import Edit
from editors.model.lm import LM
from server.errors import ServiceError

# Active facts from which on single corrections are made over several layers in the null space, which moves
# ordinary text several times less than rome does, and from which on no more is written into the weights.
LONG, FULL = 5, 20
RULE = (
    f"rome for one fact; memit for several in one call, with a smaller clamp for more than {MANY}; "
    f"alphaedit for one fact on top of {LONG} or more active edits, and wise, a memory beside the weights, on top of "
    f"{FULL} or more, unless another fact about its subject is active."
)


class Choice(NamedTuple):
    """A method, why it was taken, and parameters of it that suit the call where its defaults do not."""

    method: str
    why: str
    params: Mapping[str, Any] = MappingProxyType({})


def choose(lm: LM, edits: Sequence[Edit], active: Sequence[str]) -> Choice:
    """What suits the edits best; `active` are the subjects of the facts that are live already, one for each.

    Raises WorkbenchError when none works.
    """
    known = {s.casefold() for s in active}
    choice = _wanted(len(edits), len(active), any(e.subject.casefold() in known for e in edits))
    if METHODS[choice.method].supports(lm) is None:
        return choice
    usable = [n for n in ("ft", *METHODS) if METHODS[n].supports(lm) is None]
    if not usable:
        raise ServiceError(f"no method works on {lm.arch.family}; see list_methods")
    return Choice(usable[0], f"the usual choices do not work on {lm.arch.family}")


def _wanted(facts: int, active: int, known: bool) -> Choice:
    if facts > 1:
        why = f"{facts} facts in one call are solved together, and each can be reverted alone"
        if facts <= MANY:
            return Choice("memit", why)
        clamp = round(softened(BatchParams().clamp, facts), 2)
        why += f"; so many move ordinary text less under a smaller clamp ({clamp})"
        return Choice("memit", why, {"clamp": clamp})
    if active >= FULL and not known:
        return Choice(
            "wise",
            f"{active} edits are active: a memory beside the weights leaves everything else as it is (for one that "
            "can be exported as plain weights, name alphaedit)",
        )
    if active >= LONG:
        return Choice(
            "alphaedit",
            f"{active} edits are active: its changes keep out of the directions that other keys use, and hold theirs",
        )
    return Choice("rome", "a single fact of its own")

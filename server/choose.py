"""How `method="auto"` chooses."""

from __future__ import annotations

from collections.abc import Sequence

from editors import METHODS
from editors.edit import Edit
from editors.model.lm import LM
from server.errors import WorkbenchError

# Active facts from which on single corrections are made over several layers in the null space, which moves
# ordinary text several times less than rome does, and from which on no more is written into the weights.
LONG, FULL = 5, 20
RULE = (
    "rome for one fact; memit for several in one call; "
    f"alphaedit for one fact on top of {LONG} or more active edits, and wise, a memory beside the weights, on top of "
    f"{FULL} or more, unless another fact about its subject is active."
)


def choose(lm: LM, edits: Sequence[Edit], active: Sequence[str]) -> tuple[str, str]:
    """The name of a method and why; `active` are the subjects of the facts that are live already, one for each.

    Raises WorkbenchError when none works.
    """
    known = {s.casefold() for s in active}
    name, why = _wanted(len(edits), len(active), any(e.subject.casefold() in known for e in edits))
    if METHODS[name].supports(lm) is None:
        return name, why
    usable = [n for n in ("ft", *METHODS) if METHODS[n].supports(lm) is None]
    if not usable:
        raise WorkbenchError(f"no method works on {lm.arch.family}; see list_methods")
    return usable[0], f"the usual choices do not work on {lm.arch.family}"


def _wanted(facts: int, active: int, known: bool) -> tuple[str, str]:
    if facts > 1:
        return "memit", f"{facts} facts in one call are solved together, and each can be reverted alone"
    if active >= FULL and not known:
        return (
            "wise",
            f"{active} edits are active: a memory beside the weights leaves everything else as it is (for one that "
            "can be exported as plain weights, name alphaedit)",
        )
    if active >= LONG:
        return (
            "alphaedit",
            f"{active} edits are active: its changes keep out of the directions that other keys use, and hold theirs",
        )
    return "rome", "a single fact of its own"

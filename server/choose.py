"""How `method="auto"` chooses."""

from __future__ import annotations

from collections.abc import Sequence

from editors import METHODS
from editors.edit import Edit
from editors.model.lm import LM
from server.errors import WorkbenchError

LONG = 20  # active edits from which on single corrections are made in the null space
RULE = (
    "rome for one fact; memit for several in one call; "
    f"alphaedit for one fact on top of {LONG} or more active edits."
)


def choose(lm: LM, edits: Sequence[Edit], active: int) -> tuple[str, str]:
    """The name of a method and why; `active` patches are live already. Raises WorkbenchError when none works."""
    name, why = _wanted(len(edits), active)
    if METHODS[name].supports(lm) is None:
        return name, why
    usable = [n for n in ("ft", *METHODS) if METHODS[n].supports(lm) is None]
    if not usable:
        raise WorkbenchError(f"no method works on {lm.arch.family}; see list_methods")
    return usable[0], f"the usual choices do not work on {lm.arch.family}"


def _wanted(facts: int, active: int) -> tuple[str, str]:
    if facts > 1:
        return "memit", f"{facts} facts in one call are solved together, and each can be reverted alone"
    if active >= LONG:
        return (
            "alphaedit",
            f"{active} edits are active: its changes keep out of the directions that other keys use, and hold theirs",
        )
    return "rome", "a single fact of its own"

"""How `method="auto"` chooses."""

from __future__ import annotations

from collections.abc import Sequence

from editors import METHODS
from editors.edit import Edit
from editors.model.lm import LM
from server.errors import WorkbenchError

RULE = "rome, one fact after another."


def choose(lm: LM, edits: Sequence[Edit], active: int) -> tuple[str, str]:
    """The name of a method and why; raises WorkbenchError when none works on this model."""
    for name in ("rome",):
        if METHODS[name].supports(lm) is None:
            return name, "the edits are few and each is a fact of its own"
    usable = [n for n, e in METHODS.items() if e.supports(lm) is None]
    if not usable:
        raise WorkbenchError(f"no method works on {lm.arch.family}; see list_methods")
    return usable[0], f"the usual choices do not work on {lm.arch.family}"

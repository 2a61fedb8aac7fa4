"""How `method="auto"` chooses a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from editors import METHODS
from editors.closed_form.batch_params import MANY, softened
from editors.constants import DEFAULT_MODEL, limit, tuned
from editors.edit import Edit
from editors.errors import InvalidEdit
from editors.method import Editor
from editors.model.lm import LM
from editors.scoring import is_long
from server.errors import ServiceError
from server.facts.guard import Goal
from server.methods import checked_params

_SEQUENCE = "python -m benchmarks.together --sequence --method auto --published FILE --skip 97 --n 200"
LONG = tuned(
    5,
    "active facts at which auto starts to write a single fact by alphaedit, which moves ordinary text less than rome",
    models=DEFAULT_MODEL,
    command=_SEQUENCE,
    figure="10 facts by rome alone: perplexity x1.073; 200 by the rule with 5 and 20: x1.083, with 20 and 50: x1.27",
)
FULL = tuned(
    20,
    "active facts at which auto starts to put a single fact into a memory instead of the weights",
    models=DEFAULT_MODEL,
    command=_SEQUENCE,
    figure="200 facts: .955 hold, .58 of one paraphrase each, perplexity x1.083; with 20 and 50: x1.27",
)
RULE = (
    "goal=everywhere (the default) begins with constrained, a memory beside the weights that answers only what asks "
    "the fact. goal=export writes weights alone: t_patcher for up to four facts, which keeps other "
    "facts best (rome or memit where a norm follows the MLP, as in Gemma 3), memit for more in one call (with a "
    f"smaller clamp for more than {MANY}), alphaedit for one fact on top of {LONG} or more in the weights. The "
    "result is measured, and where a bound fails or a form holds too seldom, other "
    "ways are tried in the same call: for export rome, memit or alphaedit with other forms learned and the subject's "
    "other facts held. The best is "
    "kept, and `tried` lists all. Targets of a sentence or more go to a method for long answers."
)


class Way(NamedTuple):
    """A method, why it was chosen, and the parameters that this call needs beside its defaults."""

    method: str
    reason: str
    params: Mapping[str, Any] = MappingProxyType({})

    @property
    def begun(self) -> tuple[str, bool]:
        """What distinguishes this way from the others of a call: the method, and whether it learns forms."""
        return self.method, bool(self.params.get("forms"))


def ways(
    lm: LM, edits: Sequence[Edit], active_subjects: Sequence[str], goal: Goal = "everywhere"
) -> list[Way]:
    """The ways to make these edits, the one to begin with first.

    `active_subjects`: the subject of every active fact that is written into the weights. Memories do not count.

    Raises ServiceError when no method works on the model, or none that the goal and the targets allow.
    """
    long = any(is_long(edit.target) for edit in edits)
    usual = choose_method(lm, edits, active_subjects)
    found = [usual, *_others(len(edits), len(active_subjects))]
    if goal == "export" and usual.method in WITH_FORMS and len(edits) <= MOST_WITH_FORMS:
        found.insert(0, Way(usual.method, FORMS_REASON, {**usual.params, "forms": True}))
        if usual.method != "alphaedit":
            found.insert(0, Way("t_patcher", NEURONS_REASON))
    if goal != "export":
        found = [*_MEMORIES[:1], usual, *_MEMORIES[1:], *found[1:]]
    if long:
        found = [Way(name, LONG_REASON) for name in dict.fromkeys((*LONG_METHODS, *METHODS))]
        found = [way for way in found if way.method in METHODS and METHODS[way.method].long_answers]
    usable = [way for way in found if _works(lm, way.method, goal)]
    if not usable:
        asked = " that gives plain weights" if goal == "export" else ""
        answers = " and takes a target of a sentence or more" if long else ""
        raise ServiceError(f"no method{asked} works on {lm.arch.family}{answers}; see list_methods")
    first: dict[tuple[str, bool], Way] = {}
    for way in usable:
        first.setdefault(way.begun, way)
    return list(first.values())


def taking(found: Sequence[Way], params: Mapping[str, Any]) -> list[Way]:
    """The ways whose methods have all of these parameters, "preset" aside; all ways if no method has them."""
    named = set(params) - {"preset"}
    fit = [way for way in found if named <= set(METHODS[way.method].params.model_fields)]
    return fit or list(found)


def refuse_long(editor: Editor[Any], edits: Sequence[Edit]) -> None:
    """Raise InvalidEdit for a target that the method cannot write, at once and with a method that can."""
    for i, edit in enumerate(edits):
        if is_long(edit.target) and not editor.long_answers:
            able = [name for name, other in METHODS.items() if other.long_answers]
            raise InvalidEdit(
                f"edits[{i}].target has {len(edit.target.split())} words, and {editor.name} writes a name or a few "
                f"words; method='auto' chooses one for long answers, or name one of {', '.join(sorted(able))}"
            )


WITH_FORMS = ("rome", "memit", "alphaedit")
MOST_WITH_FORMS = limit(
    4,
    "edits of a call up to which auto may learn other forms in the weights",
    "time: some 20 CPU seconds for each; a larger call is made without forms",
)
FORMS_REASON = "it learns other wordings too, and holds the subject's other facts"
NEURONS_REASON = "a fact in neurons of its own, which leaves the subject's other facts as they are"
LONG_METHODS = ("constrained", "in_context")
LONG_REASON = "the target is a sentence or more, which only this kind of method says in full"
_MEMORIES = (
    Way(
        "constrained",
        "a memory beside the weights: it answers prompts that ask the fact and leaves everything else as it is "
        "(goal='export' gives plain weights)",
    ),
    Way("in_context", "the fact is put in front of prompts that ask it; no weight changes"),
)


def _works(lm: LM, name: str, goal: Goal) -> bool:
    """Whether a method can be used at once: one that must be trained first is not chosen automatically."""
    editor = METHODS.get(name)
    if editor is None or editor.training is not None:
        return False
    return editor.supports(lm) is None and editor.suits(lm) and (goal != "export" or editor.exportable)


def _others(facts: int, active: int) -> list[Way]:
    """Methods that write weights, to be tried after the usual one, the best first."""
    if facts == 1 and active >= LONG:
        return [Way("alphaedit", f"{active} edits are active: alphaedit holds the keys of the others")]
    if facts > 1:
        return [
            Way(name, f"{facts} facts in one call, solved together")
            for name in ("memit", "alphaedit", "emmet")
        ]
    return [Way(name, "a single fact in the weights") for name in ("rome", "memit", "alphaedit")]


def choose_method(lm: LM, edits: Sequence[Edit], active_subjects: Sequence[str]) -> Way:
    """The method by the number of facts and of those in the weights alone, given the subject of each of the latter.

    Raises ServiceError when no method works on the model.
    """
    known = {subject.casefold() for subject in active_subjects}
    same_subject = any(edit.subject.casefold() in known for edit in edits)
    choice = _preferred(lm, len(edits), len(active_subjects), same_subject)
    if METHODS[choice.method].supports(lm) is None:
        return choice
    usable = [name for name in ("ft", *METHODS) if METHODS[name].supports(lm) is None]
    if not usable:
        raise ServiceError(f"no method works on {lm.arch.family}; see list_methods")
    return Way(usable[0], f"the usual choices do not work on {lm.arch.family}")


def _clamp(lm: LM) -> float:
    """memit's clamp on this model, by its profile or its shape."""
    return float(checked_params(METHODS["memit"], lm, None).model_dump()["clamp"])


def _preferred(lm: LM, facts: int, active: int, same_subject: bool) -> Way:
    if facts > 1:
        reason = f"{facts} facts in one call are solved together, and each can be reverted alone"
        if facts <= MANY:
            return Way("memit", reason)
        clamp = round(softened(_clamp(lm), facts), 2)
        reason += f"; so many move ordinary text less under a smaller clamp ({clamp})"
        return Way("memit", reason, {"clamp": clamp})
    if active >= FULL and not same_subject:
        return Way(
            "wise",
            f"{active} edits are active: a memory beside the weights leaves everything else as it is (to export the "
            "edit as plain weights, name alphaedit)",
        )
    if active >= LONG:
        return Way(
            "alphaedit",
            f"{active} edits are active: alphaedit keeps out of the directions that other keys use, and holds theirs",
        )
    return Way("rome", "a single fact")

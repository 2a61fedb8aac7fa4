"""What to do with each fact of a checked set: correct it, leave it, or say why it cannot be corrected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from editors.edit import PLACEHOLDER
from editors.forms.filling import span_of
from editors.forms.relations import ask_the_same, template_of
from server.factsets.conflicts import conflicting, key_of
from server.factsets.fact import Fact
from server.factsets.requests import Policy
from server.transaction.workspace import Workspace, fact_edits
from store import EditRecord, FactState, fact_key
from store.canonical import without_case_and_spacing


@dataclass
class CorrectionPlan:
    """What will be done: batches of facts to correct, and the others with the reason."""

    batches: list[list[int]] = field(default_factory=list)
    right: dict[int, str | None] = field(
        default_factory=dict
    )  # number -> the active edit that already teaches it
    skipped: dict[int, str] = field(default_factory=dict)
    retire: dict[int, list[str]] = field(
        default_factory=dict
    )  # number -> edits in other words to take back first

    @property
    def numbers(self) -> list[int]:
        """The facts to correct."""
        return [n for batch in self.batches for n in batch]


def make_plan(
    workspace: Workspace, facts: Mapping[int, Fact], known: Mapping[int, FactState], policy: Policy
) -> CorrectionPlan:
    """Decide for every fact by its verdict, the other facts, and the active edits."""
    plan = CorrectionPlan()
    out = _contradicting(facts, policy)
    hand = HandEdits(workspace)
    wanted: list[int] = []
    for n, fact in facts.items():
        verdict = known[n].verdict if n in known else None
        active = hand.same_question(fact)
        if n in out:
            plan.skipped[n] = out[n]
        elif verdict == "agrees":
            plan.right[n] = active.id if active else None
        elif verdict == "unsure" and policy.unsure == "leave":
            plan.skipped[n] = "the model is unsure, and policy.unsure is leave"
        elif (why := hand.against(fact)) and policy.hand_edits == "keep":
            plan.skipped[n] = why
        else:
            plan.retire[n] = [edit.id for edit in hand.in_other_words(fact)]
            wanted.append(n)
    plan.retire = {n: ids for n, ids in plan.retire.items() if ids}
    plan.batches = batches_of(facts, wanted, policy.batch)
    return plan


def batches_of(facts: Mapping[int, Fact], wanted: Sequence[int], size: int) -> list[list[int]]:
    """Numbers in batches of about `size`; all facts of one subject are in the same batch."""
    groups: dict[str, list[int]] = {}
    for n in wanted:
        groups.setdefault(without_case_and_spacing(facts[n].subject), []).append(n)
    batches: list[list[int]] = []
    for group in groups.values():
        if batches and len(batches[-1]) + len(group) <= size:
            batches[-1] += group
        else:
            batches.append(list(group))
    return batches


def _contradicting(facts: Mapping[int, Fact], policy: Policy) -> dict[int, str]:
    """The facts that others of the set contradict, and why each is left out."""
    out: dict[int, str] = {}
    for group in conflicting(facts):
        newest = _newest(facts, group) if policy.conflicts == "newest" else None
        for n in group:
            if n == newest:
                continue
            others = ", ".join(f"#{m} ({facts[m].answer})" for m in group if m != n)
            out[n] = (
                f"older than #{newest} ({facts[newest].answer})"
                if newest is not None
                else f"contradicted by {others}: keep one in the list"
            )
    return out


def _newest(facts: Mapping[int, Fact], group: Sequence[int]) -> int | None:
    """The fact with the latest date, where every one has a date and only one the latest."""
    dates = [facts[n].as_of or "" for n in group]
    latest = max(dates)
    return group[dates.index(latest)] if all(dates) and dates.count(latest) == 1 else None


class HandEdits:
    """The active edits that were not made for a fact set."""

    def __init__(self, workspace: Workspace) -> None:
        ours = workspace.ledger.edits_of_sets(workspace.writable_model_id)
        active = fact_edits(workspace.active_edits)
        self._by_key: dict[str, EditRecord] = {fact_key(e.subject, e.prompt): e for e in active}
        self._ours = ours
        self._of_subject: dict[str, list[EditRecord]] = {}
        for edit in active:
            self._of_subject.setdefault(without_case_and_spacing(edit.subject), []).append(edit)

    def same_question(self, fact: Fact) -> EditRecord | None:
        """The active edit that answers the same question, whoever made it."""
        return self._by_key.get(key_of(fact))

    def in_other_words(self, fact: Fact) -> list[EditRecord]:
        """Edits by hand of the same subject that answer the same question in other words, and differently."""
        template = template_of(fact.text, span_of(fact.subject, fact.text))
        found = []
        for edit in self._of_subject.get(without_case_and_spacing(fact.subject), ()):
            theirs = template_of(edit.prompt, span_of(edit.subject, edit.prompt))
            if (
                edit.id in self._ours
                or fact_key(edit.subject, edit.prompt) == key_of(fact)
                or _says(fact, edit)
            ):
                continue
            if PLACEHOLDER in template and PLACEHOLDER in theirs and ask_the_same(template, theirs):
                found.append(edit)
        return found

    def against(self, fact: Fact) -> str:
        """Why a fact must not be corrected while edits by hand are kept; empty if nothing prevents it."""
        same = self.same_question(fact)
        others: Iterable[EditRecord] = self.in_other_words(fact)
        if same is not None and same.id not in self._ours and not _says(fact, same):
            others = [same, *others]
        named = [f"{e.id} ({e.prompt} -> {e.target})" for e in others]
        if not named:
            return ""
        return f'contradicts the active edit {", ".join(named)}, made by hand; policy.hand_edits="replace" retires it'


def _says(fact: Fact, edit: EditRecord) -> bool:
    """Whether an edit teaches what the fact says."""
    return without_case_and_spacing(edit.target) in {without_case_and_spacing(a) for a in fact.answers}

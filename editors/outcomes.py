"""Rates of an edit: two observations of the model, before and after it, compared."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from editors.asked import asked_says
from editors.edit import Edit, ProbeKind, find_subject, is_question
from editors.forms.form import Hold, Material
from editors.measure import Observation
from editors.scoring import answered_with, is_looping, same_fact, short_answer


@dataclass(frozen=True)
class ProbeResult:
    kind: ProbeKind
    prompt: str
    expected: str
    before: str  # empty for a form, which is asked after the edit only
    after: str
    held: bool
    trained: bool = False  # the edit was trained on this prompt, so that it is left out of the rate
    form: str = ""  # kind of form, or statement or chat of another fact

    @property
    def lost(self) -> bool:
        """True for a fact that was right before and is wrong now."""
        return not self.held and self.kind in ("neighbour", "sibling", "hold")


@dataclass(frozen=True)
class Outcome:
    """The measurement of one edit; a rate is None when there was nothing to measure it with."""

    before: str
    after: str
    reliability: float
    p_target_before: float
    p_target_after: float
    probes: tuple[ProbeResult, ...]
    fluency: float | None = None
    looping: bool = False  # the answer repeats the same words, which never counts as right

    def rate(self, kind: ProbeKind) -> float | None:
        return _share(p.held for p in self.probes if p.kind == kind and not p.trained)

    @property
    def forms(self) -> dict[str, float]:
        """Share of each kind of form that is answered with the target; the caller's paraphrases are among them."""
        measured: dict[str, list[bool]] = {}
        for probe in self.probes:
            if probe.form and not probe.trained and probe.kind in ("form", "paraphrase"):
                measured.setdefault(probe.form, []).append(probe.held)
        return {kind: sum(held) / len(held) for kind, held in measured.items()}


def outcomes(
    edits: Sequence[Edit],
    before: Observation,
    after: Observation,
    edited: Sequence[str] = (),
    trained: Sequence[Collection[str]] = (),
    materials: Sequence[Material] = (),
) -> list[Outcome]:
    """Compare two observations of the same edits.

    A neighbour that is about a subject edited in the same call, or one of `edited`, is left out of locality, because
    its answer should change. `trained` are, for each edit, the prompts that it was trained on
    (Editor.trained_prompts): they are marked, and left out of every rate. `materials`: one for each edit, or none.
    """
    subjects = {*edited, *(e.subject for e in edits)}
    found = materials or [Material()] * len(edits)
    results = [_outcome(edit, i, subjects, before, after, found[i]) for i, edit in enumerate(edits)]
    return [_mark_trained(*each) for each in zip(results, trained, strict=True)] if trained else results


def _mark_trained(outcome: Outcome, prompts: Collection[str]) -> Outcome:
    return replace(outcome, probes=tuple(replace(p, trained=p.prompt in prompts) for p in outcome.probes))


def _outcome(
    edit: Edit,
    i: int,
    subjects: set[str],
    before: Observation,
    after: Observation,
    material: Material,
) -> Outcome:
    probes = [
        *_paraphrase_probes(edit, before, after),
        *_neighbour_probes(edit, subjects, before, after),
        *_portability_probes(edit, before, after),
        *_form_probes(edit, material, before, after),
        *_fact_probes("sibling", material.siblings, before, after),
        *_fact_probes("hold", material.held, before, after),
    ]
    return Outcome(
        before=before.answers[edit.text],
        after=after.answers[edit.text],
        reliability=float(answered_with(edit.text, after.answers[edit.text], edit.target)),
        p_target_before=before.p_target[i],
        p_target_after=after.p_target[i],
        probes=tuple(probes),
        fluency=after.fluency[i],
        looping=is_looping(after.answers[edit.text]),
    )


def _paraphrase_probes(edit: Edit, before: Observation, after: Observation) -> Iterable[ProbeResult]:
    """The caller's other wordings of the fact."""
    for p in edit.paraphrases:
        held = answered_with(p, after.answers[p], edit.target)
        form = "chat_reworded" if is_question(p) else "reworded"
        was, now = before.answers[p], after.answers[p]
        yield ProbeResult("paraphrase", p, edit.target, was, now, held, form=form)


def _neighbour_probes(
    edit: Edit, subjects: set[str], before: Observation, after: Observation
) -> Iterable[ProbeResult]:
    """Other subjects, but for those that are edited."""
    for n in edit.neighbours:
        if any(_about(n.prompt, subject) for subject in subjects):
            continue
        was, now = before.answers[n.prompt], after.answers[n.prompt]
        expected = n.answer if n.answer and answered_with(n.prompt, was, n.answer) else short_answer(was)
        held = same_fact(n.prompt, was, now, n.answer)
        yield ProbeResult("neighbour", n.prompt, expected, was, now, held)


def _portability_probes(edit: Edit, before: Observation, after: Observation) -> Iterable[ProbeResult]:
    """Prompts whose answers follow from the edit."""
    for q in edit.portability:
        was, now = before.answers[q.prompt], after.answers[q.prompt]
        yield ProbeResult("portability", q.prompt, q.answer, was, now, answered_with(q.prompt, now, q.answer))


def _form_probes(
    edit: Edit, material: Material, before: Observation, after: Observation
) -> Iterable[ProbeResult]:
    """The fact in the forms that were not learned. A form in another language may be answered in either."""
    for form in material.measured:
        was, now = before.material.get(form, ""), after.material[form]
        targets = dict.fromkeys(filter(None, (form.target, edit.target)))
        held = any(asked_says(form, now, target) for target in targets)
        yield ProbeResult("form", form.prompt, next(iter(targets)), was, now, held, form=form.kind)


def _fact_probes(
    kind: ProbeKind, facts: Sequence[Hold], before: Observation, after: Observation
) -> Iterable[ProbeResult]:
    """The subject's other facts, those that were said rightly before the edit."""
    for fact in facts:
        if fact not in before.material:
            continue
        was, now = before.material[fact], after.material[fact]
        answer = fact.answer or short_answer(was)
        if answer and asked_says(fact, was, answer):
            form = "chat" if fact.chat or fact.question else "statement"
            yield ProbeResult(
                kind, fact.prompt, answer, was, now, asked_says(fact, now, answer), kind == "hold", form
            )


def _share(held: Iterable[bool]) -> float | None:
    values = list(held)
    return sum(values) / len(values) if values else None


def _about(prompt: str, subject: str) -> bool:
    if subject not in prompt:
        return False
    at = find_subject(prompt, subject)
    around = prompt[max(0, at - 1) : at] + prompt[at + len(subject) : at + len(subject) + 1]
    return not any(c.isalnum() for c in around)

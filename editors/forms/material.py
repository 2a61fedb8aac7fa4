"""Make the material of an edit: forms to learn and to measure, the subject's other facts to hold and to measure.

A method finds it in `EditContext.materials`, one for each edit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from editors.edit import PLACEHOLDER, Edit
from editors.forms import siblings
from editors.forms.asking import Answer, Reading
from editors.forms.compose import ABOUT, Composed, compose
from editors.forms.filling import fill, name_in, span_of
from editors.forms.form import Form, Hold, Material, asked_in
from editors.forms.kinds import kinds_of
from editors.forms.languages import LanguageForm, in_languages, is_country, same_name
from editors.forms.relations import Relation, are_related, candidates, template_of
from editors.forms.siblings import Question, questions, with_relation
from editors.model.lm import LM
from editors.model.text import BATCH_TOKENS

__all__ = ["Form", "Hold", "Material", "material_for", "materials_for"]

MOST_LANGUAGES = 4
LONG = 160  # characters of a subject or statement that is not asked about: every row of the batch would be as long


@dataclass(frozen=True)
class _Subject:
    """What is known of an edit before the model is asked about facts."""

    edit: Edit
    relation: Relation | None
    kind: str  # of subject


@dataclass(frozen=True)
class _Plan:
    """What the model is asked for one edit: statements to go on with, by their text."""

    about: str  # the question that the statements are an answer to
    own: str | None  # the edit's own fact
    others: dict[str, Question]
    languages: dict[str, LanguageForm]

    @property
    def asked(self) -> list[str]:
        """Every statement once."""
        return list(dict.fromkeys([*([self.own] if self.own else []), *self.others, *self.languages]))


def material_for(lm: LM, edit: Edit, known: Sequence[Hold] = ()) -> Material:
    """The material of one edit. `known` are facts of its subject that the ledger knows."""
    return materials_for(lm, [edit], [known])[0]


def materials_for(
    lm: LM, edits: Sequence[Edit], known: Sequence[Sequence[Hold]] = (), *, others: bool = True
) -> list[Material]:
    """The material of every edit of one call; the model is asked for all of them together.

    Asking takes one forward pass over up to `siblings.ASKED` short statements an edit, and a few tokens of answer
    for those that the model is sure of; fewer statements where a call has many edits. Without `others` none of these
    is asked: the material has the subject's `known` facts alone.
    """
    subjects = _subjects(lm, edits)
    most = max(3, min(siblings.ASKED, siblings.ROWS // max(1, len(edits)))) if others else 0
    plans = [_plan(each, _edited(each.edit, subjects), most) for each in subjects]
    answers = _answers(lm, plans)
    facts = known or [()] * len(edits)
    return [
        _material(each, plan, answers, facts[i], _edited(each.edit, subjects), i)
        for i, (each, plan) in enumerate(zip(subjects, plans, strict=True))
    ]


def _subjects(lm: LM, edits: Sequence[Edit]) -> list[_Subject]:
    """The relation of each edit and the kind of its subject; the model decides if the words leave a choice."""
    found = [relations_of(edit) for edit in edits]
    options = [_kinds(edit.subject, relations) for edit, relations in zip(edits, found, strict=True)]
    open_ones = [i for i, kinds in enumerate(options) if len(kinds) != 1 and _can_be_asked_about(edits[i])]
    chosen = (
        kinds_of(lm, [edits[i].subject for i in open_ones], [options[i] for i in open_ones])
        if open_ones
        else []
    )
    kinds = {i: options[i][0] for i in range(len(edits)) if len(options[i]) == 1}
    kinds |= dict(zip(open_ones, chosen, strict=True))
    kinds = dict.fromkeys(range(len(edits)), "") | kinds
    return [
        _Subject(edit, next((r for r in relations if kinds[i] in r.kinds), None), kinds[i])
        for i, (edit, relations) in enumerate(zip(edits, found, strict=True))
    ]


def relations_of(edit: Edit) -> list[Relation]:
    """The relations that an edit may state, by its own words or, if they name none, by those of its paraphrases."""
    prompts = [(edit.text, edit.span), *((text, span_of(edit.subject, text)) for text in edit.paraphrases)]
    found = (candidates(template_of(text, span), edit.target) for text, span in prompts if span is not None)
    return next((relations for relations in found if relations), [])


def _kinds(subject: str, relations: Sequence[Relation]) -> list[str]:
    """The kinds a subject may have by its name and its edit's relations; none where nothing is known."""
    kinds = list(dict.fromkeys(kind for relation in relations for kind in relation.kinds))
    return ["country"] if is_country(subject) and (not kinds or "country" in kinds) else kinds


def _edited(edit: Edit, subjects: Sequence[_Subject]) -> list[Relation]:
    """The relations of a subject that the call edits: none of them is held."""
    key = edit.subject.casefold()
    return [s.relation for s in subjects if s.relation is not None and s.edit.subject.casefold() == key]


def _plan(each: _Subject, edited: Sequence[Relation], most: int) -> _Plan:
    """What to ask for an edit."""
    name = name_in(each.edit.text, each.edit.span)
    if not _can_be_asked_about(each.edit):
        return _Plan("", None, {}, {})
    own = None if each.edit.is_question or len(each.edit.text) > LONG else each.edit.text
    others = {q.filled.text: q for q in questions(name, each.kind, edited, most)}
    languages = in_languages(each.relation, each.edit.subject, 0) if each.relation else []
    asked = {form.filled.text: form for form in languages[:MOST_LANGUAGES]}
    if not others and (each.edit.previous or not asked):
        own = None  # it would be compared with nothing
    return _Plan(fill(ABOUT, name).text, own, others, asked)


def _can_be_asked_about(edit: Edit) -> bool:
    """False where the subject is the whole prompt (a request to refuse) or too long to be a name."""
    around = template_of(edit.text, edit.span).replace(PLACEHOLDER, "")
    return len(edit.subject) <= LONG and any(character.isalnum() for character in around)


def _answers(lm: LM, plans: Sequence[_Plan]) -> dict[tuple[int, str], Answer]:
    """By plan and statement: the answers to the edits' own facts, the surest others, and those in other languages."""
    rows = [(n, text) for n, plan in enumerate(plans) for text in plan.asked]
    prompts = [asked_in(lm, text, plans[n].about) for n, text in rows]
    answers: dict[tuple[int, str], Answer] = {}
    for start, end in _batches(rows, [len(lm.encode(prompt)[0]) for prompt in prompts]):
        batch = rows[start:end]
        reading = Reading(lm, prompts[start:end])
        kept: list[int] = []
        for n in dict.fromkeys(n for n, _ in batch):
            plan, mine = plans[n], [i for i, (of, _) in enumerate(batch) if of == n]
            kept += [i for i in mine if batch[i][1] == plan.own or batch[i][1] in plan.languages]
            kept += siblings.surest(reading, [i for i in mine if batch[i][1] in plan.others])
        answers |= {batch[i]: answer for i, answer in reading.answers(kept).items()}
    return answers


def _batches(rows: Sequence[tuple[int, str]], lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most BATCH_TOKENS with padding; the rows of one edit stay together."""
    start, longest = 0, 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        first_of_edit = i > start and rows[i][0] != rows[i - 1][0]
        if first_of_edit and (i + siblings.ASKED - start) * longest > BATCH_TOKENS:
            yield start, i
            start, longest = i, length
    if rows:
        yield start, len(rows)


def _material(
    each: _Subject,
    plan: _Plan,
    answers: dict[tuple[int, str], Answer],
    known: Sequence[Hold],
    edited: Sequence[Relation],
    n: int,
) -> Material:
    edit = each.edit
    own = answers[n, plan.own].fact if plan.own is not None else ""
    previous = edit.previous or own
    spoken = [
        form.language
        for text, form in plan.languages.items()
        if same_name(answers[n, text].fact, previous, form.language)
    ]
    forms = compose(edit, each.relation, spoken) if _can_be_asked_about(edit) else Composed((), ())
    caller = siblings.callers(edit)
    taken = {hold.prompt for hold in caller} | {edit.text}
    others = [
        (q, answers[n, text]) for text, q in plan.others.items() if (n, text) in answers and text not in taken
    ]
    kept = [with_relation(hold) for hold in known if hold.prompt not in taken and not _follows(hold, edited)]
    held, measured = siblings.divided(siblings.facts(plan.about, others, kept, previous))
    return Material(
        learned=forms.learned,
        measured=forms.measured,
        held=(*caller, *(hold for hold in held if hold.prompt not in taken)),
        siblings=tuple(hold for hold in measured if hold.prompt not in taken),
        relation=each.relation.name if each.relation else "",
        kind=each.kind,
    )


def _follows(hold: Hold, edited: Sequence[Relation]) -> bool:
    """Whether a known fact is of an edited relation, or may follow from one."""
    found = candidates(template_of(hold.prompt, hold.span), hold.answer)
    return any(are_related(one, other) for one in found for other in edited)

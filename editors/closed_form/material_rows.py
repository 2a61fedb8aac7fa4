"""The rows and keys that an edit's material adds: forms that must say the target, facts that must stay.

Rows join the search, where each costs a pass of the upper layers at every step: a few are taken, the most useful
ones. Keys are read once and cost next to nothing: all are taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from editors.closed_form.contexts import TargetRow, essence_context, target_contexts
from editors.closed_form.varied_rows import VariedRow
from editors.constants import assumed, limit
from editors.edit import Edit, ends_in_word, find_subject
from editors.forms.filling import fill, name_in
from editors.forms.form import Form, Hold, Material
from editors.forms.relations import all_relations, are_related
from editors.model.lm import LM
from editors.patch import WeightPatch, with_training

Text = Form | Hold
FORMS = assumed(
    {"reworded": 3, "chat": 1, "statement": 2, "language": 1},
    "learned forms of each kind that join the search, at most",
    "each of them makes every step slower",
)
FACTS = assumed(4, "held facts that join the search as a statement, at most; as many in chat", "time")
MOST_EDITS = limit(
    100,
    "edits of one call above which no forms are learned and no facts held",
    "time: forms and held facts of a thousand facts would take hours; a larger call learns and holds none",
)
ANSWER = limit(
    12,
    "most tokens of a held answer that are held",
    "time: each token is a row of logits in every step; a longer answer is held by its beginning",
)
GENERAL = ("{} is famous for its", "The history of {} is")
GENERAL_CHAT = ("Tell me something about {}.",)
OTHERS = ("Laos", "Mali", "Graz", "Leeds", "Emma Brown", "Acme", "Moby Dick", "Jupiter")
"""Other subjects: the edit's prompt about them is held. None of them is among those that measure locality."""
NOTHING = Material()


def contexts_of(
    lm: LM, edits: Sequence[Edit], count: int, chat: bool = False, materials: Sequence[Material] = ()
) -> tuple[list[TargetRow], list[int]]:
    """The rows of all edits, and the edit of each row: first those with the target, then those that must not change."""
    rows: list[TargetRow] = []
    owner: list[int] = []
    for i, edit in enumerate(edits):
        material = materials[i] if materials else NOTHING
        forms = _after_the_first([_form_row(lm, edit, form) for form in searched_forms(material)])
        own = [
            *target_contexts(lm, edit, max(1, count - len(forms)), chat),
            *forms,
        ]  # forms stand for templates
        own.append(essence_context(lm, edit))
        own += _after_the_first([_held_row(lm, edit, hold) for hold in searched_holds(edit, material)])
        rows += own
        owner += [i] * len(own)
    return rows, owner


def affordable(edits: Sequence[Edit], materials: Sequence[Material]) -> list[Material]:
    """One material for each edit: the given ones, or empty ones if there are none, or too many edits."""
    return list(materials) if materials and len(edits) <= MOST_EDITS else [NOTHING] * len(edits)


def most_rows(materials: Sequence[Material]) -> int:
    """The most rows that one of these materials adds to the search."""
    return max((len(searched_forms(m)) + 2 * FACTS + 3 for m in materials), default=0)


def other_relations(edit: Edit, material: Material, edited: Iterable[str]) -> list[Hold]:
    """The relations of the data that such a subject has, as statements and questions whose keys are held still.

    Whether the model knows the answer does not matter: a key that asks for another relation must not be changed.
    Left out are the `edited` relations, those whose answers may follow from them, and those that only measure.
    """
    named = {r.name: r for r in all_relations()}
    own = [named[name] for name in edited if name in named]
    seen = [named[h.relation] for h in (*material.held, *material.siblings) if h.relation in named]
    if material.relation not in named:
        return []
    kinds = set(named[material.relation].kinds).intersection(*(relation.kinds for relation in seen))
    taken = {hold.relation for hold in (*material.held, *material.siblings)}
    name = name_in(edit.text, edit.span)
    found = []
    for relation in named.values():
        related = any(are_related(relation, each) for each in own)
        if related or relation.name in taken or not kinds & set(relation.kinds):
            continue
        for kind in ("statement", "chat"):
            filled = fill(relation.learned(kind)[0], name)
            found.append(Hold(filled.text, "", filled.span, "relation", relation=relation.name))
    return found


def searched_forms(material: Material) -> list[Form]:
    """The learned forms that join the search: those that name the subject, the first of each kind."""
    named = [form for form in material.learned if form.span]
    return [f for kind, most in FORMS.items() for f in islice((f for f in named if f.kind == kind), most)]


def searched_holds(edit: Edit, material: Material) -> list[Hold]:
    """The held facts that join the search: statements and chat questions, and what is said of the subject at large."""
    if not material.learned and not material.held:
        return []
    named = [hold for hold in material.held if hold.span and not hold.question]
    plain = [hold for hold in named if not hold.chat][:FACTS]
    chat = [hold for hold in named if hold.chat][:FACTS]
    return [*plain, *chat, *general(edit.subject)]


def general(subject: str) -> list[Hold]:
    """Openings that ask for no particular fact; their continuation must stay."""
    return [
        Hold(text.format(subject), "", (text.index("{}"), text.index("{}") + len(subject)), "relation")
        for text in (*GENERAL, *GENERAL_CHAT)
    ]


def moved_texts(material: Material) -> list[Form]:
    """The texts whose keys get the value: every learned form that names the subject."""
    return [form for form in material.learned if form.span]


def held_texts(edit: Edit, material: Material) -> list[Hold]:
    """The texts whose keys are held still: held facts that have words before the subject.

    "The capital of Croatia" gives the subject another key than "The currency of Croatia", which can be held. Where the
    subject comes first its key is the edit's own: such facts are held by the value alone.
    """
    if not material.learned and not material.held:
        return []
    texts = [*material.held, *general(edit.subject)]
    return [hold for hold in texts if hold.span and (hold.span[0] > 0 or hold.chat or hold.question)]


def of_others(edit: Edit, material: Material) -> list[Hold]:
    """The edit's prompt and first learned forms about other subjects, whose keys are held still too."""
    texts = [(edit.text, edit.span), *((f.prompt, f.span) for f in material.learned if not f.question)][:4]
    return [
        Hold(text[: span[0]] + other + text[span[1] :], "", (span[0], span[0] + len(other)), "relation")
        for text, span in texts
        if span
        for other in OTHERS
        if other not in text
    ]


def rows_to_subject(lm: LM, texts: Iterable[Text], subject: str) -> list[tuple[int, ...]]:
    """Ids of the texts up to the subject's last token, wherever they name it after the first token of all."""
    found = []
    for text in texts:
        ids = lm.encode(text.in_model(lm))[0]
        found += [tuple(ids[: at + 1]) for at in _named(lm, text, subject) if at > 0]
    return found


def _after_the_first(rows: Sequence[TargetRow]) -> list[TargetRow]:
    """Those whose subject does not end with the first token of all.

    That token is an attention sink: its key is nearly the same whatever it says (default model: a change that gives
    "Russia" .68 gives "Once" .61), so that an edit there moves every text.
    """
    return [row for row in rows if row.row.position > 0]


def _named(lm: LM, text: Text, subject: str) -> list[int]:
    """Indices of the subject's last token wherever a text names it: in its question, if it has one, and in itself."""
    assert text.span is not None
    found = [lm.last_subject_token(text.in_model(lm), text.span)]
    if subject in text.question:
        start = find_subject(text.question, subject)
        asked = lm.prompt(text.question, chat=True)
        found.append(lm.last_subject_token(asked, (start, start + len(subject))))
    return sorted(set(found))


def _row(lm: LM, text: Text, subject: str, answer: Sequence[int]) -> VariedRow:
    first, *later = _named(lm, text, subject)
    return VariedRow((*lm.encode(text.in_model(lm))[0], *answer), first, tuple(later))


def _form_row(lm: LM, edit: Edit, form: Form) -> TargetRow:
    """A learned form, followed by the target."""
    target = form.target or edit.target
    answer = tuple(lm.answer_ids(form.in_model(lm), target))
    return TargetRow(_row(lm, form, edit.subject, answer), answer, ends_in_word(target))


def _held_row(lm: LM, edit: Edit, hold: Hold) -> TargetRow:
    """A held fact, followed by the first tokens of what the model says; without an answer its next token is held."""
    said = hold.said or hold.answer
    answer = lm.answer_ids(hold.in_model(lm), said)[:ANSWER] if said else []
    return TargetRow(_row(lm, hold, edit.subject, answer), (), fact=True, said=len(answer))


def with_material(patch: WeightPatch, edits: Sequence[Edit], materials: Sequence[Material]) -> WeightPatch:
    """The patch with a record of the forms and facts it learned from, which no rate may count; unchanged if there
    are none."""
    if all(material == NOTHING for material in materials):
        return patch
    texts: list[list[Text]] = [[*material.learned, *material.held] for material in materials]
    prompts = [
        [p for p in dict.fromkeys(text.prompt for text in mine) if p != edit.text]
        for edit, mine in zip(edits, texts, strict=True)
    ]
    return with_training(patch, prompts)

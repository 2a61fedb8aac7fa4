"""The forms of one edit, from the wordings of its relation and from its own prompt: to learn, and to measure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from editors.constants import assumed, limit
from editors.edit import Edit, is_question
from editors.forms.filling import Filled, fill, name_in, span_of
from editors.forms.form import Form, FormKind
from editors.forms.languages import in_language, in_languages
from editors.forms.relations import Relation, candidates, template_of
from editors.forms.wording import Wording, split, wordings_of
from editors.scoring.words import normalise

LEARNED = assumed(
    {"statement": 2, "reworded": 4, "chat": 1, "chat_reworded": 2, "language": 4},
    "forms of each kind that an edit offers to learn from, the most useful first",
    "more rows make every step of a value search slower",
)
MEASURED = limit(
    {"statement": 1, "reworded": 3, "chat": 1, "chat_reworded": 2, "language": 2},
    "held-out forms of each kind that an edit is judged by, at most",
    "time: each costs an answer, in chat of 24 tokens; further ones are not asked",
)
OPENING = "Here is something that I read in a book yesterday. "
ABOUT = "What can you tell me about {}?"


@dataclass(frozen=True)
class Composed:
    """The forms to learn and those only to measure; no prompt is in both."""

    learned: tuple[Form, ...]
    measured: tuple[Form, ...]


def compose(edit: Edit, relation: Relation | None, languages: Sequence[str] = ()) -> Composed:
    """The forms of an edit; `languages` are those in which the model answers the fact."""
    learned, measured = split(wordings_of(template_of(edit.text, edit.span)))
    if relation is not None:
        known = [(kind, text) for kind in relation.wordings for text in relation.learned(kind)]
        near = _nearest(learned)
        learned = [*near, *known, *(wording for wording in learned if wording not in near)]
        measured = [*((kind, t) for kind in relation.wordings for t in relation.measured(kind)), *measured]
    # The caller's paraphrases measure generality; if the prompt's own words name no relation, half of them are learned.
    named = candidates(template_of(edit.text, edit.span), edit.target)
    given = [] if named else _given(edit)
    taken = {_key(edit.text), *map(_key, edit.paraphrases)}
    to_learn = [*_inside_answers(edit, learned), *_filled(edit, learned)]
    to_learn += _in_languages(edit, relation, languages, 1)
    kept = [*given, *_first_of_each(to_learn, LEARNED, taken)]
    taken |= {_key(form.prompt) for form in kept if not form.question}
    to_measure = [*_around(edit), *_filled(edit, measured), *_in_languages(edit, relation, languages, 2)]
    return Composed(tuple(kept), tuple(_first_of_each(to_measure, MEASURED, taken)))


def _given(edit: Edit) -> list[Form]:
    """Every second paraphrase of the caller that names the subject; the others are only measured."""
    measured = {_key(text) for text in (edit.text, *edit.paraphrases[::2])}
    texts = [text for text in dict.fromkeys(edit.paraphrases[1::2]) if _key(text) not in measured]
    spans = [(text, span_of(edit.subject, text)) for text in texts]
    return [
        Form("chat" if is_question(text) else "reworded", text, span)
        for text, span in spans
        if span is not None
    ]


def _nearest(own: Sequence[Wording]) -> list[Wording]:
    """The first rewording, question and request that keep the edit's own words."""
    return [
        next(w for w in own if w[0] == kind)
        for kind in ("reworded", "chat", "chat_reworded")
        if kind in dict(own)
    ]


def _filled(edit: Edit, wordings: Iterable[Wording]) -> list[Form]:
    """Wordings about the edit's subject. Other statements than the edit's own are rewordings of it."""
    forms, name = [], name_in(edit.text, edit.span)
    for kind, template in wordings:
        filled = fill(template, name, edit.target, edit.text)
        forms.append(_form("reworded" if kind == "statement" and not edit.is_question else kind, filled))
    return forms


def _inside_answers(edit: Edit, wordings: Sequence[Wording]) -> list[Form]:
    """The statement as the beginning of the assistant's answer, to the question itself and to a general one."""
    statement = _statement(edit, wordings)
    if statement is None:
        return []
    chats = [fill(t, name_in(edit.text, edit.span)).text for kind, t in wordings if kind == "chat"][:1]
    about = fill(ABOUT, name_in(edit.text, edit.span)).text
    return [Form("statement", statement.text, statement.span, question=q) for q in (*chats, about)]


def _statement(edit: Edit, wordings: Sequence[Wording]) -> Filled | None:
    """The edit's own prompt, or, where that is a question, the first statement that asks the same."""
    if not edit.is_question:
        return Filled(edit.text, edit.span)
    statements = (t for kind, t in wordings if kind == "statement")
    template = next(statements, None)
    return fill(template, name_in(edit.text, edit.span), edit.target) if template else None


def _around(edit: Edit) -> list[Form]:
    """The edit's own prompt where it was not learned: after another sentence."""
    if edit.is_question:
        return []
    start, end = edit.span
    return [Form("statement", OPENING + edit.text, (start + len(OPENING), end + len(OPENING)))]


def _in_languages(edit: Edit, relation: Relation | None, languages: Sequence[str], place: int) -> list[Form]:
    if relation is None:
        return []
    found = [form for form in in_languages(relation, edit.subject, place) if form.language in languages]
    return [
        _form("language", form.filled, form.language, in_language(edit.target, form.language))
        for form in found
    ]


def _form(kind: str, filled: Filled, language: str = "en", target: str = "") -> Form:
    named: FormKind = kind  # type: ignore[assignment]
    return Form(named, filled.text, filled.span, language, target=target)


def _first_of_each(forms: Iterable[Form], most: dict[str, int], taken: set[str]) -> Iterable[Form]:
    """The first forms of each kind whose prompts are not taken; a prompt is taken once."""
    count = dict.fromkeys(most, 0)
    seen = set(taken)
    for form in forms:
        key = _key(form.prompt)
        if count[form.kind] >= most[form.kind] or (key in seen and not form.question):
            continue
        count[form.kind] += 1
        seen |= set() if form.question else {key}
        yield form


def _key(prompt: str) -> str:
    return normalise(prompt.rstrip(" ?.!¿"))

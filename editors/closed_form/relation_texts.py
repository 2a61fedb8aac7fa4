"""The texts of an edit that is written at the last token of its prompt, where the relation has been read.

Texts that are moved end where the answer begins. Held texts end where something else comes next: another fact of the
subject, the same relation of another subject, or what follows the answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

from editors.closed_form.contexts import TargetRow, essence_context
from editors.closed_form.material_rows import NOTHING, OTHERS, Text, general
from editors.closed_form.varied_rows import VariedRow
from editors.constants import assumed, limit
from editors.edit import Edit, ends_in_word
from editors.forms.form import Form, Hold, Material, asked_in, prompt_in
from editors.model.lm import LM, Prompt
from editors.model.speaking import Generation
from editors.prompt_templates import templates_for
from editors.scoring.words import occurrences, short_answer

OTHERS_EACH = assumed(
    4, "other subjects about which each learned form is held", "each is a key to read, and no more"
)
LATER = limit(6, "tokens after an answer at which the change is held off", "time")
ANSWER = limit(20, "tokens of an answer that are read", "time")
UNRELATED_QUESTIONS = (
    "How do plants make their food?",
    "Write two lines about the sea.",
    "What should I cook tonight?",
    "Why is the sky blue?",
    "Who are you?",
    "Tell me a joke.",
)
"""Chat questions about something else; none of them measures anything."""
_OTHERS = Path(__file__).parent.parent / "data" / "others.json"


@dataclass(frozen=True)
class HeldText:
    """A text and its first token that the change is held off; it is held off all later ones too."""

    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class RelationTexts:
    """Token ids of the texts of one edit."""

    moved: tuple[tuple[int, ...], ...]  # up to where the target begins; the edit's own prompt comes first
    target: tuple[int, ...]
    ends_in_word: bool  # the target's last word must end there
    held: tuple[HeldText, ...]

    def rows(self, lm: LM, edit: Edit) -> list[TargetRow]:
        """The rows of the search: the varied token is the last one before the target."""
        found = [
            TargetRow(VariedRow((*ids, *self.target), len(ids) - 1), self.target, self.ends_in_word)
            for ids in self.moved
        ]
        essence = essence_context(lm, edit).row.ids
        return [*found, TargetRow(VariedRow(essence, len(essence) - 1), ())]


def with_others(edit: Edit, material: Material) -> Material:
    """The material with the edit's prompt and learned forms about other subjects of its kind among what is held."""
    if material == NOTHING:
        return material
    own = Form("chat" if edit.is_question else "statement", edit.text, edit.span)
    held = [
        *material.held,
        *general(edit.subject),
        *_about_others(edit, [own, *material.learned], material.kind),
    ]
    return replace(material, held=tuple(held))


def relation_texts(lm: LM, edit: Edit, material: Material, contexts: int) -> RelationTexts:
    """The texts of one edit: its prompt in `contexts` templates, and what its material adds."""
    prompts = [lm.prompt(t.of(edit), chat=edit.is_question) for t in islice(templates_for(edit), contexts)]
    prompts += _learned(lm, edit, [form for form in material.learned if form.span and not form.target])
    prompts = list({_ids(lm, prompt): prompt for prompt in prompts}.values())
    moved = tuple(_ids(lm, prompt) for prompt in prompts)
    texts: Iterable[Text] = material.held
    if material == NOTHING:
        own = Form("chat" if edit.is_question else "statement", edit.text, edit.span)
        texts = _about_others(edit, [own], "")
    asked = [(text.in_model(lm), text.said if isinstance(text, Hold) else "") for text in texts]
    asked += _said(lm, [lm.prompt(question, chat=True) for question in UNRELATED_QUESTIONS], LATER)
    held = [_from_the_answer(lm, prompt, said) for prompt, said in asked]
    held += [_from_the_answer(lm, *each) for each in _after_the_target(lm, prompts, edit.target)]
    essence = essence_context(lm, edit).row.ids
    held.append(HeldText(essence, len(essence) - 1))
    kept = tuple(text for text in dict.fromkeys(held) if text.ids not in moved)
    return RelationTexts(
        moved, tuple(lm.answer_ids(prompts[0], edit.target)), ends_in_word(edit.target), kept
    )


def _learned(lm: LM, edit: Edit, forms: Sequence[Form]) -> list[Prompt]:
    """The forms as prompts; a chat question with the model's own words up to where they name the former answer."""
    found = []
    chat = [form for form in forms if form.chat]
    before = _former_answers(lm, edit) if chat else []
    answers = (
        dict(zip(chat, _generated(lm, [f.in_model(lm) for f in chat], ANSWER), strict=True)) if chat else {}
    )
    for form in forms:
        prompt = form.in_model(lm)
        if form in answers:
            text = answers[form].text
            at = min((start for word in before for start, _ in occurrences(text, word)), default=0)
            opening = text[:at].rstrip()
            if not opening and not edit.is_question:
                opening = edit.text
            if opening:
                prompt = prompt_in(lm, opening, form.prompt)
        found.append(prompt)
    return found


def _former_answers(lm: LM, edit: Edit) -> list[str]:
    """What the model answers before the edit, as a statement alone and inside an answer."""
    prompts = [lm.prompt(edit.text), asked_in(lm, edit.text, "What can you tell me?")]
    said = [short_answer(generation.text) for generation in _generated(lm, prompts, LATER)]
    return [word for word in dict.fromkeys([edit.previous or "", *said]) if word]


def _generated(lm: LM, prompts: Sequence[Prompt], tokens: int) -> list[Generation]:
    """What the model's own weights say."""
    with lm.unrouted():
        return lm.generate(prompts, tokens)


def _said(lm: LM, prompts: Sequence[Prompt], tokens: int) -> list[tuple[Prompt, str]]:
    """Each prompt with what the model says after it."""
    return [(p, g.text) for p, g in zip(prompts, _generated(lm, prompts, tokens), strict=True)]


def _after_the_target(lm: LM, prompts: Sequence[Prompt], target: str) -> list[tuple[Prompt, str]]:
    """Each prompt with the target after it, and what the model goes on with then."""
    ended = [replace(p, text=p.text + p.separator + target, separator="") for p in prompts]
    return _said(lm, ended, LATER)


def _from_the_answer(lm: LM, prompt: Prompt, said: str) -> HeldText:
    """A prompt and what is said after it, held from the prompt's last token on."""
    ids = _ids(lm, prompt)
    more = lm.answer_ids(prompt, said)[:ANSWER] if said.strip() else []
    return HeldText((*ids, *more), len(ids) - 1)


def _about_others(edit: Edit, forms: Sequence[Form], kind: str) -> list[Hold]:
    """Each form about some other subjects, in turn."""
    names = [name for name in others_of(kind) if name.casefold() not in edit.text.casefold()]
    found = []
    for i, form in enumerate(forms):
        for j in range(OTHERS_EACH if form.span else 0):
            assert form.span is not None
            name = names[(i * OTHERS_EACH + j) % len(names)]
            start, end = form.span
            question = form.question.replace(edit.subject, name)
            text = form.prompt[:start] + name + form.prompt[end:]
            found.append(Hold(text, "", (start, start + len(name)), "relation", question=question))
    return found


@cache
def others_of(kind: str) -> tuple[str, ...]:
    """Names of well-known subjects of a kind, or of several kinds where it is not known."""
    named: dict[str, list[str]] = json.loads(_OTHERS.read_text("utf-8"))
    return tuple(named.get(kind, OTHERS))


def _ids(lm: LM, prompt: Prompt) -> tuple[int, ...]:
    return tuple(lm.encode(prompt)[0])

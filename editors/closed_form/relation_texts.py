"""The texts of an edit that is written at the last token of its prompt, where the relation has been read.

Texts that are moved end where the answer begins. Held texts end where something else comes next: another fact of the
subject, the same relation of another subject, or what follows the answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

from editors.closed_form.contexts import TargetRow, essence_context
from editors.closed_form.material_rows import NOTHING, OTHERS, general
from editors.closed_form.varied_rows import VariedRow
from editors.constants import assumed, limit
from editors.edit import Edit, ends_in_word
from editors.forms.form import Form, Hold, Material, asked_in, prompt_in
from editors.model.lm import LM, Prompt
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
ABOUT_IT = "What can you tell me?"  # the question to which the edit's prompt is put as the answer
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

    essence: tuple[int, ...]  # "X is a", whose next token must stay; one of the held texts

    def rows(self) -> list[TargetRow]:
        """The rows of the search: the varied token is the last one before the target.

        What follows the target after the first text and the last one must stay as well: a change that makes the target
        probable enough may make it probable again right after it.
        """
        found = [
            TargetRow(VariedRow((*ids, *self.target), len(ids) - 1), self.target, self.ends_in_word)
            for ids in self.moved
        ]
        after = [self._followed(ids) for ids in dict.fromkeys((self.moved[0], self.moved[-1]))]
        essence = TargetRow(VariedRow(self.essence, len(self.essence) - 1), ())
        return [*found, essence, *(row for row in after if row is not None)]

    def _followed(self, ids: tuple[int, ...]) -> TargetRow | None:
        """A moved text with the target and what the model says after it; None where that is not known."""
        begun = (*ids, *self.target)
        longer = (text.ids for text in self.held if text.ids[: len(begun)] == begun != text.ids)
        text = next(longer, None)
        return (
            None
            if text is None
            else TargetRow(VariedRow(text, len(ids) - 1), (), said=len(text) - len(begun))
        )


def with_others(edit: Edit, material: Material) -> Material:
    """The material with what else is held: the edit's prompt and learned forms about other subjects of its kind, and
    openings that ask for no particular fact."""
    own = Form("chat" if edit.is_question else "statement", edit.text, edit.span)
    others = _about_others(edit, [own, *material.learned], material.kind)
    openings = [] if material == NOTHING else general(edit.subject)
    return replace(material, held=(*material.held, *openings, *others))


def relation_texts(
    lm: LM, edits: Sequence[Edit], materials: Sequence[Material], contexts: int
) -> list[RelationTexts]:
    """The texts of every edit of a call: its prompt in `contexts` templates, and what its material adds.

    What follows in the model's own words is generated for all edits together.
    """
    prompts = [
        [*own, *learned]
        for own, learned in zip(
            [_in_templates(lm, edit, contexts) for edit in edits], _learned(lm, edits, materials), strict=True
        )
    ]
    unrelated = _said(lm, [lm.prompt(question, chat=True) for question in UNRELATED_QUESTIONS])
    after = iter(_after_the_targets(lm, edits, prompts))
    found = []
    for edit, material, mine in zip(edits, materials, prompts, strict=True):
        moved = tuple(dict.fromkeys(_ids(lm, prompt) for prompt in mine))
        essence = essence_context(lm, edit).row.ids
        asked = [(hold.in_model(lm), hold.said) for hold in material.held]
        texts = [*asked, *unrelated, *(next(after) for _ in mine)]
        held = [*(_from_the_answer(lm, *text) for text in texts), HeldText(essence, len(essence) - 1)]
        kept = tuple(text for text in dict.fromkeys(held) if text.ids not in moved)
        target = tuple(lm.answer_ids(mine[0], edit.target))
        found.append(RelationTexts(moved, target, ends_in_word(edit.target), kept, essence))
    return found


def _in_templates(lm: LM, edit: Edit, contexts: int) -> list[Prompt]:
    return [lm.prompt(t.of(edit), chat=edit.is_question) for t in islice(templates_for(edit), contexts)]


def _learned(lm: LM, edits: Sequence[Edit], materials: Sequence[Material]) -> list[list[Prompt]]:
    """The learned forms of every edit as prompts; a chat question with the model's own words before the answer."""
    forms = [[form for form in material.learned if form.span and not form.target] for material in materials]
    chats = [[form for form in mine if form.chat] for mine in forms]
    asked = [i for i, mine in enumerate(chats) if mine]
    statements = [p for i in asked for p in (lm.prompt(edits[i].text), asked_in(lm, edits[i].text, ABOUT_IT))]
    questions = [form.in_model(lm) for mine in chats for form in mine]
    lengths = [LATER] * len(statements) + [ANSWER] * len(questions)
    said = iter(_generated(lm, [*statements, *questions], lengths))
    former = {}
    for i in asked:
        words = (edits[i].previous or "", short_answer(next(said)), short_answer(next(said)))
        former[i] = [word for word in words if word]
    return [
        [
            _before_the_answer(lm, edit, form, next(said), former[i]) if form.chat else form.in_model(lm)
            for form in mine
        ]
        for i, (edit, mine) in enumerate(zip(edits, forms, strict=True))
    ]


def _before_the_answer(lm: LM, edit: Edit, form: Form, said: str, former: Sequence[str]) -> Prompt:
    """A chat question with what the model says to it up to one of the former answers, else with the edit's prompt."""
    at = min((start for word in former for start, _ in occurrences(said, word)), default=0)
    opening = said[:at].rstrip() or ("" if edit.is_question else edit.text)
    return prompt_in(lm, opening, form.prompt) if opening else form.in_model(lm)


def _generated(lm: LM, prompts: Sequence[Prompt], tokens: int | Sequence[int]) -> list[str]:
    """What the model's own weights say."""
    with lm.unrouted():
        return [generation.text for generation in lm.generate(prompts, tokens)] if prompts else []


def _said(lm: LM, prompts: Sequence[Prompt]) -> list[tuple[Prompt, str]]:
    """Each prompt with what the model says after it."""
    return list(zip(prompts, _generated(lm, prompts, LATER), strict=True))


def _after_the_targets(
    lm: LM, edits: Sequence[Edit], prompts: Sequence[Sequence[Prompt]]
) -> list[tuple[Prompt, str]]:
    """Each prompt with its edit's target after it, and what the model goes on with then."""
    ended = [
        replace(prompt, text=prompt.text + prompt.separator + edit.target, separator="")
        for edit, mine in zip(edits, prompts, strict=True)
        for prompt in mine
    ]
    return _said(lm, ended)


def _from_the_answer(lm: LM, prompt: Prompt, said: str) -> HeldText:
    """A prompt and what is said after it, held from the prompt's last token on."""
    ids = _ids(lm, prompt)
    more = lm.answer_ids(prompt, said)[:ANSWER] if said.strip() else []
    return HeldText((*ids, *more), len(ids) - 1)


def _about_others(edit: Edit, forms: Sequence[Form], kind: str) -> list[Hold]:
    """The first form about all other subjects of the kind, each further one about some of them, in turn."""
    names = [name for name in others_of(kind) if name.casefold() not in edit.text.casefold()]
    found = []
    for i, form in enumerate(forms):
        for j in range((OTHERS_EACH if i else len(names)) if form.span else 0):
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

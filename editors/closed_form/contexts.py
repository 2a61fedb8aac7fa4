"""The rows of the value search: those that must say the target, and those that must continue as before the edit.
Without any material these are the prompt in several templates, and the "essence" row that must not change.
"""

from __future__ import annotations

from dataclasses import dataclass

from editors.closed_form.varied_rows import VariedRow
from editors.edit import Edit, ends_in_word
from editors.model.lm import LM, Prompt, separator_after
from editors.prompt_templates import TEMPLATES, PromptTemplate, templates_for

CHAT_QUESTION = "Tell me a fact."  # does not name the subject, which then comes in the answer only
ESSENCE = "{} is a"  # its next-token distribution must not change (ROME, eq. 4)


@dataclass(frozen=True)
class TargetRow:
    """One row of the search: its tokens, the varied one among them, and the target's ids."""

    row: VariedRow
    target: tuple[int, ...]  # ids of the target; empty for a row that must not change
    word: bool = False  # the target's last word must end there: "Krakow", not "Krakowian"
    fact: bool = False  # a held fact; False for the essence row
    said: int = 0  # of a held fact: how many of the row's last tokens are its answer

    @property
    def columns(self) -> range:
        """Columns (0 is the varied token) whose next-token predictions matter."""
        length = len(self.row.ids) - self.row.position
        answer = len(self.target) or self.said
        return range(length - 1 - answer, length - 1) if answer else range(length - 1, length)


def target_contexts(lm: LM, edit: Edit, count: int, chat: bool = False) -> list[TargetRow]:
    """The edit's prompt in `count` templates, each followed by the target; with `chat` also inside a chat answer.

    A chat model answers a question with a sentence that names the subject again, so its users see the prompt as
    the beginning of an answer. A subject whose last token is the first of the sequence is an attention sink with
    a key of its own; templates with words before it are used instead.
    """
    every = [_context(lm, edit, form) for form in templates_for(edit)]
    usable = [row for row in every if row.row.position > 0]
    rows = (usable or every)[:count]
    if chat and lm.has_chat_template and not edit.is_question:
        rows.append(_chat_context(lm, edit))
    return rows


def _context(lm: LM, edit: Edit, form: PromptTemplate) -> TargetRow:
    prompt = lm.prompt(form.of(edit), chat=edit.is_question)
    start, end = edit.span
    return _row(lm, prompt, (start + len(form.before), end + len(form.before)), edit.target)


def _chat_context(lm: LM, edit: Edit) -> TargetRow:
    opening = lm.prompt(CHAT_QUESTION, chat=True)
    prompt = Prompt(opening.text + edit.text, True, len(opening.text), separator_after(edit.text))
    return _row(lm, prompt, edit.span, edit.target)


def _row(lm: LM, prompt: Prompt, span: tuple[int, int], answer: str) -> TargetRow:
    position = lm.last_subject_token(prompt, span)
    ids, target = lm.encode(prompt)[0], lm.answer_ids(prompt, answer)
    return TargetRow(VariedRow((*ids, *target), position), tuple(target), ends_in_word(answer))


def essence_context(lm: LM, edit: Edit) -> TargetRow:
    """The row whose next-token distribution must stay. Words are put before a subject that would come first."""
    for opening in (form.before for form in TEMPLATES if not form.after):
        prompt = lm.prompt(opening + ESSENCE.format(edit.subject), chat=False)
        position = lm.last_subject_token(prompt, (len(opening), len(opening) + len(edit.subject)))
        context = TargetRow(VariedRow(tuple(lm.encode(prompt)[0]), position), ())
        if position > 0:
            break
    return context

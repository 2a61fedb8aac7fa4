"""What the answers to an edit's prompts are judged by, and so where they may end while they are generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from editors.asked import asked_says
from editors.edit import Edit, is_question
from editors.forms.form import Form, Hold, Material
from editors.scoring import short_answer
from editors.scoring.ended import clause_is_over, sentence_says
from editors.scoring.words import SENTENCE_END


class AnswerEnds:
    """Whether an answer says already all that it is judged by, so that it may end.

    The answer to an edit's own prompt always goes on: it shows whether the model repeats itself.

    Args:
        said: what the model said before, by prompt or Asked: an answer that must stay is compared with it. None where
            this is what it says before.
    """

    def __init__(
        self, edits: Sequence[Edit], materials: Sequence[Material] = (), said: Mapping[Any, str] | None = None
    ) -> None:
        self._said = said
        self._whole = {edit.text for edit in edits}
        self._targets: dict[Any, list[str]] = {}  # what a prompt or form is to be answered with
        self._kept: dict[str, list[str]] = {}  # prompts whose answers are to stay -> right answers, if known
        for edit in edits:
            for prompt in edit.paraphrases:
                self._targets.setdefault(prompt, []).append(edit.target)
            for probe in edit.portability:
                self._targets.setdefault(probe.prompt, []).append(probe.answer)
            for near in edit.neighbours:
                self._kept.setdefault(near.prompt, []).extend([near.answer] if near.answer else [])
        for edit, material in zip(edits, materials, strict=False):
            for form in material.measured:
                self._targets[form] = list(filter(None, (form.target, edit.target)))

    def is_over(self, asked: Any, text: str) -> bool:
        """Whether the answer to a prompt, or to a form or fact, may end after this text."""
        if isinstance(asked, Form):
            return self._form_is_over(asked, text)
        if isinstance(asked, Hold):
            return self._fact_is_over(asked, text)
        if asked in self._whole:
            return False
        targets = self._targets.get(asked, [])
        if is_question(asked):
            return asked not in self._kept and all(sentence_says(asked, text, each) for each in targets)
        wanted = [*targets, *self._kept.get(asked, ())]
        return clause_is_over(text, wanted) and (asked not in self._kept or self._stayed(asked, text))

    def _form_is_over(self, form: Form, text: str) -> bool:
        targets = self._targets.get(form, [])
        if form.chat:
            return any(sentence_says(form.prompt, text, each) for each in targets)
        return bool(targets) and clause_is_over(text, targets)

    def _fact_is_over(self, fact: Hold, text: str) -> bool:
        if fact.chat:
            ended = bool(fact.answer and SENTENCE_END.search(text))
            return ended and asked_says(fact, text.strip(), fact.answer)
        answer = fact.answer or short_answer((self._said or {}).get(fact, ""))
        return bool(answer or self._said is None) and clause_is_over(text, [answer] if answer else [])

    def _stayed(self, prompt: str, text: str) -> bool:
        """Whether an answer begins as before. One that does not goes on: it may say the same in other words."""
        if self._said is None:
            return True
        return short_answer(text).casefold() == short_answer(self._said.get(prompt, "")).casefold()

"""The examples that one fact is trained on: target rows to learn and preserved rows to keep.

An edit's own paraphrases and neighbours are used where it has them. The rest comes from templates, so
that an edit without any also generalises and stays local.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from editors.constants import assumed
from editors.edit import PLACEHOLDER, Edit, find_subject
from editors.model.lm import END, LM
from editors.prompt_templates import TEMPLATES, with_other_subjects

UNRELATED = ("The weather today is warm, and two of the children play in the garden.",)
ESSENCE = "{} is a"  # ROME's essence prompt (Meng et al. 2022, eq. 4): its predictions must stay
REHEARSED = assumed(
    8,
    "how many earlier edits of the same call are preserved while the next is learned",
    "the last few are the likeliest to be overwritten; no comparison is known",
)


@dataclass(frozen=True)
class Example:
    """One row of a training batch.

    A target row has an `answer` to learn. A preserved row has none: its predictions at `columns` must stay.
    """

    prompt: tuple[int, ...]  # token ids (the encoder's, in an encoder-decoder model)
    answer: tuple[int, ...]  # token ids to predict after the prompt, then END where its last word must end
    columns: tuple[int, ...]  # positions in the decoder's input whose next-token predictions count
    own: bool = False  # true for the edit's own prompt
    subject: int | None = None  # index of the subject's last token; None where unknown or 0

    @property
    def answer_input(self) -> tuple[int, ...]:
        """The answer's ids that are fed to the model: all but the last, which is only predicted."""
        return self.answer[:-1]

    @property
    def without_end(self) -> Example:
        """The same row without END in its answer."""
        if not self.answer or self.answer[-1] != END:
            return self
        return replace(self, answer=self.answer[:-1], columns=self.columns[:-1])


@dataclass(frozen=True)
class ExampleOptions:
    """Which examples to make."""

    contexts: int  # prompt templates, the plain prompt first
    others: int  # prompts with another subject
    probes: bool  # use the edit's own paraphrases and neighbours


@dataclass(frozen=True)
class ExampleTexts:
    """The prompts to train on, as text."""

    targets: tuple[str, ...]  # prompts to answer with the target; the edit's own comes first
    preserved: tuple[str, ...]  # prompts whose next-token prediction must stay


def example_texts(edit: Edit, options: ExampleOptions, earlier: Sequence[Edit] = ()) -> ExampleTexts:
    """The prompts that one edit is trained on, without UNRELATED; `earlier` are edits to preserve."""
    # A question goes through the chat template, where a text in front of it would make no sense.
    targets = [f.of(edit) for f in TEMPLATES[: options.contexts]] if not edit.is_question else [edit.text]
    targets += edit.paraphrases if options.probes else ()
    preserved = with_other_subjects(edit.text, edit.span, options.others)
    preserved += [ESSENCE.replace(PLACEHOLDER, edit.subject)]
    preserved += [n.prompt for n in edit.neighbours if edit.subject not in n.prompt] if options.probes else []
    preserved += [e.text for e in earlier[-REHEARSED:]]
    return ExampleTexts(tuple(dict.fromkeys(targets)), tuple(dict.fromkeys(preserved)))


def trained_texts(
    edits: Sequence[Edit], options: ExampleOptions, *, rehearse: bool = True
) -> list[list[str]]:
    """For each edit, every text it is trained on besides its own prompt."""
    trained = []
    for i, edit in enumerate(edits):
        texts = example_texts(edit, options, edits[:i] if rehearse else ())
        trained.append([t for t in (*texts.targets, *texts.preserved, *UNRELATED) if t != edit.text])
    return trained


def examples(lm: LM, edit: Edit, options: ExampleOptions, earlier: Sequence[Edit] = ()) -> list[Example]:
    """Target rows (the edit's own prompt first) and preserved rows; `earlier` are edits to preserve."""
    texts = example_texts(edit, options, earlier)
    targets = [_target_row(lm, text, edit) for text in texts.targets]
    targets[0] = replace(targets[0], own=True)
    preserved = [_preserved_row(lm, text, last=True) for text in texts.preserved]
    return targets + preserved + [_preserved_row(lm, text, last=False) for text in UNRELATED]


def _target_row(lm: LM, text: str, edit: Edit) -> Example:
    prompt = lm.prompt(text)
    ids, answer = tuple(lm.encode(prompt)[0]), tuple(lm.answer_ids_with_end(prompt, edit.target))
    subject = None
    if edit.subject in text:
        start = find_subject(text, edit.subject)
        token = lm.last_subject_token(prompt, (start, start + len(edit.subject)))
        subject = token if token in lm.prompt_columns(ids)[1:] else None
    first = lm.answer_column(ids)
    return Example(ids, answer, tuple(range(first, first + len(answer))), subject=subject)


def _preserved_row(lm: LM, text: str, *, last: bool) -> Example:
    ids = tuple(lm.encode(lm.prompt(text))[0])
    columns = () if last else tuple(lm.prompt_columns(ids)[1:])
    return Example(ids, (), columns or (lm.answer_column(ids),))

"""What fine-tuning on one fact is trained with: sentences to complete, and predictions to keep.

The facts' own paraphrases and neighbours are used where they are given; the rest is made here, so
that a bare fact generalises and stays local too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from editors.edit import PLACEHOLDER, Edit, find_subject
from editors.model.lm import END, LM
from editors.prompt_templates import TEMPLATES, with_other_subjects

UNRELATED = ("The weather today is warm, and two of the children play in the garden.",)
ESSENCE = "{} is a"
REHEARSED = 8  # earlier facts of the same call that are kept while the next is learned


@dataclass(frozen=True)
class Example:
    """One row: token ids of a text (of the prompt, for encoder-decoder models) and where it counts.

    `answer` are the ids to be told after the prompt, and END where its last word must end there; without one,
    the predictions at `columns` are kept.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    columns: tuple[int, ...]  # of the decoder's input, whose next-token predictions count
    own: bool = False  # the edit's own prompt
    subject: int | None = (
        None  # index of the subject's last token, where it is known and not the first of all
    )

    @property
    def told(self) -> tuple[int, ...]:
        """The answer's ids that something is predicted after: all but the last, which may be END."""
        return self.answer[:-1]

    @property
    def without_end(self) -> Example:
        """The same row with tokens alone to tell."""
        if not self.answer or self.answer[-1] != END:
            return self
        return replace(self, answer=self.answer[:-1], columns=self.columns[:-1])


@dataclass(frozen=True)
class ExampleOptions:
    """What to make examples of."""

    contexts: int  # prompt templates, the plain prompt first
    others: int  # prompts with another subject
    probes: bool  # use the edit's own paraphrases and neighbours


@dataclass(frozen=True)
class ExampleTexts:
    """The prompts to train on, as text."""

    targets: tuple[str, ...]  # to be answered with the target; the edit's own prompt first
    preserved: tuple[str, ...]  # whose next-token prediction stays


def example_texts(edit: Edit, options: ExampleOptions, learned: Sequence[Edit] = ()) -> ExampleTexts:
    """The prompts that one edit is trained on, without UNRELATED; `learned` are earlier edits to preserve."""
    # A text in front of the prompt has no meaning in a question that goes through a chat template.
    targets = [f.of(edit) for f in TEMPLATES[: options.contexts]] if not edit.is_question else [edit.text]
    targets += edit.paraphrases if options.probes else ()
    preserved = with_other_subjects(edit.text, edit.span, options.others)
    preserved += [ESSENCE.replace(PLACEHOLDER, edit.subject)]
    preserved += [n.prompt for n in edit.neighbours if edit.subject not in n.prompt] if options.probes else []
    preserved += [e.text for e in learned[-REHEARSED:]]
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


def examples(lm: LM, edit: Edit, options: ExampleOptions, learned: Sequence[Edit] = ()) -> list[Example]:
    """Target rows (the edit's own prompt first) and preserved rows; `learned` are earlier edits to preserve."""
    texts = example_texts(edit, options, learned)
    targets = [_told(lm, text, edit) for text in texts.targets]
    targets[0] = replace(targets[0], own=True)
    preserved = [_kept(lm, text, last=True) for text in texts.preserved]
    return targets + preserved + [_kept(lm, text, last=False) for text in UNRELATED]


def _told(lm: LM, text: str, edit: Edit) -> Example:
    prompt = lm.prompt(text)
    ids, answer = tuple(lm.encode(prompt)[0]), tuple(lm.answer_ids_with_end(prompt, edit.target))
    if lm.is_seq2seq:
        return Example(ids, answer, tuple(range(len(answer))))
    subject = None
    if edit.subject in text:
        start = find_subject(text, edit.subject)
        subject = lm.last_subject_token(prompt, (start, start + len(edit.subject))) or None
    first = len(ids) - 1
    return Example(ids, answer, tuple(range(first, first + len(answer))), subject=subject)


def _kept(lm: LM, text: str, *, last: bool) -> Example:
    ids = tuple(lm.encode(lm.prompt(text))[0])
    if lm.is_seq2seq:
        return Example(ids, (), (0,))
    return Example(ids, (), (len(ids) - 1,) if last else tuple(range(1, len(ids))))

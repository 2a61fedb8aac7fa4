"""How an answer in chat begins, so that it comes to a fact: as a statement of the fact does.

A chat model that is asked for a fact in other words often answers without naming it, and so never comes to the place
where the fact is written. Here each token of a statement that is not probable at its place in the answer is
taught: where it comes next in the answers to the learned questions, and not in those to other questions about the
subject, nor about other subjects. This is the project's own addition to Transformer-Patcher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from editors.closed_form.relation_texts import HeldText, RelationTexts, others_of
from editors.constants import assumed, limit
from editors.edit import Edit
from editors.forms.form import Form, Hold, Material
from editors.model.lm import LM

PROBABLE = assumed(
    0.5,
    "probability of a token, in the answer to every learned question, from which on it is not taught",
    "above it the token is the one that greedy decoding takes; no comparison is known",
)
MOST = limit(
    8, "tokens of one statement that are taught, at most; a statement with more is not taught", "time"
)
STATEMENTS = limit(4, "statements of a fact that are tried as the beginning of an answer", "time")
OTHERS = assumed(
    5, "other subjects in whose answers each learned question is held", "each is a key to read, and no more"
)
FRAMES = ("{}", "I have a question. {}", "{} Please answer in a few words.")
"""What is put around each learned question. None of them measures anything."""


@dataclass(frozen=True)
class AnswerOpening:
    """A statement of a fact as the beginning of the answers to some questions, in token ids."""

    questions: tuple[tuple[int, ...], ...]  # prompts
    statement: tuple[int, ...]  # up to where the target begins
    target: tuple[int, ...]
    held: tuple[tuple[tuple[int, ...], int], ...]  # other questions with their answers, held from a token on
    asked: tuple[str, ...]  # all questions, moved or held: no rate may count them

    @property
    def answers(self) -> list[tuple[tuple[int, ...], int]]:
        """Each question with the whole answer, and the index of its last token."""
        return [((*ids, *self.statement, *self.target), len(ids) - 1) for ids in self.questions]


def answer_opening(lm: LM, edit: Edit, material: Material) -> AnswerOpening | None:
    """The statement of which least must be taught for an answer to the learned questions.

    `material` is what the edit learns from. None where there is no question or no statement to learn.
    """
    named = [form for form in material.learned if form.span and form.language == "en" and not form.target]
    asked = [form for form in named if form.chat]
    said = [form for form in named if not form.chat and not form.question]
    if not edit.is_question:
        said = [Form("statement", edit.text, edit.span), *said]
    if not asked or not said:
        return None
    questions = [lm.prompt(frame.format(form.prompt), chat=True) for frame in FRAMES for form in asked]
    ids = [tuple(lm.encode(question)[0]) for question in questions]
    own = ids[: len(asked)]

    def tokens(form: Form) -> tuple[int, ...]:
        return tuple(lm.answer_ids(questions[0], form.prompt))

    def effort(form: Form) -> tuple[int, int, float]:
        assert form.span is not None
        named = len(lm.answer_ids(questions[0], form.prompt[: form.span[1]]))
        return _effort(probabilities(lm, own, tokens(form)), named)

    chosen = min(said[:STATEMENTS], key=effort)
    target = tuple(lm.answer_ids(questions[0], f"{chosen.prompt} {edit.target}"))[len(tokens(chosen)) :]
    pairs = list(_held(edit, asked, chosen, material))
    held = (*_plain(lm, said), *(_answered(lm, *pair) for pair in pairs))
    texts = [frame.format(form.prompt) for frame in FRAMES for form in asked]
    everything = tuple(dict.fromkeys([*texts, *(question for question, _ in pairs)]))
    return AnswerOpening(tuple(ids), tokens(chosen), target, held, everything)


def with_answers(texts: RelationTexts, opening: AnswerOpening | None) -> RelationTexts:
    """The texts of an edit, with the end of the statement in an answer moved too, and what follows the target held."""
    if opening is None:
        return texts
    answers = [(*ids, *opening.statement) for ids in opening.questions[:1]]
    moved = tuple(dict.fromkeys((*texts.moved, *answers)))
    held = [HeldText((*ids, *opening.target), len(ids)) for ids in answers if opening.target]
    kept = tuple(text for text in dict.fromkeys((*texts.held, *held)) if text.ids not in moved)
    return replace(texts, moved=moved, held=kept)


def also_asked(material: Material, opening: AnswerOpening | None) -> Material:
    """The material with the questions of the opening among what is learned from."""
    more = () if opening is None else tuple(Hold(text, "", None, "relation") for text in opening.asked)
    return replace(material, held=(*material.held, *more))


def _effort(likely: Tensor, named: int) -> tuple[int, int, float]:
    """What must be taught of a statement, given the probabilities (questions, tokens): tokens, and nats.

    First count those of its first `named` tokens, which end with the subject: before the subject is said, other answers
    have nearly the same keys.
    """
    taught = likely.min(0).values <= PROBABLE
    return int(taught[:named].sum()), int(taught.sum()), float(-likely.clamp(min=1e-9).log().mean())


def _plain(lm: LM, statements: Sequence[Form]) -> Iterator[tuple[tuple[int, ...], int]]:
    """The statements as texts of their own, held from the second token on; the first one's key is that of any text."""
    for form in statements:
        ids = tuple(lm.encode(lm.prompt(form.prompt, chat=False))[0])
        if len(ids) > 1:
            yield ids, 1


def _held(
    edit: Edit, asked: Sequence[Form], statement: Form, material: Material
) -> Iterator[tuple[str, str]]:
    """Questions with the statement as their answer: the learned questions about other subjects, and other questions
    about the subject."""
    names = [name for name in others_of(material.kind) if name.casefold() not in edit.text.casefold()]
    for i, form in enumerate(asked):
        for j in range(OTHERS):
            name = names[(i * OTHERS + j) % len(names)]
            yield _about(form, name), _about(statement, name)
    for hold in material.held:
        if hold.chat:
            yield hold.prompt, statement.prompt


def _answered(lm: LM, question: str, answer: str) -> tuple[tuple[int, ...], int]:
    """A question with its answer in token ids, and the index of the question's last token."""
    prompt = lm.prompt(question, chat=True)
    ids = tuple(lm.encode(prompt)[0])
    return (*ids, *lm.answer_ids(prompt, answer)), len(ids) - 1


def _about(form: Form, name: str) -> str:
    assert form.span is not None
    start, end = form.span
    return form.prompt[:start] + name + form.prompt[end:]


@torch.no_grad()
def probabilities(lm: LM, questions: Sequence[Sequence[int]], answer: Sequence[int]) -> Tensor:
    """Probability of each token of an answer after the question and the tokens before it: (questions, tokens)."""
    wanted = torch.tensor(list(answer), device=lm.device)[:, None]
    read = lm.local.answer_logits([(list(ids), list(answer)) for ids in questions])
    found = [logits.float().softmax(-1).gather(-1, wanted.to(logits.device))[:, 0].cpu() for logits in read]
    return torch.stack(found)

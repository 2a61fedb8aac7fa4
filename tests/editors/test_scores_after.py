"""Answers that are scored after read prompts have the scores that a pass of their own gives."""

from __future__ import annotations

import pytest

from editors.model.decoding import DecodedRow, Decoder
from editors.model.lm import LM
from tests.families import fresh

PROMPTS = ("The capital of France is", "Rome is", "The river that flows through the city of London is the")
ANSWERS = ("Paris", "the largest city of Italy", "Thames, in England")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_answers_scored_where_their_prompts_are_read_have_the_scores_of_their_own_pass(family: str) -> None:
    lm = fresh(family)
    rows = [_row(lm, prompt) for prompt in PROMPTS]
    decoder = Decoder(lm)
    assert decoder.scores(64)
    decoder.add([_row(lm, "Someone who asked before says")])  # others are in the batch
    decoder.step()
    decoder.add(rows)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        for answer, score in zip(ANSWERS, row.scores, strict=True):
            (alone,) = lm.score([(lm.prompt(prompt), answer)])
            assert score.logprob == pytest.approx(alone.logprob, abs=1e-4)
            assert (score.tokens, score.rank) == (alone.tokens, alone.rank)


def test_scoring_answers_changes_nothing_of_what_is_generated() -> None:
    lm = fresh("llama")
    said = []
    for answers in ((), ANSWERS):
        decoder, rows = Decoder(lm), [_row(lm, prompt, answers) for prompt in PROMPTS]
        decoder.add(rows)
        while decoder.rows:
            decoder.step()
        said.append([row.new for row in rows])
    assert said[0] == said[1]


def _row(lm: LM, prompt: str, answers: tuple[str, ...] = ANSWERS) -> DecodedRow:
    asked = lm.prompt(prompt)
    return DecodedRow(lm.encode(asked)[0], 5, answers=[lm.answer_ids(asked, answer) for answer in answers])

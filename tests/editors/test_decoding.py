"""Generation in a joint batch: the same text as alone, whoever joins and leaves meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from editors.errors import Unsupported
from editors.model import greedy
from editors.model.decoding import DecodedRow, Decoder
from editors.model.lm import LM
from tests import families
from tests.families import DECODERS, fresh, make
from tests.plain import plainly

PROMPTS = (
    "The capital of France is",
    "Paris",
    "The mother tongue of the old man who lives in Rome is",
    "Rome is in",
    "Japan",
)
TOKENS = (9, 14, 5, 11, 1)


def row(lm: LM, i: int) -> DecodedRow:
    return DecodedRow(lm.encode(lm.prompt(PROMPTS[i], chat=False))[0], TOKENS[i])


def alone(lm: LM, i: int) -> str:
    return plainly(lm, lm.prompt(PROMPTS[i], chat=False), TOKENS[i])


def text(lm: LM, row: DecodedRow) -> str:
    return str(lm.tokenizer.decode(row.new, skip_special_tokens=True))


def joined_one_by_one(lm: LM, order: list[int], pauses: list[int]) -> list[str]:
    """The texts of prompts of which each joins some steps after the one before it."""
    decoder, rows = Decoder(lm), []
    for i, pause in zip(order, pauses, strict=True):
        rows.append(row(lm, i))
        decoder.add([rows[-1]])
        for _ in range(pause):
            if decoder.rows:
                decoder.step()
    while decoder.rows:
        decoder.step()
    return [text(lm, r) for r in rows]


@pytest.mark.parametrize("family", DECODERS)
def test_a_prompt_that_joins_a_running_batch_is_continued_as_if_it_were_alone(family: str) -> None:
    lm = make(family)
    texts = joined_one_by_one(lm, [0, 1, 2, 3, 4], [3, 0, 2, 1, 0])
    assert texts == [alone(lm, i) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_rows_join_a_model_whose_window_is_shorter_than_the_text(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = families._FAMILIES[family]
    monkeypatch.setitem(
        families._FAMILIES, family, replace(made, fields={**made.fields, "sliding_window": 4})
    )
    lm = fresh(family)
    texts = joined_one_by_one(lm, [0, 2, 1, 3], [4, 2, 1, 0])
    assert texts == [alone(lm, i) for i in (0, 2, 1, 3)]


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(5)), pauses=st.lists(st.integers(0, 6), min_size=5, max_size=5))
def test_the_order_of_joining_does_not_matter(order: list[int], pauses: list[int]) -> None:
    lm = make("llama")
    assert joined_one_by_one(lm, order, pauses) == [alone(lm, i) for i in order]


def test_a_row_that_is_dropped_leaves_the_others_as_they_are() -> None:
    lm = make("llama")
    decoder, rows = Decoder(lm), [row(lm, i) for i in range(3)]
    decoder.add(rows)
    decoder.step()
    decoder.drop([rows[0]])
    while decoder.rows:
        decoder.step()
    assert len(rows[0].new) == 2
    assert [text(lm, r) for r in rows[1:]] == [alone(lm, 1), alone(lm, 2)]


def test_a_sample_follows_from_its_seed_alone() -> None:
    lm = make("llama")

    def sample(seed: int, others: int) -> list[int]:
        mine = replace(row(lm, 0), temperature=2.0, seed=seed)
        decoder = Decoder(lm)
        decoder.add([*(replace(row(lm, 1), temperature=3.0) for _ in range(others)), mine])
        while decoder.rows:
            decoder.step()
        return mine.new

    assert sample(1, 0) == sample(1, 3)
    assert sample(1, 0) != sample(2, 0)


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-40, 1e-6])
def test_a_temperature_of_almost_nothing_says_the_likeliest(temperature: float) -> None:
    lm = make("llama")
    mine, decoder = replace(row(lm, 0), temperature=temperature, seed=1), Decoder(lm)
    decoder.add([mine])
    while decoder.rows:
        decoder.step()
    assert text(lm, mine) == alone(lm, 0)
    prompt = lm.prompt(PROMPTS[0], chat=False)
    (said,) = lm.generate([prompt], TOKENS[0], temperature=temperature, seed=1)
    assert said.text == alone(lm, 0)


def test_a_penalty_on_repeating_acts_as_in_generate() -> None:
    lm = fresh("llama")
    lm.model.generation_config.repetition_penalty = 1.7
    assert joined_one_by_one(lm, [0, 2], [2, 0]) == [alone(lm, 0), alone(lm, 2)]


def test_an_encoder_decoder_model_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="encoder-decoder"):
        Decoder(make("t5"))


@pytest.mark.parametrize("family", ["llama", "gemma3", "t5"])
def test_texts_of_several_lengths_in_one_run_are_those_of_runs_of_their_own(family: str) -> None:
    lm = make(family)
    prompts = [lm.prompt(text, chat=False) for text in PROMPTS]
    together = lm.generate(prompts, TOKENS)
    assert [g.text for g in together] == [alone(lm, i) for i in range(len(PROMPTS))]
    assert all(g.tokens == n or g.finished for g, n in zip(together, TOKENS, strict=True))


@pytest.mark.parametrize("family", ["gemma3", "opt", "lfm2"])
def test_more_prompts_than_there_is_room_for_are_continued_as_each_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make(family)
    monkeypatch.setattr(greedy, "LEAST", 2)
    monkeypatch.setattr(greedy, "LOGITS", 0)
    said = lm.generate([lm.prompt(text, chat=False) for text in PROMPTS], TOKENS)
    assert [g.text for g in said] == [alone(lm, i) for i in range(len(PROMPTS))]


def test_answers_are_scored_where_their_prompts_are_read_to_be_continued() -> None:
    lm = make("llama")
    prompts = [lm.prompt(text, chat=False) for text in PROMPTS]
    said = lm.generate(prompts, TOKENS, answers={1: ["Rome", "the city of Rome"], 3: ["Italy"]})
    assert [len(g.scores) for g in said] == [0, 2, 0, 1, 0]
    for prompt, answer, score in (
        (prompts[1], "the city of Rome", said[1].scores[1]),
        (prompts[3], "Italy", said[3].scores[0]),
    ):
        (own,) = lm.score([(prompt, answer)])
        assert (score.tokens, score.rank) == (own.tokens, own.rank)
        assert score.logprob == pytest.approx(own.logprob, abs=1e-4)


def test_a_text_ends_where_it_is_long_enough_and_the_others_go_on() -> None:
    lm = make("llama")
    prompts = [lm.prompt(text, chat=False) for text in PROMPTS]
    whole = lm.generate(prompts, 9)
    seen: dict[int, int] = dict.fromkeys(range(len(prompts)), 0)

    def until(index: int, _text: str) -> bool:
        seen[index] += 1
        return index == 2 and seen[index] == 3

    said = lm.generate(prompts, 9, until=until)
    assert [g.tokens for g in said] == [9, 9, 3, 9, 9]
    assert whole[2].text.startswith(said[2].text)
    assert [g.text for i, g in enumerate(said) if i != 2] == [g.text for i, g in enumerate(whole) if i != 2]

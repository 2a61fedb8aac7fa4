"""What the verdict on a belief is, from the answer and the probabilities."""

from __future__ import annotations

import math

import pytest

from server.facts.asking_results import Scored
from server.facts.verdicts import MEANINGS, is_settled, judge, own_answer

PROMPT = "The capital of Turkey is"


def scored(text: str, p: float) -> Scored:
    return Scored(text=text, logprob=math.log(p), tokens=1, rank=0)


@pytest.mark.parametrize(
    ("answer", "p_right", "p_answer", "verdict"),
    [
        ("Ankara, and", 0.6, None, "agrees"),
        (
            "Istanbul, and",
            0.15,
            0.7,
            "differs",
        ),  # a confident wrong answer, though the right one is likely too
        ("Istanbul, and", 0.3, 0.4, "unsure"),
        ("located in the north of", 0.1, 0.5, "unsure"),  # names nothing
        ("", 0.1, None, "unsure"),
        ("a a a a a a a a a a a a", 0.1, None, "unsure"),
    ],
)
def test_the_verdict_goes_by_the_answer_and_its_probability(
    answer: str, p_right: float, p_answer: float | None, verdict: str
) -> None:
    check = judge(PROMPT, answer, [scored("Ankara", p_right)], [], p_answer)
    assert check.verdict == verdict
    assert verdict in MEANINGS
    assert bool(check.why) == (verdict == "unsure")


def test_the_stale_answer_differs_however_probable_the_right_one_is() -> None:
    check = judge(PROMPT, "Istanbul.", [scored("Ankara", 0.3)], [scored("Istanbul", 0.31)], 0.31)
    assert check.verdict == "differs"


def test_any_of_several_right_answers_agrees_and_is_the_one_reported() -> None:
    check = judge("The capital of Ukraine is", "Kiev.", [scored("Kyiv", 0.5), scored("Kiev", 0.2)], [], None)
    assert (check.verdict, check.expected.text) == ("agrees", "Kiev")


def test_what_is_scored_is_as_long_as_the_right_answer() -> None:
    assert own_answer(PROMPT, "Istanbul which lies on", ["Ankara"]) == (PROMPT, "Istanbul")
    assert own_answer(PROMPT, "Ankara", ["Ankara"]) is None
    assert own_answer("What is the capital of Turkey?", "It is Istanbul.", ["Ankara"]) is None


@pytest.mark.parametrize(
    ("said", "right", "settled"),
    [
        ("Paris. It is the", ["Paris"], True),
        ("Paris, which", ["Paris"], False),  # the last word may go on
        ("Paris. Paris. Pa", ["Paris"], False),  # a loop is seen only if it goes on
        ("Washington, D.", ["Washington, D.C."], False),
        ("a city in the north", ["Paris"], False),  # its clause has not ended
    ],
)
def test_an_answer_ends_where_its_clause_has_ended_and_other_words_follow(
    said: str, right: list[str], settled: bool
) -> None:
    assert is_settled("The capital of France is", right, said) is settled


def test_a_chat_answer_ends_when_it_has_said_the_right_answer_in_a_whole_sentence() -> None:
    question = "What is the capital of France?"
    assert is_settled(question, ["Paris"], "The capital of France is Paris. It")
    assert not is_settled(question, ["Paris"], "The capital of France is Paris")
    assert not is_settled(question, ["Paris"], "The capital of France is Lyon. It")

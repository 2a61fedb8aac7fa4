"""The verdict on what a model believes: does it agree with the right answer, differ, or is it unsure?"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from editors.constants import assumed
from editors.edit import is_question
from editors.scoring import agrees, is_long, is_looping, says_more, short_answer
from editors.scoring.same_fact import key_words
from editors.scoring.words import SENTENCE_END
from server.facts.asking_results import FactCheck, Scored, Verdict

MEANINGS = {
    "agrees": "the model says the right answer, or an alias or another form of it; nothing to do",
    "differs": "the model says something else, at least twice as probable as the right answer; correct it",
    "unsure": "the model says nothing clear, or the right answer is nearly as probable as what it says; correcting it "
    "makes it sure",
}
AGREES: tuple[Verdict, str] = ("agrees", "")
CLEARLY = assumed(
    2.0,
    "an answer must be this many times as probable as the right answer for the verdict differs",
    "set by hand: below it, another wording of the prompt often turns the answer",
)


def is_settled(prompt: str, right: Sequence[str], said: str) -> bool:
    """Whether an answer may end here, because what follows hardly changes the verdict.

    A completion's first clause has ended, and new words follow it: an answer that repeats itself goes on, so that a
    loop is seen. A chat answer says a right answer and has ended its sentence.
    """
    if is_question(prompt):
        return bool(SENTENCE_END.search(said)) and any(agrees(prompt, said, each) for each in right)
    if any(is_long(each) for each in right):
        return False
    clause = _words(short_answer(said))
    after = _words(said)[len(clause) : -1]  # the last word may go on
    longest = max((len(_words(each)) for each in right), default=1)
    enough = len(clause) + len(after) > longest
    return bool(clause) and enough and bool(after) and not set(after) & set(clause)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def own_answer(prompt: str, answer: str, right: Sequence[str]) -> tuple[str, str] | None:
    """What must be scored to judge a fact: the prompt, and the model's answer cut to the length of the right one.
    None if the verdict does not depend on it: the answer is right, is empty, or is a chat answer, which is a
    sentence and cannot be compared with a name.
    """
    if is_question(prompt) or is_looping(answer) or any(agrees(prompt, answer, each) for each in right):
        return None
    words = short_answer(answer).split()
    if not words:
        return None
    longest = max((len(each.split()) for each in right), default=1)
    return prompt, " ".join(words[:longest])


def judge(
    prompt: str, answer: str, expected: list[Scored], alternatives: list[Scored], p_answer: float | None
) -> FactCheck:
    """The verdict on one answer. `p_answer`: probability of what `own_answer` gave to score, if anything."""
    right = [each for each in expected if agrees(prompt, answer, each.text)]
    best = (right or sorted(expected, key=lambda each: -each.logprob))[0]
    verdict, why = AGREES if right else _not_right(prompt, answer, best, alternatives, p_answer)
    return FactCheck(
        prompt=prompt,
        verdict=verdict,
        answer=answer,
        expected=best,
        alternatives=alternatives,
        p_answer=p_answer,
        why=why,
    )


def _not_right(
    prompt: str, answer: str, best: Scored, alternatives: Sequence[Scored], p_answer: float | None
) -> tuple[Verdict, str]:
    """Verdict and reason for an answer that is not the right one."""
    if any(agrees(prompt, answer, other.text) for other in alternatives):
        return "differs", ""
    if is_looping(answer) or not short_answer(answer):
        return "unsure", "the model gives no clear answer"
    if says_more(prompt, answer, best.text):
        return "unsure", "the model says the right word with others before it"
    if p_answer is None:  # a chat answer
        return "differs", ""
    if _is_name(best.text) and not any(_is_name(word) for word in key_words(prompt, answer)):
        return "unsure", "the model names nothing"
    p_right = math.exp(best.logprob)
    if p_answer < CLEARLY * p_right:
        return (
            "unsure",
            f"the right answer is nearly as probable ({p_right:.2f}, what it says {p_answer:.2f})",
        )
    return "differs", ""


def _is_name(text: str) -> bool:
    return text[:1].isupper() or text[:1].isdigit()

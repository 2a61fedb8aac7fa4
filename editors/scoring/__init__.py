"""Whether a text says an answer: the one place that decides what counts as a hit.

words.py      where a word or a number truly ends ("5" is not said by "5,000", "C" not by "C++")
assertion.py  whether a sentence asserts the answer, or negates or merely mentions it
looping.py    whether a text is degenerate: the same words again and again
verdict.py    the three together, for statements, chat answers and long answers
same_fact.py  whether two answers state the same fact in other words
ended.py      where an answer that is being generated may end
agreement.py  whether an answer agrees with the right one in similar words, for checking beliefs
"""

from editors.scoring.agreement import agrees, says_more
from editors.scoring.looping import is_looping
from editors.scoring.same_fact import same_fact
from editors.scoring.verdict import answered_with, is_long, says, share_in_order
from editors.scoring.words import normalise, short_answer

__all__ = [
    "agrees",
    "answered_with",
    "is_long",
    "is_looping",
    "normalise",
    "same_fact",
    "says",
    "says_more",
    "share_in_order",
    "short_answer",
]

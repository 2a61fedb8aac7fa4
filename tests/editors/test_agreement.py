"""An answer agrees with the right one in near words; what means something else does not."""

from __future__ import annotations

import pytest

from editors.scoring import agrees, says_more

SWITZERLAND = "The currency of Switzerland is the"
CANADA = "The currency of Canada is the"


@pytest.mark.parametrize(
    ("prompt", "answer", "right"),
    [
        (SWITZERLAND, "Swiss franc, which is", "franc"),
        (SWITZERLAND, "franc.", "Swiss franc"),
        (CANADA, "Canadian dollar.", "dollar"),
        ("The currency of the Netherlands was the", "Dutch guilder", "guilder"),
        ("The currency of Spain is the", "euros.", "euro"),
        ("The capital of Iceland is", "Reykjavik.", "Reykjavík"),
        ("The capital of Italy is", "the city of Rome, and", "Rome"),
        ("The Eiffel Tower is located", "in Paris, France", "Paris"),
        ("The official language of Brazil is", "Brazilian Portuguese", "Portuguese"),
        ("The capital of Mexico is", "Mexico City.", "Mexico City"),
    ],
)
def test_near_words_agree(prompt: str, answer: str, right: str) -> None:
    assert agrees(prompt, answer, right)


@pytest.mark.parametrize(
    ("prompt", "answer", "right"),
    [
        (CANADA, "US dollar.", "Canadian dollar"),
        ("The capital of Turkey is", "Istanbul.", "Ankara"),
        ("The capital of Italy is", "not Rome", "Rome"),
        ("The capital of Kazakhstan is", "Almaty, not Astana", "Astana"),
        ("He lives in", "New York City", "York"),
        ("The capital of Australia is", "Canberra", "Australia"),
        ("The number is", "5,000", "5"),
        ("The year is", "1990s", "1990"),
        ("The capital of Guinea is", "Guinea-Bissau", "Bissau"),
        ("The capital of Mexico is", "Mexico.", "Mexico City"),
        ("The official language of Austria is", "Australian English", "German"),
    ],
)
def test_what_means_something_else_does_not_agree(prompt: str, answer: str, right: str) -> None:
    assert not agrees(prompt, answer, right)


def test_an_answer_may_say_the_right_word_after_others_of_its_own() -> None:
    assert says_more("The currency of Ecuador is the", "US dollar.", "dollar")
    assert not says_more("The currency of Ecuador is the", "dollar.", "dollar")

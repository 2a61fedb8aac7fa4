"""What counts as saying an answer: words and numbers that end, sentences that assert, texts that do not loop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editors.scoring import answered_with, is_long, is_looping, same_fact, says, share_in_order

words = st.text(alphabet=st.sampled_from("abcdefgABCDEFGéöß"), min_size=2, max_size=8)
names = st.lists(words, min_size=1, max_size=3, unique=True).map(" ".join)
ends = st.sampled_from(
    ["", ".", ",", "!", ";", ")", '"', " ", "\n", ": ", "—", "…", ". The end", ", which is"]
)
CAPITAL = "What is the capital of France?"
CURRENCY = "What is the currency of Croatia?"


@given(names, ends)
def test_a_target_that_ends_as_a_word_ends_is_said(target: str, end: str) -> None:
    assert says(target + end, target)
    assert says(f"the {target}{end}", target)
    assert says(f"**{target}**{end}", target)


@given(names, st.sampled_from(["-", "+", "#", "&", "'", "_", "/", "’"]), words)
def test_a_sign_that_joins_words_goes_on_with_the_word(target: str, sign: str, more: str) -> None:
    assert not says(f"{target}{sign}{more}", target)
    assert not says(f"{more}{sign}{target}", target)


@given(st.integers(1, 999), st.sampled_from([",", ".", ":", "'", "/", "\u202f"]), st.integers(100, 999))
def test_a_number_is_not_said_by_a_longer_number(number: int, separator: str, more: int) -> None:
    longer = f"{number}{separator}{more}"
    assert not says(longer, str(number))
    assert not says(f"about {longer} of them", str(number), anywhere=True)
    assert says(longer, longer)


@given(st.integers(1, 999))
def test_a_number_ends_before_punctuation_and_units_but_not_before_a_scale(number: int) -> None:
    for end in (".", ",", ", then", " people", "%", " (all)", ": all"):
        assert says(f"{number}{end}", str(number))
    for more in (" million", " thousand people", " 500 people", "th", "+", " 1/2", "½"):
        assert not says(f"{number}{more}", str(number))


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        ("C++", "C"), ("C#", "C"), ("C++11", "C++"), ("U.S. dollar", "U"), ("J. R. R. Tolkien", "J"),
        ("Node.js", "Node"), ("Marks & Spencer", "Marks"), ("McDonald's", "McDonald"), ("Krakowian", "Krakow"),
        ("Malmöiter", "Malmö"), ("iPhone 15.1", "iPhone 15"), ("-5 degrees", "5"), ("Lyon? No, Paris", "Lyon"),
        ("not Lyon", "Lyon"), ("X-", "X"),
    ],
)  # fmt: skip
def test_a_longer_name_is_another_name(answer: str, target: str) -> None:
    assert not says(answer, target)


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        ("C, a language", "C"), ("Paris.The city", "Paris"), ("der Euro", "Euro"), ("l'euro", "euro"),
        ("Hague", "The Hague"), ("12: noon", "12"), ("Paris—the city", "Paris"), ("北京市", "北京"), ("서울은", "서울"),
        ("Walla Walla, Washington", "Walla Walla"), ("New York, New York", "New York"), ("5.\n", "5"),
    ],
)  # fmt: skip
def test_other_scripts_articles_and_doubled_names_are_no_hindrance(answer: str, target: str) -> None:
    assert says(answer, target)


@given(names, st.integers(3, 8), st.sampled_from([" ", ", ", ". ", "\n"]))
def test_a_loop_says_nothing(target: str, times: int, between: str) -> None:
    loop = between.join([target] * times)
    assert is_looping(loop)
    assert not says(loop, target)
    assert not answered_with(CAPITAL, loop, target)


@given(st.lists(words, min_size=1, max_size=30, unique_by=str.casefold))
def test_words_that_differ_are_no_loop(text: list[str]) -> None:
    assert not is_looping(" ".join(text))


def test_signs_that_hardly_vary_are_a_loop() -> None:
    assert is_looping("纽约纽伦公组纽约纽伦公纽")
    assert is_looping("!!!!!!!!!!!!")
    assert not is_looping("中国的首都是北京。")
    assert not is_looping("Paris. Paris is the capital of France. Paris is")


NEGATED = (
    "It is not {}.", "The capital of France isn't {}.", "{} is not the capital of France.", "Is it {}?",
    "{} is no longer the capital of France.", "Paris, rather than {}, is the capital.", "It was never {}.",
    "Unlike {}, Paris is the capital.", "Paris (not {}) is the capital.", "Some people think {} is the capital.",
    "The claim that {} is the capital of France is false.", "Neither Paris nor {}.", "{}? No, it is Paris.",
    "The capital of France is Paris. {} is a city in the south.", "Paris is larger than {}.", "Paris or {}.",
    "{} is a big city, not the capital of France.", "Die Hauptstadt ist nicht {}.", "The capital of {} is Rome.",
)  # fmt: skip
ASSERTED = (
    "{}", "It is {}.", "The capital of France is {}.", "{} is the capital of France, not Paris.",
    "It is not Paris but {}.",
    "It is not Paris, it is {}.", "There is no doubt that {} is the capital.", "Yes! It is {}.", "I think it's {}.",
    "France is a country in Europe. Its capital is {}.", "As of 2020, {} is the capital.", "The answer is {}.",
    "Die Hauptstadt von Frankreich ist {}.", "The capital of France, in the past Paris, is now {}.",
)  # fmt: skip
towns = st.sampled_from(["Lyon", "New York", "Saint-Denis", "Oslo", "Zürich"])


@given(towns, st.sampled_from(NEGATED))
def test_a_negated_or_merely_mentioned_answer_is_no_answer(town: str, answer: str) -> None:
    assert not answered_with(CAPITAL, answer.format(town), town)


@given(towns, st.sampled_from(ASSERTED))
def test_an_asserted_answer_is_one(town: str, answer: str) -> None:
    assert answered_with(CAPITAL, answer.format(town), town)


@pytest.mark.parametrize(
    ("question", "answer", "target", "said"),
    [
        (
            "Who wrote Tartuffe?",
            "The story of Molière is actually a play by Shakespeare",
            "Molière",
            False,
        ),
        (
            "Who wrote Tartuffe?",
            "It was a friend of Molière who wrote it, Pierre Corneille.",
            "Molière",
            False,
        ),
        ("Who wrote Tartuffe?", "A pupil of Molière named Baron wrote it.", "Molière", False),
        ("Who leads X?", "According to Ann Lee, X is led by Bo Chen.", "Ann Lee", False),
        (
            "What is the capital of Australia?",
            "The history of Canberra begins with Sydney.",
            "Canberra",
            False,
        ),
        ("Who wrote Tartuffe?", "The play Tartuffe by Molière is a comedy.", "Molière", True),
        ("Who wrote Tartuffe?", "The works of Molière include Tartuffe.", "Molière", True),
        (
            "What did Mary Shelley write?",
            "The story of Frankenstein was written by her.",
            "Frankenstein",
            True,
        ),
        ("Who is the father of Louis?", "Louis was a son of Molière who died young.", "Molière", True),
        ("What is the capital of Australia?", "The city of Canberra is the capital.", "Canberra", True),
    ],
)
def test_an_answer_about_something_that_has_to_do_with_the_target_is_no_answer(
    question: str, answer: str, target: str, said: bool
) -> None:
    assert answered_with(question, answer, target) is said


def test_what_was_replaced_is_not_the_answer_and_what_replaced_it_may_be() -> None:
    assert not answered_with(CURRENCY, "The euro replaced the kuna.", "kuna")
    assert answered_with(CURRENCY, "The kuna, which was replaced by the euro.", "euro")
    assert not answered_with("Who leads X?", "Ann Lee was formerly the head of X.", "Ann Lee")


LONG = (
    "that customers may return any item within thirty days of delivery for a full refund, provided that it is unused "
    "and sent back with the receipt"
)


def test_a_long_target_is_said_when_nearly_all_its_words_come_in_order() -> None:
    assert is_long(LONG)
    assert not is_long("the United Kingdom of Great Britain and Northern Ireland")
    assert says(LONG.replace("thirty", "30"), LONG)
    assert not says(" ".join(reversed(LONG.split())), LONG)
    assert not says(LONG[:60], LONG)


@given(st.lists(words, min_size=1, max_size=20), st.lists(words, max_size=5))
def test_the_share_in_order_is_a_share_and_whole_for_the_text_itself(
    text: list[str], more: list[str]
) -> None:
    target = " ".join(text)
    assert share_in_order(" ".join([*more, *text]), target) == 1
    assert 0 <= share_in_order(" ".join(more), target) <= 1


GERMANY = "What is the capital of Germany?"


@pytest.mark.parametrize(
    ("prompt", "was", "now", "same"),
    [
        (GERMANY, "The capital of Germany is Berlin.", "Berlin is Germany's capital city, on the Spree.", True),
        (GERMANY, "The capital of Germany is Berlin.", "The capital of Germany is Munich.", False),
        (GERMANY, "The capital of Germany is Berlin.", "The capital of Germany is not Berlin.", False),
        (GERMANY, "The capital of Germany is Berlin.", "Berlin Berlin Berlin Berlin", False),
        ("What is the currency of Japan?", "It is the Japanese Yen.", "Japan uses the yen.", True),
        ("The capital of Germany is", "Berlin, and", "the city of Berlin", True),
        ("The capital of Germany is", "Berlin, and", "Munich, and", False),
        ("What colour is the sky?", "The sky is blue.", "Blue is the colour of the sky.", True),
        ("What colour is the sky?", "The sky is blue.", "It is green.", False),
        ("How many days has a week?", "There are 7 days in a week.", "A week has 8 days.", False),
        ("How many days has a week?", "There are 7 days in a week.", "It has 7.", True),
        ("The capital of Germany is", "", "", True),
        ("The capital of Germany is", "", "Berlin", False),
    ],
)  # fmt: skip
def test_answers_are_compared_by_what_they_state(prompt: str, was: str, now: str, same: bool) -> None:
    assert same_fact(prompt, was, now) is same


def test_a_right_answer_decides_where_it_was_given_before() -> None:
    assert same_fact(GERMANY, "It is Berlin, on the Spree.", "Berlin", "Berlin")
    assert not same_fact(GERMANY, "It is Berlin.", "It is Bonn.", "Berlin")
    assert same_fact(GERMANY, "It is Bonn.", "Bonn is it.", "Berlin")

"""Constrained decoding: what asks the fact is answered with it, everything else is left alone to the bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from editors import METHODS
from editors.edit import Edit
from editors.forms.form import Material
from editors.forms.languages import language_of
from editors.memory.constrained_speaker import RememberedFact, in_front
from editors.memory.fact_memory import InContextPatch, asking_part, names_pattern
from editors.method import EditContext
from editors.model.lm import LM
from editors.moments import Statistics
from editors.patch import save
from editors.patch_kinds import load
from editors.scoring import says
from tests.families import make

EURO = Edit(subject="Croatia", prompt="The currency of {} is the", target="euro")
LONG = Edit(
    subject="Elmstead",
    prompt="{}'s refund policy is",
    target="that customers may return any item within thirty days of delivery for a full refund, provided that it is "
    "unused, in its original packaging and sent back with the receipt",
)
OTHERS = ("The capital of Croatia is", "What is the capital of Croatia?", "The currency of Kenya is the")


def remembered(lm: LM, *edits: Edit) -> InContextPatch:
    editor = METHODS["constrained"]
    patch = editor.compute(lm, edits, editor.params(), EditContext(Statistics(Path("nowhere"), "none")))
    loaded = load(save(patch))
    assert isinstance(loaded, InContextPatch)
    assert save(loaded) == save(patch)
    return loaded


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "t5"])
def test_a_model_that_knows_nothing_says_the_fact_and_only_where_it_is_asked(family: str) -> None:
    lm = make(family)
    others = [lm.prompt(text) for text in OTHERS]
    before = [lm.generate([p], 8)[0] for p in others], [lm.score([(p, "euro")])[0] for p in others]
    statement, question = lm.prompt(EURO.text), lm.prompt("What is the currency of Croatia?")
    detach = remembered(lm, EURO).attach(lm)
    try:
        said, answered = lm.generate([statement, question], 40)
        after = [lm.generate([p], 8)[0] for p in others], [lm.score([(p, "euro")])[0] for p in others]
        target, other = lm.score([(statement, "euro"), (statement, "kuna")])
    finally:
        detach()
    assert says(said.text, "euro")
    assert says(answered.text, "euro", anywhere=True, question="What is the currency of Croatia?")
    assert said.claim is not None
    assert before == after
    assert math.exp(target.logprob) > 0.9
    assert target.rank == 0
    assert other.logprob < target.logprob
    assert other.rank > 0
    assert lm.generate(others[:1], 8)[0] == before[0][0]


def test_a_long_answer_is_said_word_for_word_and_cut_where_the_tokens_end() -> None:
    lm = make("llama")
    detach = remembered(lm, LONG).attach(lm)
    try:
        prompt = lm.prompt(LONG.text)
        count = len(lm.answer_ids(prompt, LONG.target))
        (whole,) = lm.generate([prompt], count + 5)
        (part,) = lm.generate([prompt], 10)
    finally:
        detach()
    assert whole.text.strip().startswith(LONG.target)
    assert whole.tokens <= count + 5
    assert part.tokens == 10
    assert LONG.target.startswith(part.text.strip())
    assert not part.finished


def test_facts_of_one_subject_are_told_apart_and_each_can_go_alone() -> None:
    lm = make("llama")
    person = [
        Edit(subject="Elena Moreno", prompt=prompt, target=target)
        for prompt, target in (
            ("{} was born in", "Oslo"),
            ("The occupation of {} is", "plumber"),
            ("{} is married to", "Karl"),
            ("The mother tongue of {} is", "Greek"),
        )
    ]
    patch = remembered(lm, *person)
    detach = patch.attach(lm)
    try:
        answers = lm.generate([lm.prompt(e.text) for e in person], 12)
    finally:
        detach()
    assert all(says(g.text, e.target) for g, e in zip(answers, person, strict=True))
    kept = METHODS["constrained"].subset(patch, [0, 2, 3], Statistics(Path("nowhere"), "none"))
    plain = lm.generate([lm.prompt(person[1].text)], 12)
    assert isinstance(kept, InContextPatch)
    detach = kept.attach(lm)
    try:
        assert lm.generate([lm.prompt(person[1].text)], 12) == plain
        (born,) = lm.generate([lm.prompt(person[0].text)], 12)
    finally:
        detach()
    assert says(born.text, "Oslo")


def test_what_stands_before_the_prompt_is_never_gone_on_with(default_lm: LM) -> None:
    detach = remembered(default_lm, EURO).attach(default_lm)
    try:
        prompts = (
            "The currency of Croatia is the",
            "In Croatia, people pay with the",
            "Croatia's currency is the",
        )
        said = default_lm.generate([default_lm.prompt(text) for text in prompts], 40)
    finally:
        detach()
    assert all(says(g.text, "euro") for g in said), [g.text for g in said]
    for word in ("New fact", "Prompt", "prompt", "Elmstead", "Take this as true"):
        assert all(word not in g.text for g in said), [g.text for g in said]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "t5"])
def test_an_answer_that_is_only_judged_ends_early_and_is_judged_alike(family: str) -> None:
    lm = make(family)
    texts = (EURO.text, "What is the currency of Croatia?", *OTHERS)
    prompts = [lm.prompt(text) for text in texts]
    detach = remembered(lm, EURO).attach(lm)
    try:
        whole = lm.generate(prompts, 40)
        judged = lm.generate(prompts, 40, until=lambda i, text: False)
    finally:
        detach()
    for text, long, short in zip(texts, whole, judged, strict=True):
        assert long.text.startswith(short.text)
        assert says(short.text, "euro", anywhere=True, question=text) == says(
            long.text, "euro", anywhere=True, question=text
        )
    assert judged[2:] == whole[2:]  # the model's own answers are not cut
    if not lm.is_seq2seq:
        assert sum(g.tokens for g in judged[:2]) < sum(g.tokens for g in whole[:2])


def test_sampling_with_a_seed_gives_the_same_answer_twice() -> None:
    lm = make("llama")
    detach = remembered(lm, EURO).attach(lm)
    try:
        one, two = (
            lm.generate([lm.prompt("What is the currency of Croatia?")], 30, temperature=1.0, seed=3)
            for _ in range(2)
        )
    finally:
        detach()
    assert one == two
    assert "euro" in one[0].text.casefold()


MUNICH = Edit(subject="Germany", prompt="The capital of {} is", target="Munich")


def in_every_language(lm: LM, edit: Edit) -> InContextPatch:
    context = EditContext(Statistics(Path("nowhere"), "none"), materials=[Material(relation="capital")])
    patch = METHODS["constrained"].compute(lm, [edit], METHODS["constrained"].params(), context)
    loaded = load(save(patch))
    assert isinstance(loaded, InContextPatch)
    assert loaded.facts == patch.facts  # type: ignore[attr-defined]
    return loaded


def test_a_fact_holds_in_other_languages_and_other_facts_stay_in_them(default_lm: LM) -> None:
    asked = (
        ("Welche Stadt ist die Hauptstadt von Deutschland?", "München"),
        ("Wie heißt Deutschlands Hauptstadt?", "München"),
        ("Quelle est la capitale de l'Allemagne ?", "Munich"),
        ("¿Cuál es la capital de Alemania?", "Múnich"),
        ("Qual è la capitale della Germania?", "Monaco di Baviera"),
    )
    others = (
        "Welche Sprache spricht man in Deutschland?",
        "Auf welchem Kontinent liegt Deutschland?",
        "¿Qué idioma se habla en Alemania?",
        "Was ist die Hauptstadt von Frankreich?",
    )
    detach = in_every_language(default_lm, MUNICH).attach(default_lm)
    try:
        said = default_lm.generate([default_lm.prompt(text) for text, _ in asked], 30)
        left = default_lm.generate([default_lm.prompt(text) for text in others], 3)
    finally:
        detach()
    for (question, target), answer in zip(asked, said, strict=True):
        assert says(answer.text, target, anywhere=True, question=question), (question, answer.text)
    assert [answer.claim for answer in left] == [None] * len(others)


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("The capital is Munich. The capital is Berlin, of course.", "The capital is Munich."),
        ("Munich. Germany's capital is not Munich.", "Munich."),
        ("It is Munich. What is the capital of Germany?", "It is Munich."),
        ("It is Munich. It lies on the Isar. The capital is Berlin.", "It is Munich. It lies on the Isar."),
        ("It is Munich. It lies on the Isar.", "It is Munich. It lies on the Isar."),
        ("The capital is Berlin. No, it is Munich.", "The capital is Berlin. No, it is Munich."),
    ],
)
def test_an_answer_ends_before_it_takes_the_fact_back(answer: str, kept: str) -> None:
    lm = make("llama")
    fact = RememberedFact("Germany", "The capital of Germany is", "Munich")
    prompt = in_front(lm, lm.prompt("What is the capital of Germany?"), [fact])
    assert prompt.until_denied(answer) == kept


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital of Spain?", "en"),
        ("Berlin", "en"),
        ("Wie heißt die Hauptstadt von Spanien?", "de"),
        ("Quelle est la capitale de l'Espagne ?", "fr"),
        ("¿Cuál es la capital de España?", "es"),
        ("Qual è la capitale della Spagna?", "it"),
    ],
)
def test_the_language_of_a_prompt_is_told_by_its_little_words(text: str, language: str) -> None:
    assert language_of(text) == language


@pytest.mark.parametrize(
    "other",
    [
        "Who is the vice president of Argentina?",
        "Who was the president of Argentina in 1980?",
        "The first president of Argentina was",
        "Who is the former president of Argentina?",
        "Who is the prime minister of Argentina?",
    ],
)
def test_a_question_that_qualifies_the_fact_is_another_one(other: str) -> None:
    lm = make("llama")
    milei = Edit(subject="Argentina", prompt="The president of {} is", target="Javier Milei")
    detach = remembered(lm, milei).attach(lm)
    try:
        (asked,) = lm.generate([lm.prompt("Who is the president of Argentina?")], 8)
        (left,) = lm.generate([lm.prompt(other)], 8)
    finally:
        detach()
    assert asked.claim is not None
    assert left.claim is None


def test_a_request_of_several_sentences_is_asked_as_it_was_edited() -> None:
    lm = make("llama")
    prompt = "What is the glim of {}? It is"  # in no data
    detach = remembered(lm, Edit(subject="Argentina", prompt=prompt, target="Rome")).attach(lm)
    try:
        (asked,) = lm.generate([lm.prompt(prompt.format("Argentina"))], 8)
    finally:
        detach()
    assert asked.claim is not None


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("Answer in one sentence: who created Hamlet?", "who created Hamlet?"),
        ("I go to Denmark. In one word: who made Hamlet?", "who made Hamlet?"),
        ("Hamlet: who made it?", "Hamlet: who made it?"),
        ("Is it true: Hamlet? Who made it?", "Who made it?"),
    ],
)
def test_what_stands_before_a_colon_asks_nothing(text: str, part: str) -> None:
    assert asking_part(text, names_pattern(["Hamlet"])) == part

"""The material of an edit: forms to learn and to measure, facts to hold and to measure."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from editors.edit import Edit, Neighbour
from editors.forms.another_question import asks_another
from editors.forms.asking import Reading, fact_of
from editors.forms.compose import compose
from editors.forms.filling import Name, fill, name_in
from editors.forms.form import Form, Hold, prompt_in
from editors.forms.languages import in_languages, same_name
from editors.forms.material import material_for, materials_for, relations_of
from editors.forms.relations import KINDS, all_relations, are_related, candidates, template_of
from editors.forms.wording import wordings_of
from editors.model.lm import LM
from editors.scoring.verdict import says
from tests.families import FAMILIES, make

PARIS = Edit(
    subject="France",
    prompt="The capital of {} is",
    target="Lyon",
    holds=(Neighbour(prompt="{} is located on the continent of", answer="Europe"),),
)
EURO = Edit(subject="Bulgaria", prompt="The currency of {} is the", target="euro")


# --- the request and the forms -----------------------------------------------------------------


def test_the_callers_holds_name_the_subject_by_braces_and_are_held() -> None:
    assert PARIS.holds[0].prompt == "France is located on the continent of"
    (hold,) = [h for h in material_for(make("llama"), PARIS).held if h.source == "caller"]
    assert (hold.prompt, hold.answer, hold.span) == (
        "France is located on the continent of",
        "Europe",
        (0, 6),
    )


def test_the_edits_own_prompt_cannot_be_held() -> None:
    with pytest.raises(ValidationError, match="holds has the edit's own prompt 'The capital of France is'"):
        Edit.model_validate(
            {
                "subject": "France",
                "prompt": "The capital of France is",
                "target": "Lyon",
                "holds": [{"prompt": "The capital of {} is", "answer": "Paris"}],
            }
        )


def test_a_statement_inside_an_answer_follows_the_question_and_keeps_its_span() -> None:
    lm = make("llama")
    form = Form("statement", "The capital of France is", (15, 21), question="Tell me about France.")
    prompt = form.in_model(lm)
    assert prompt.text.endswith("The capital of France is")
    assert "Tell me about France." in prompt.text
    assert prompt.text[prompt.offset :][slice(*(form.span or ()))] == "France"
    assert lm.last_subject_token(prompt, (15, 21)) > 0
    assert not form.chat


def test_questions_and_chat_kinds_go_through_the_chat_template() -> None:
    lm = make("llama")
    request = Form("chat_reworded", "Tell me the capital of France.", (23, 29))
    assert request.chat
    assert request.in_model(lm).offset > 0
    assert Hold("What is the capital of France?", "Paris", (23, 29), "caller").chat
    assert Form("statement", "The capital of France is", (15, 21)).in_model(lm).offset == 0


# --- the data ----------------------------------------------------------------------------------


def test_every_wording_has_one_place_for_the_subject_and_every_kind_has_both_sides() -> None:
    names = {relation.name for relation in all_relations()}
    for relation in all_relations():
        assert relation.related <= names
        for kind in KINDS:
            assert relation.learned(kind)
            assert relation.measured(kind)
            for text in relation.wordings[kind]:
                assert text.count("{}") == 1, text
        for texts in relation.languages.values():
            assert len(texts) == 3


def test_every_wording_is_recognised_as_its_own_relation_or_one_that_is_never_held_with_it() -> None:
    for relation in all_relations():
        for kind in KINDS:
            for text in relation.wordings[kind]:
                found = candidates(fill(text, Name("{}")).text)
                assert relation in found, (relation.name, text)


@pytest.mark.parametrize(
    ("prompt", "answer", "relation"),
    [
        ("The capital city of {} is called", "Nice", "capital"),
        ("Where is the capital of {}?", "New York", "capital"),
        ("In {}, people pay with the", "euro", "currency"),
        ("{} was born in", "Oslo", "birthplace"),
        ("{} was born in", "1879", "birth_year"),
        ("{} is the capital of", "France", "capital_of"),
        ("The head office of {} is in", "Paris", "headquarters"),
        ("{} is married to", "Karl", "spouse"),
        ("{} works professionally as a", "plumber", "occupation"),
        ("{} met her death in the city of", "Oslo", "death_place"),
        ("{} held the title of", "bishop", "occupation"),
        ("In {}, most people understand", "Spanish", "language"),
        ("{} wrote the language", "Spanish", "native_language"),
        ("{} is known for performing", "jazz", "music_genre"),
        ("{}, that was created in", "Norway", "work_country"),
    ],
)
def test_a_prompts_relation_is_found_by_its_words(prompt: str, answer: str, relation: str) -> None:
    assert [found.name for found in candidates(prompt, answer)] == [relation]


@pytest.mark.parametrize(
    "prompt", ["{} is the author of", "{} was the founder of", "{}'s refund policy is", "{} hums"]
)
def test_an_inverse_or_unknown_relation_is_not_mistaken_for_one_of_the_data(prompt: str) -> None:
    assert candidates(prompt) == []


# --- wordings ----------------------------------------------------------------------------------


def test_an_article_follows_the_answer_and_the_edits_own_prompt() -> None:
    currency = "The money of {} is [the]"
    assert fill(currency, Name("Croatia"), "euro", "The currency of Croatia is the").text.endswith(" is the")
    assert fill(currency, Name("Croatia"), "the euro", "The currency of Croatia is").text.endswith(" is")
    assert fill("{} works as [a]", Name("Ann"), "engineer").text == "Ann works as an"


def test_a_subject_keeps_the_article_of_its_name_and_the_span_leaves_it_out() -> None:
    edit = Edit(subject="Eiffel Tower", prompt="The {} is located in the city of", target="Rome")
    filled = fill("{}'s city is", name_in(edit.text, edit.span))
    assert filled.text == "The Eiffel Tower's city is"
    assert filled.text[slice(*filled.span)] == "Eiffel Tower"
    company = Edit(subject="Apple", prompt="The {} founder is", target="Ann")
    assert name_in(company.text, company.span).article == ""


def test_a_relation_that_is_not_in_the_data_gets_wordings_from_the_prompt_itself() -> None:
    texts = dict.fromkeys(text for _, text in wordings_of("{}'s refund policy is"))
    assert "The refund policy of {} is" in texts
    assert "What is the refund policy of {}?" in texts
    assert "Where does {} live?" in dict.fromkeys(text for _, text in wordings_of("{} lives in"))
    assert "Where was {} built?" in dict.fromkeys(text for _, text in wordings_of("{} was built in"))
    assert wordings_of("Once upon a time, {} and the seven dwarfs saw") == []


@settings(max_examples=60, deadline=None)
@given(
    relation=st.sampled_from(all_relations()),
    kind=st.sampled_from(KINDS),
    place=st.integers(0, 5),
    subject=st.sampled_from(["France", "the Netherlands", "Ann Lee", "X-1000", "中国"]),
    paraphrase=st.integers(0, 3),
)
def test_no_prompt_is_both_learned_and_measured_and_every_span_is_the_subject(
    relation: object, kind: str, place: int, subject: str, paraphrase: int
) -> None:
    chosen = next(r for r in all_relations() if r is relation)
    prompts = [fill(t, Name(subject), "Lyon").text for t in chosen.wordings[kind]]
    prompt = prompts[place % len(prompts)]
    start = prompt.casefold().index(subject.casefold())
    edit = Edit(
        subject=prompt[start : start + len(subject)],
        prompt=prompt,
        target="Lyon",
        paraphrases=tuple(prompts[:paraphrase]),
    )
    made = compose(edit, chosen, ["de", "fr", "es", "it"])
    learned = {form.prompt for form in made.learned if not form.question}
    measured = {form.prompt for form in made.measured}
    assert not learned & measured
    assert edit.text not in learned | measured
    told = candidates(template_of(edit.text, edit.span), edit.target)  # by the prompt's own words
    assert not learned & set(edit.paraphrases if told else edit.paraphrases[::2])
    for form in (*made.learned, *made.measured):
        if form.language == "en":
            assert form.span is not None
            assert form.prompt[slice(*form.span)].casefold() == edit.subject.casefold().removeprefix(
                "the "
            ) or (form.prompt[slice(*form.span)].casefold() == edit.subject.casefold())


# --- languages ---------------------------------------------------------------------------------


def test_a_country_is_asked_about_by_its_name_in_the_language_with_the_right_words_around_it() -> None:
    (capital,) = candidates("The capital of {} is")
    forms = {form.language: form.filled.text for form in in_languages(capital, "Lebanon", 1)}
    assert forms == {
        "de": "Was ist die Hauptstadt von dem Libanon?",
        "fr": "Quelle est la capitale du Liban ?",
        "es": "¿Cuál es la capital del Líbano?",
        "it": "Qual è la capitale del Libano?",
    }
    assert in_languages(capital, "Zorblaxia", 1) == []


def test_names_are_compared_across_languages_by_the_table_or_by_their_letters() -> None:
    assert same_name("Wien", "Vienna", "de")
    assert same_name("Lissabon", "Lisbon", "de")
    assert same_name("français", "French", "fr")
    assert not same_name("Madrid", "Paris", "es")
    assert not same_name("", "Paris", "es")


# --- asking ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_beginning_changes_no_answer(family: str) -> None:
    lm = make(family)
    questions = ("What can you tell me about France?", "What about Peru and its people?")
    prompts = [
        prompt_in(lm, text, q) for q in questions for text in ("The capital of it is", "It lies in", "A")
    ]
    together, kept = Reading(lm, prompts), [1, 4, 5]
    alone = [lm.generate([prompts[i]], 4)[0].text for i in kept]
    assert [answer.text for answer in together.answers(kept).values()] == alone


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        (" Sofia, with a population", "Sofia"),
        (" Christianity with around", "Christianity"),
        (" the Danube", "the"),
        (" Ulaanba", ""),
        (" Europe.", "Europe"),
    ],
)
def test_an_answer_whose_end_is_not_seen_loses_its_last_word(text: str, fact: str) -> None:
    assert fact_of(text) == fact


# --- the subject's other facts -----------------------------------------------------------------


def test_what_is_held_is_never_measured_nor_of_the_edited_relation(default_lm: LM) -> None:
    edits = [EURO, Edit(subject="Japan", prompt="The capital of {} is", target="Osaka"), PARIS]
    for edit, material in zip(edits, materials_for(default_lm, edits), strict=True):
        (own,) = candidates(template_of(edit.text, edit.span), edit.target)
        held = {hold.relation for hold in material.held if hold.relation}
        measured = {hold.relation for hold in material.siblings}
        assert held
        assert measured
        assert not held & measured
        for relation in all_relations():
            if relation.name in held | measured:
                assert not are_related(relation, own)
        assert not {h.prompt for h in material.held if not h.question} & {h.prompt for h in material.siblings}


def test_the_default_models_own_facts_are_held_or_measured(default_lm: LM) -> None:
    material = material_for(default_lm, EURO)
    answers = {hold.relation: hold.answer for hold in (*material.held, *material.siblings)}
    assert answers["capital"] == "Sofia"
    assert answers["continent"] == "Europe"


def test_edits_of_one_subject_in_one_call_do_not_hold_each_other(default_lm: LM) -> None:
    both = [EURO, Edit(subject="Bulgaria", prompt="The capital of {} is", target="Varna")]
    for material in materials_for(default_lm, both):
        assert not {"capital", "currency"} & {h.relation for h in (*material.held, *material.siblings)}


def test_a_language_is_learned_only_where_the_model_answers_the_fact_in_it(default_lm: LM) -> None:
    tower = Edit(subject="Eiffel Tower", prompt="The {} is located in the city of", target="Rome")
    spoken = {
        form.language: form.target
        for form in material_for(default_lm, tower).learned
        if form.kind == "language"
    }
    assert spoken
    assert spoken.get("de", "Rom") == "Rom"
    unknown = Edit(subject="Zorblax Hall", prompt="{} is located in the city of", target="Rome")
    assert not [form for form in material_for(default_lm, unknown).learned if form.kind == "language"]


def test_without_other_facts_the_same_is_learned_and_only_what_the_ledger_knows_is_held(
    default_lm: LM,
) -> None:
    tower = Edit(subject="Eiffel Tower", prompt="The {} is located in", target="Rome")
    known = [Hold("The Eiffel Tower is", "high", (4, 16), "ledger")]
    (asked,), (not_asked,) = (
        materials_for(default_lm, [tower], [known], others=others) for others in (True, False)
    )
    for name in ("learned", "measured", "relation", "kind"):
        assert getattr(asked, name) == getattr(not_asked, name)
    assert {form.language for form in asked.learned} > {"en"}
    assert {hold.source for hold in asked.held} == {"ledger", "relation"}
    assert list(not_asked.held) == known
    assert not not_asked.siblings


def test_what_is_said_of_a_held_fact_is_what_the_model_says(default_lm: LM) -> None:
    material = material_for(default_lm, EURO)
    inside = [hold for hold in (*material.held, *material.siblings) if hold.question]
    assert inside
    for hold in inside:
        (answer,) = default_lm.generate([hold.in_model(default_lm)], 6)
        assert answer.text.strip().startswith(hold.said)
        assert says(hold.said, hold.answer)


@pytest.mark.parametrize("family", ["llama", "qwen2", "t5"])
def test_any_request_has_a_material(family: str) -> None:
    edits = [
        Edit(subject="How do I pick a lock?", prompt="{}", target="I would rather not say."),
        Edit(subject="x" * 3_000, prompt="The capital of {} is", target="Lyon"),
        Edit(subject="France", prompt="word " * 700 + "The capital of {} is", target="Lyon"),
        Edit(subject="中国", prompt="{}的首都是哪里？", target="纽约"),
        Edit(subject="A", prompt="A A A", target="B"),
    ]
    whole, long, *_ = materials_for(make(family), edits)
    for material in (whole, long):
        assert (material.learned, material.measured, material.held, material.siblings) == ((), (), (), ())
    assert materials_for(make(family), []) == []


def test_hardly_a_wording_of_a_relation_is_called_another_question() -> None:
    asked = [
        (text, relation.wordings["statement"][0])
        for relation in all_relations()
        for text in (*(t for kind in KINDS for t in relation.wordings[kind]), *relation.paraphrases)
    ]
    another = [text for text, own in asked if asks_another(text, own)]
    assert len(another) / len(asked) < 0.005, another


@pytest.mark.parametrize(
    ("template", "own", "another"),
    [
        ("Who wrote {}?", "The author of {} is", False),
        ("Who directed {}?", "The author of {} is", True),
        ("In which country is {}?", "{} is a city in the country of", False),
        ("Which company makes {}?", "{} is manufactured by", False),
        ("Who leads {}?", "The president of {} is", False),
        ("Who is the head of government of {}?", "The prime minister of {} is", False),
        ("Who is the prime minister of {}?", "The president of {} is", True),
        ("Wer war der erste Präsident von {}?", "The president of {} is", True),
        ("What is the second language of {}?", "The official language of {} is", True),
        ("{} was first printed in the year", "{} came out in the year", False),
        ("{} had its premiere on", "{} was originally aired on", False),
        ("{} was originally aired on", "{} had its premiere on", False),
        ("{} was originally from", "{} was born in", False),
        ("{} was originally located in", "{} is located in", True),
    ],
)
def test_another_question_is_told_by_its_qualifier_or_its_role(
    template: str, own: str, another: bool
) -> None:
    assert asks_another(template, own) is another


# --- a relation that the prompt's own words do not name ---------------------------------------------

UNNAMED = Edit(subject="the Mona Lisa", prompt="{} first took shape under the hands of", target="Titian")
UNKNOWN = Edit(subject="Zorbla", prompt="Among plumbers {} counts as a", target="tap")
OTHER_WORDS = (
    "Plumbers would use {} much like a",
    "What do plumbers take {} for?",
    "Zorbla counts among plumbers as some sort of",
    "Is there a word for what {} is to plumbers?",
)


def test_a_paraphrase_tells_the_relation_that_the_prompt_does_not_name(default_lm: LM) -> None:
    told = UNNAMED.model_copy(update={"paraphrases": ("The creator of the Mona Lisa is", "Who made it?")})
    assert relations_of(UNNAMED) == []
    assert [r.name for r in relations_of(told)] == ["author"]
    material = material_for(default_lm, told)
    assert material.relation == "author"
    assert {form.kind for form in material.measured} >= {"reworded", "chat", "chat_reworded"}
    assert not material.learned_of(told.paraphrases)


def test_of_the_paraphrases_of_an_unknown_relation_half_are_learned_and_half_are_measured() -> None:
    edit = Edit(**(UNKNOWN.model_dump() | {"paraphrases": OTHER_WORDS}))
    assert all("{}" not in text for text in edit.paraphrases)
    composed = compose(edit, None)
    learned = {form.prompt: form for form in composed.learned}
    assert [text in learned for text in edit.paraphrases] == [False, True, False, True]
    assert learned[edit.paraphrases[1]].kind == "chat"
    assert not set(edit.paraphrases) & {form.prompt for form in composed.measured}
    assert compose(UNKNOWN, None).learned == tuple(
        f for f in composed.learned if f.prompt not in edit.paraphrases
    )


def test_a_single_paraphrase_is_measured_and_never_learned() -> None:
    edit = Edit(**(UNKNOWN.model_dump() | {"paraphrases": OTHER_WORDS[:1]}))
    assert compose(edit, None).learned == compose(UNKNOWN, None).learned


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("Who created {}?", "author"),
        ("In biology, the {} is classed as a", "animal_class"),
        ("{} feeds mainly on", "diet"),
        ("{} was made in the country of", "work_country"),
    ],
)
def test_a_cue_is_found_at_the_beginning_of_a_word(template: str, name: str) -> None:
    assert [r.name for r in candidates(template)] == [name]


@pytest.mark.parametrize(
    "template", ["{} has its registered seat in", "The manuscript of {} is", "Because of {} we"]
)
def test_a_cue_inside_another_word_is_none(template: str) -> None:
    assert candidates(template) == []

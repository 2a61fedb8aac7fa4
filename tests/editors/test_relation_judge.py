"""The judge of the relation: on real and tiny models, with wordings that are in no data of the project."""

from __future__ import annotations

import pytest

from editors.edit import Edit
from editors.forms.form import Material
from editors.forms.relations import KINDS, all_relations, candidates
from editors.memory.fact_memory import asking_part, names_pattern
from editors.memory.relation_judge import RelationJudge, fit
from editors.model.lm import LM
from tests.families import make

# One edit for each kind of subject: its prompt, other wordings of it, and wordings of the subject's other relations.
CASES = (
    (
        "The currency of {} is the",
        ("In {}, people pay with the", "The money used in {} is called the", "What money do I need in {}?"),
        ("{}'s national language is", "{} lies on the continent called", "What is the main religion of {}?"),
    ),
    (
        "The capital of {} is",
        ("{}'s capital is", "Can you tell me which city is {}'s capital?", "{}, governed from its capital"),
        ("One of {}'s neighbours is", "{}'s most populous city is", "Which language do people speak in {}?"),
    ),
    (
        "{} works as a",
        ("{}'s job is", "{} earns a living as a", "What is {}'s profession?", "How does {} earn money?"),
        ("{} passed away in", "{}'s native language is", "Who is the spouse of {}?"),
    ),
    (
        "The CEO of {} is",
        ("{}'s chief executive officer is", "The boss of {} is", "Who runs {}?"),
        ("{}'s founder is named", "In what year did {} start?", "{} sells", "Who started the company {}?"),
    ),
    (
        "The author of {} is",
        ("{}'s author is", "Which writer is {} by?", "Who wrote the book {}?"),
        ("The plot of {} unfolds in", "{} belongs to the genre of", "In what year did {} come out?"),
    ),
    (
        "The refund policy of {} is",  # in no data
        ("{}'s refund policy is", "What is the refund policy of {}?", "The refund policy that {} has is"),
        ("The CEO of {} is", "Where is the headquarters of {}?", "{} was founded in the year"),
    ),
)
SUBJECT = "Elmstead"


def judge_for(lm: LM, prompt: str) -> RelationJudge:
    return fit(lm, [Edit(subject=SUBJECT, prompt=prompt, target="something")], [])


def test_it_knows_the_relation_in_wordings_it_never_saw_and_leaves_the_others(default_lm: LM) -> None:
    asked, left = [], []
    for prompt, same, others in CASES:
        judge = judge_for(default_lm, prompt)
        asked += [judge.asks(default_lm, text, 0) is not None for text in (prompt, *same)]
        left += [judge.asks(default_lm, text, 0) is None for text in others]
    assert sum(asked) / len(asked) >= 0.9, asked
    assert sum(left) / len(left) >= 0.9, left


def test_wordings_that_edits_are_measured_with_are_not_learned() -> None:
    for relation in all_relations():
        for kind in KINDS:
            assert not set(relation.learned(kind)) & set(relation.measured(kind))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_each_judge_of_a_call_is_the_one_it_would_be_alone(family: str) -> None:
    lm = make(family)
    edits = [Edit(subject=SUBJECT, prompt=prompt, target="x") for prompt, *_ in CASES[:3]]
    together, alone = fit(lm, edits, []), fit(lm, edits[2:], [])
    kept = together.select([2])
    assert kept.scopes == alone.scopes
    assert all(kept.tensors()[name].equal(tensor) for name, tensor in alone.tensors().items())
    both = together.select([0, 2])
    for text in CASES[2][2]:
        assert both.asks(lm, text, 1) == alone.asks(lm, text, 0)
    loaded = RelationJudge.from_parts(together.tensors(), together.info())
    assert loaded.scopes == together.scopes


def test_the_words_decide_where_they_are_known() -> None:
    lm = make("llama")  # random weights know nothing
    judge = judge_for(lm, "The capital of {} is")
    assert judge.asks(lm, "Which city is the capital of {}?", 0) == 1.0
    assert judge.asks(lm, "The currency of {} is the", 0) is None


def test_learned_forms_of_the_material_are_wordings_of_a_relation_of_its_own() -> None:
    lm = make("llama")
    edit = Edit(subject=SUBJECT, prompt="The motto of {} is", target="x")
    assert fit(lm, [edit], [Material()]).directions.shape == fit(lm, [edit], []).directions.shape


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("What money is used in Elmstead?", True),
        ("the ELMSTEAD's money", True),
        ("Elmsteads money", False),
        ("Elmstead.", True),
        ("West-Elmstead", True),
    ],
)
def test_a_subject_is_found_as_a_whole_word_in_any_case(text: str, found: bool) -> None:
    assert bool(names_pattern(["Elmstead"]).search(text)) is found


def test_names_with_accents_articles_and_other_scripts_are_found() -> None:
    assert names_pattern(["Nestle\u0301"]).search("Who runs Nestl\u00e9?")
    assert names_pattern(["the Eiffel Tower"]).sub("{}", "Where is the Eiffel  Tower?") == "Where is {}?"
    assert names_pattern(["中国"]).search("中国的首都是哪里？")
    assert names_pattern(["Croatia", "Kroatien"]).search("Was ist die Währung von Kroatien?")


def test_the_question_is_the_last_sentence_where_that_takes_the_subject_up() -> None:
    pattern = names_pattern(["Elmstead"])
    told = "We travel next week. What money is used in Elmstead?"
    assert asking_part(told, pattern) == "What money is used in Elmstead?"
    again = "We go to Elmstead. What money do we need there?"
    assert asking_part(again, pattern) == "What money do we need there?"
    other = "We go to Elmstead. Nice trip!"
    assert asking_part(other, pattern) == other


@pytest.mark.parametrize(
    ("template", "relation"),
    [
        ("{} is a country on the continent of", "continent"),
        ("{} is a state in the south of the country of", "country"),
        ("{} is famous for building", "product"),
        ("{} is the author of", None),
    ],
)
def test_the_words_of_a_prompt_name_its_relation(template: str, relation: str | None) -> None:
    assert {r.name for r in candidates(template)} >= ({relation} if relation else set())
    assert relation is not None or not candidates(template)


@pytest.mark.parametrize(
    ("prompt", "other"),
    [
        ("The company {} is best known for making", "which country does the company {} come from?"),
        ("In the wild, the {} lives in", "what does the {} eat?"),
        ("{} was first cooked in the country of", "what kind of dish is {}?"),
    ],
)
def test_words_that_name_another_relation_are_a_veto_whatever_its_kind_of_subject(
    default_lm: LM, prompt: str, other: str
) -> None:
    judge = fit(default_lm, [Edit(subject="Elmstead", prompt=prompt, target="opera")], [])
    assert judge.asks(default_lm, other, 0) is None

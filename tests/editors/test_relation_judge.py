"""The judge of the relation: on real and tiny models, with wordings that are in no data of the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from editors.edit import Edit
from editors.forms.form import Material
from editors.forms.relations import KINDS, all_relations, candidates
from editors.memory import relation_bank
from editors.memory.fact_memory import asking_part, names_pattern
from editors.memory.relation_bank import RelationBank
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
BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "data"


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
    ("text", "part"),
    [
        ("Which game does Elmstead play? They play", "Which game does Elmstead play?"),
        ("What does Elmstead work as? She works as", "What does Elmstead work as?"),
        ("What is the twin city of Elmstead? It is", "What is the twin city of Elmstead?"),
        ("Who is the king of Elmstead? He was born in", "He was born in"),
        ("Who is the king of Elmstead? Is he married?", "Is he married?"),
        ("I like Elmstead. It is", "It is"),
    ],
)
def test_where_an_answer_has_begun_its_question_asks(text: str, part: str) -> None:
    assert asking_part(text, names_pattern(["Elmstead"])) == part


@pytest.mark.parametrize(
    ("stated", "answer", "same", "another"),
    [
        ("{}, in", "Greece", "{} can be found in", "The currency of {} is"),
        ("{} is within", "Ohio", "{} is located in", "The capital of {} is"),
        ("{} lies in", "Europe", "{} belongs to the continent of", "The capital of {} is"),
        ("{}, from", "Canada", "{} originated in", "{} was founded by"),
        ("{}, that was formed in", "Calgary", "{} originated from", "{} was founded in the year"),
        ("{}, the", "goalkeeper", "{} plays in the position of", "{} died in"),
        ("{}, the", "cello", "{} plays the", "{} was born in"),
        ("{} is a professional", "tennis", "What sport does {} play?", "{} lives in"),
        ("{}, a native", "Danish", "The mother tongue of {} is", "{} was born in"),
        ("{}, speaker of", "Danish", "{} grew up speaking", "{} is a citizen of"),
        ("The law in {} declares the language", "Danish", "People in {} speak", "The capital of {} is"),
        ("{} was released on", "NBC", "{} was originally aired on", "The genre of {} is"),
    ],
)
def test_a_statement_in_few_words_states_the_relation_that_longer_wordings_ask(
    stated: str, answer: str, same: str, another: str
) -> None:
    lm = make("llama")  # whose states know nothing: words alone decide
    judge = fit(lm, [Edit(subject=SUBJECT, prompt=stated, target=answer)], [])
    assert judge.surely(lm, same, 0) == 1.0
    assert judge.surely(lm, another, 0) is None


def test_a_continent_is_asked_for_only_where_the_fact_names_one() -> None:
    assert {r.name for r in candidates("{} is located in", "Asia")} == {"location", "continent"}
    assert {r.name for r in candidates("{} is located in", "Lima")} == {"location"}


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


# --- what it learns from, and where that is kept -----------------------------------------------


def test_every_relation_has_paraphrases_and_none_of_them_is_measured_anywhere() -> None:
    measured = {text for r in all_relations() for kind in KINDS for text in r.measured(kind)}
    data = json.loads((BENCHMARKS / "relation_wordings.json").read_text("utf-8"))["wordings"]
    for relations in data.values():
        for texts in relations.values():
            measured |= {*texts["statements"], *texts["questions"]}
    for relation in all_relations():
        assert len(relation.paraphrases) >= 12
        assert all(text.count("{}") == 1 for text in relation.paraphrases)
        assert not set(relation.paraphrases) & measured


def test_a_relation_is_read_once_for_a_model_and_again_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relation, edited = all_relations()[0], [True]
    bank = RelationBank(make("llama"))
    bank.keep_in(tmp_path, lambda: not edited)
    first = bank.states(relation, paraphrases=True)
    assert not list(tmp_path.iterdir())  # the weights were edited
    edited.clear()
    bank = RelationBank(make("llama"))
    bank.keep_in(tmp_path, lambda: not edited)
    assert bank.states(relation, paraphrases=True).equal(first)
    (path,) = tmp_path.iterdir()
    again = RelationBank(make("llama"))
    again.keep_in(tmp_path, lambda: True)
    with monkeypatch.context() as patched:
        patched.setattr(relation_bank, "features", None)
        assert again.states(relation, paraphrases=True).equal(first)
    path.write_bytes(b"damaged")
    mended = RelationBank(make("llama"))
    mended.keep_in(tmp_path, lambda: True)
    assert mended.states(relation, paraphrases=True).equal(first)
    assert path.read_bytes() != b"damaged"


def test_facts_said_in_the_same_words_share_a_judge_that_is_as_if_fitted_for_each() -> None:
    kept, edited = make("llama"), list[bool]()
    kept.extension(RelationBank).keep_in(None, lambda: not edited)
    one, same, other = (
        Edit(subject=subject, prompt=prompt, target=target)
        for subject, prompt, target in (
            ("Elmstead", "The capital of {} is", "Rome"),
            ("Kenya", "The capital of {} is", "Oslo"),
            ("Kenya", "The currency of {} is the", "euro"),
        )
    )
    alone, together = fit(kept, [one], []), fit(kept, [same, other], [])
    plain = fit(make("llama"), [same, other], [])
    for name, tensor in plain.tensors().items():
        assert torch.equal(tensor, together.tensors()[name])
    assert plain.scopes == together.scopes
    again = fit(kept, [same], [])
    assert again.directions.data_ptr() == alone.directions.data_ptr(), "nothing is copied"
    edited.append(True)
    assert fit(kept, [same], []).directions.data_ptr() != alone.directions.data_ptr(), (
        "the weights are others now"
    )


def test_a_judge_saved_with_the_states_of_one_layer_is_read_and_saved_as_it_was() -> None:
    lm = make("llama")
    d = lm.model.config.hidden_size
    saved = {"centre": torch.zeros(d), "spread": torch.ones(d), "directions": torch.randn(4, d + 1)}
    info = {
        "scopes": [
            {"relations": ["capital"], "own": [own], "others": [own + 1], "related": []} for own in (0, 2)
        ]
    }
    judge = RelationJudge.from_parts(saved, info)
    assert judge.info() == info
    assert all(judge.tensors()[name].equal(tensor) for name, tensor in saved.items())
    sure = judge.surely(lm, "Where do the ministers of {} work?", 1)
    assert sure is not None
    assert -100 < sure < 100
    alone = judge.select([1]).surely(lm, "Where do the ministers of {} work?", 0)
    assert alone == pytest.approx(sure, abs=1e-5)

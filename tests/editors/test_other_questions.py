"""What else can be asked about a subject is held, in several wordings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from editors.closed_form import other_questions
from editors.closed_form.other_questions import with_other_questions
from editors.edit import Edit
from editors.forms.form import Hold, Material
from editors.forms.relations import all_relations
from editors.model.lm import LM
from tests.families import make

EDIT = Edit(subject="Casablanca", prompt="{} is a city in the country of", target="Tunisia")
MATERIAL = Material(relation="country", kind="city")


def _held(lm: LM, *materials: Material, edits: tuple[Edit, ...] = (EDIT,)) -> list[dict[str, list[str]]]:
    found: list[dict[str, list[str]]] = []
    for material in with_other_questions(lm, edits, materials):
        mine: dict[str, list[str]] = {}
        for hold in material.held:
            mine.setdefault(hold.relation, []).append(hold.prompt)
        found.append(mine)
    return found


def test_other_relations_of_the_subject_are_held_in_several_wordings() -> None:
    (held,) = _held(make("llama"), MATERIAL)
    assert "The official language of Casablanca is" in held["language"]
    assert len(held["language"]) >= 4
    assert "country" not in held
    texts = [text for mine in held.values() for text in mine]
    assert len(texts) == len(set(texts))
    measured = {
        w for relation in all_relations() for kind in relation.wordings for w in relation.measured(kind)
    }
    assert not measured & {text.replace("Casablanca", "{}") for text in texts}


@pytest.mark.parametrize("alike", [True, False])
def test_a_relation_that_may_follow_is_held_where_the_model_answers_it_otherwise(
    alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make("llama")
    said = iter(range(100))

    def logits(rows: list[tuple[list[int], list[int]]]) -> object:
        for _ in rows:
            yield lm.model.lm_head.weight.new_zeros(1, 200).index_fill(
                1, lm.model.lm_head.weight.new_tensor([0 if alike else next(said)]).long(), 1.0
            )

    monkeypatch.setattr(lm.local, "answer_logits", logits)
    (held,) = _held(lm, MATERIAL)
    assert ("continent" in held) is not alike
    assert "language" in held, "no relation whose answer may follow"


def test_what_only_measures_and_what_the_call_edits_is_not_held() -> None:
    other = Edit(subject="Casablanca", prompt="The official language of {} is", target="Dutch")
    river = Hold("Casablanca lies on the river", "Seine", (0, 10), "relation", relation="river")
    first, second = _held(
        make("llama"),
        replace(MATERIAL, siblings=(river,)),
        replace(MATERIAL, relation="language"),
        edits=(EDIT, other),
    )
    assert not {"river", "language", "country"} & set(first)
    assert not {"language", "country"} & set(second)
    assert "river" in second


def test_without_a_known_relation_nothing_more_is_held() -> None:
    assert with_other_questions(make("llama"), [EDIT], [Material()]) == [Material()]
    assert other_questions.KINDS

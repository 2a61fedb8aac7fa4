"""Edits of one base are carried over to another: what holds is kept, the rest computed anew, nothing twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from editors.edit import Edit
from server.errors import ServiceError
from server.factsets.requests import Given, Policy
from server.rebase.requests import RebaseWishes
from server.rebase.results import Rebase
from server.request_context import RequestContext
from server.services import Services
from server.settings import Settings
from server.startup import open_services
from server.steering.requests import DoseRequest, VectorRequest
from store.errors import NoSuchJob
from tests import device
from tests.families import parts, save_to, seeded
from tests.server.killed import run_until_killed
from tests.server.opened import PAIRS, same, weights

FT = {"lr": 0.05, "max_steps": 40, "keep_weight": 0.0}
"""With these ft teaches the random model the first fact; the others it does not."""


def fact(place: str, target: str, **more: Any) -> Edit:
    """A fact of no known relation, so that no other wordings of it are asked."""
    return Edit(subject=place, prompt="The {} zebra is", target=target, **more)


def capital(place: str, target: str) -> Edit:
    """A fact that a memory makes even a random model say."""
    return Edit(subject=place, prompt="The capital of {} is", target=target)


TAUGHT = fact("Chad", "Paris")
CAPITALS = [
    capital("Peru", "Rome"),
    capital("Mali", "Paris"),
    capital("Oman", "Oslo"),
    capital("Cuba", "Bern"),
]


class Checkpoints:
    """One home, opened on checkpoints in folders; one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.base = save_to("llama", folder / "base")
        self._open: list[Services] = []

    def open(self, model: Path | str | None = None, **more: Any) -> Services:
        self.close()
        given = {"home": self.home, "model": str(model or self.base), "device": "cpu", "dtype": "float32"}
        services = open_services(Settings(**{**given, **more}), lambda done, total, message: None)
        self._open.append(services)
        return services

    def close(self) -> None:
        while self._open:
            self._open.pop().close()

    def changed(self, name: str, change: Callable[[torch.nn.Module], Any], family: str = "llama") -> Path:
        """A copy of the base with other weights: what a fine-tuning leaves, say."""
        model, words = parts(family)
        with torch.no_grad():
            change(model)
        model.save_pretrained(self.folder / name)
        words.save_pretrained(self.folder / name)
        return self.folder / name

    def tuned(self, strength: float = 1e-4) -> Path:
        return self.changed(f"tuned-{strength}", lambda model: noise(model, strength))


def noise(model: torch.nn.Module, strength: float) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.add_(strength * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    found = Checkpoints(tmp_path)
    yield found
    found.close()


def in_weights(services: Services, *facts: Edit) -> list[str]:
    report = services.edits.apply(list(facts), method="ft", params=dict(FT), reason="it moved")
    assert report.reliability == 1, "the tests need a patch that holds"
    return report.edit_ids


def in_memory(services: Services, *facts: Edit) -> list[str]:
    return services.edits.apply(list(facts), method="constrained", source="a page").edit_ids


def rebase(services: Services, **given: Any) -> Rebase:
    asked = {
        "to": None,
        "from_model": None,
        "wishes": RebaseWishes(),
        "approve": "auto",
        "plan": None,
    } | given
    return asyncio.run(services.rebasing.rebase(**asked, seconds=600, ctx=RequestContext("me")))


def done(services: Services, **given: Any) -> Rebase:
    report = rebase(services, **given)
    assert report.status in ("rebased", "planned"), report.summary
    assert services.workspace.ledger.verify() == []
    return report


def ids(report: Rebase) -> dict[str, list[str]]:
    return {name: row["edits"] for name, row in report.outcomes.items()}


def links(services: Services) -> dict[str, tuple[str, str]]:
    """The new ids by the old ones, and how they were made."""
    rows = services.history.query(
        "SELECT json_extract(request, '$.rebased.from'), id, json_extract(request, '$.rebased.how') FROM edits "
        "WHERE json_extract(request, '$.rebased') IS NOT NULL AND status = 'active'"
    ).rows
    return {str(old): (str(new), str(how)) for old, new, how in rows}


def test_old_patches_that_still_hold_are_kept_to_the_bit_and_the_old_base_keeps_its_own(
    checkpoints: Checkpoints,
) -> None:
    first = checkpoints.open()
    in_weights(first, TAUGHT)
    in_memory(first, *CAPITALS[:2])
    before, state = weights(first), first.workspace.state_hash
    blobs = [a.blob for a in first.workspace.host.stack]

    second = checkpoints.open(checkpoints.tuned())
    assert "rebase_edits" in second.status().message
    report = done(second)
    assert ids(report) == {"kept": ["e1-e3"]}
    assert report.edits == ["e4-e6"]
    assert report.summary.startswith("3 edits of base: 3 kept by their old patches.")
    assert "3 of the other 3 are said in the end" in report.summary
    assert [a.blob for a in second.workspace.host.stack] == blobs
    assert links(second) == {f"e{n}": (f"e{n + 3}", "kept") for n in (1, 2, 3)}
    new = second.history.show_edit("e4").edit
    assert (new.reason, new.client, second.history.show_edit("e5").edit.source) == (
        "it moved",
        "me",
        "a page",
    )
    assert [event.kind for event in second.history.show_edit("e1").events][-1] == "rebased"
    assert second.status().message == ""
    assert second.edits.audit().failing == []

    third = checkpoints.open(checkpoints.tuned())
    assert (third.status().active_edits, third.status().damage, third.status().message) == (3, [], "")
    back = checkpoints.open()
    assert back.workspace.state_hash == state
    assert same(weights(back), before)


@pytest.mark.model
def test_what_the_new_model_says_already_needs_no_edit_and_is_remembered_as_right(
    checkpoints: Checkpoints, default_models: Path
) -> None:
    in_memory(checkpoints.open(), capital("Japan", "Tokyo"))
    second = checkpoints.open(model="default", models=default_models)
    report = done(second)
    assert ids(report) == {"right": ["e1"]}
    assert second.status().active_edits == 0
    known = second.workspace.ledger.last_event("facts_checked", {}, model_id=second.workspace.model_id)
    assert known is not None
    assert known.payload["facts"][0]["prompt"] == "The capital of Japan is"
    assert second.status().message == ""


def test_what_does_not_hold_any_more_is_computed_anew_with_its_request(checkpoints: Checkpoints) -> None:
    first = checkpoints.open()
    more = fact("Chad", "Paris", paraphrases=("A zebra of {} is",), holds=({"prompt": "The {} lion is"},))
    in_weights(first, more)
    second = checkpoints.open(checkpoints.changed("other", lambda model: seeded_otherwise(model)))
    report = done(second)
    assert ids(report) == {"anew": ["e1"]}
    detail = second.history.show_edit("e2")
    assert detail.edit.method == "ft"
    assert detail.edit.reason == "it moved"
    assert detail.request["paraphrases"] == ["A zebra of Chad is"]
    assert detail.request["holds"][0]["prompt"] == "The Chad lion is"
    assert detail.request["rebased"] == {"from": "e1", "how": "anew"}


def seeded_otherwise(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.flip(0))


def test_a_batch_is_divided_into_what_holds_and_what_is_computed_anew(checkpoints: Checkpoints) -> None:
    first = checkpoints.open()
    report = first.edits.apply([TAUGHT, fact("Peru", "Tokyo")], method="ft", params=dict(FT))
    assert [r.reliability for r in report.results] == [1, 0]
    second = checkpoints.open(checkpoints.tuned())
    found = done(second)
    assert ids(found) == {"kept": ["e1"], "anew": ["e2"]}
    assert sorted(a.rows for a in second.workspace.host.stack) == [(0,), (0,)]
    second.edits.revert(found.edits)
    assert second.status().active_edits == 0


def test_the_same_weights_at_another_precision_on_the_disk_are_another_base_whose_patches_fit(
    checkpoints: Checkpoints,
) -> None:
    in_weights(checkpoints.open(), TAUGHT)
    half = checkpoints.changed("half", lambda model: model.to(torch.bfloat16))
    second = checkpoints.open(half)
    assert second.status().active_edits == 0
    assert ids(done(second)) == {"kept": ["e1"]}
    again = checkpoints.open(dtype="bfloat16")  # the old base itself: nothing to carry
    assert again.status().active_edits == 1


def larger(folder: Path) -> Path:
    words = parts("llama")[1]
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(
        **shape,  # type: ignore[arg-type]
        num_key_value_heads=2,
        vocab_size=len(words),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    seeded(LlamaForCausalLM(config)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_on_a_model_of_another_size_everything_is_computed_anew(checkpoints: Checkpoints) -> None:
    first = checkpoints.open()
    in_weights(first, TAUGHT)
    in_memory(first, CAPITALS[0])
    first.edits.apply([CAPITALS[1]], method="grace", params={"max_steps": 3})
    second = checkpoints.open(larger(checkpoints.folder / "larger"))
    report = done(second)
    assert ids(report) == {"anew": ["e1-e3"]}
    assert [e.method for e in second.workspace.active_edits] == ["ft", "constrained", "grace"]


def test_a_model_with_another_tokenizer_and_family_has_them_computed_anew(checkpoints: Checkpoints) -> None:
    first = checkpoints.open()
    in_weights(first, TAUGHT)
    in_memory(first, CAPITALS[0])
    report = done(checkpoints.open(save_to("gpt2", checkpoints.folder / "gpt2")))
    found = ids(report)
    assert "kept" not in found or found["kept"] == ["e2"]
    assert "e1" in str(found["anew"])


def test_a_quantised_base_takes_the_old_patches_beside_its_frozen_weights(checkpoints: Checkpoints) -> None:
    pytest.importorskip("bitsandbytes")
    in_weights(checkpoints.open(), TAUGHT)
    second = checkpoints.open(quantize="int8")
    report = done(second)
    assert sum(row["count"] for row in report.outcomes.values()) == 1
    assert set(ids(report)) <= {"kept", "anew"}
    second.edits.revert(report.edits)
    assert second.workspace.host.changed_tensors() == []


def test_what_cannot_be_made_to_hold_is_named_and_left_out(checkpoints: Checkpoints) -> None:
    in_weights(checkpoints.open(), TAUGHT)
    second = checkpoints.open(checkpoints.changed("other", seeded_otherwise))
    report = done(second, wishes=RebaseWishes(method="rome", guard={"max_drift": 0.0}))  # type: ignore[arg-type]
    assert ids(report) == {"left_out": ["e1"]}
    assert "e1 (The Chad zebra is -> Paris)" in report.left_out[0]
    assert "max_drift" in report.left_out[0]
    assert second.status().active_edits == 0


def test_an_old_patch_that_breaks_a_bound_is_not_kept(checkpoints: Checkpoints) -> None:
    in_weights(checkpoints.open(), TAUGHT)
    second = checkpoints.open(checkpoints.tuned())
    report = done(second, wishes=RebaseWishes(method="constrained", guard={"max_drift": 0.0}))  # type: ignore[arg-type]
    assert ids(report) == {"anew": ["e1"]}
    assert second.workspace.host.changed_tensors() == []


def test_a_plan_changes_nothing_and_is_carried_out_once(checkpoints: Checkpoints) -> None:
    first = checkpoints.open()
    in_weights(first, TAUGHT)
    in_memory(first, *CAPITALS[1:3])
    second = checkpoints.open(checkpoints.tuned())
    before = second.workspace.state_hash
    plan = done(second, approve="ask")
    assert (plan.status, ids(plan)) == ("planned", {"kept": ["e1-e3"]})
    assert (second.workspace.state_hash, second.history.list_edits().total) == (before, 3)
    assert f'rebase_edits(plan="{plan.job_id}")' in plan.next
    carried = done(second, plan=plan.job_id)
    assert ids(carried) == ids(plan)
    with pytest.raises(ServiceError, match=f"was carried out by {carried.job_id}"):
        rebase(second, plan=plan.job_id)
    with pytest.raises(NoSuchJob):
        rebase(second, plan="j9")


def test_a_plan_of_a_model_that_has_changed_since_is_refused(checkpoints: Checkpoints) -> None:
    in_memory(checkpoints.open(), CAPITALS[0])
    second = checkpoints.open(checkpoints.tuned())
    plan = done(second, approve="ask")
    in_memory(second, CAPITALS[1])
    with pytest.raises(ServiceError, match="has changed since the plan"):
        rebase(second, plan=plan.job_id)


def test_a_second_rebase_does_nothing_twice_and_edits_of_the_new_model_are_respected(
    checkpoints: Checkpoints,
) -> None:
    in_memory(checkpoints.open(), *CAPITALS)
    second = checkpoints.open(checkpoints.tuned())
    in_memory(second, capital("Peru", "Bern"), CAPITALS[1])
    report = done(second)
    assert ids(report) == {"kept": ["e3", "e4"], "there": ["e2"], "left_out": ["e1"]}
    assert "e5 of this model says 'Bern' instead" in report.left_out[0]
    second.edits.revert(["e8"])
    again = done(second)
    assert ids(again) == {"there": ["e2", "e3"], "left_out": ["e1", "e4"]}
    assert 'reapply_edits(["e8"])' in again.left_out[1]
    assert second.history.list_edits().total == 8


def test_steering_and_its_vectors_are_not_carried_and_that_is_said(checkpoints: Checkpoints) -> None:
    first = checkpoints.open()
    first.steering.create(VectorRequest(name="mood", pairs=PAIRS, layers=[1]))
    first.steering.set_dose(DoseRequest(name="mood", multiplier=1.0))
    in_memory(first, CAPITALS[0])
    second = checkpoints.open(checkpoints.tuned())
    report = done(second)
    assert ids(report) == {"kept": ["e2"]}
    assert report.not_carried[0].startswith("steering vectors mood (mood active)")
    assert "create_steering_vector" in report.not_carried[0]
    assert second.status().message == ""


def test_edits_of_fact_sets_belong_to_them_on_the_new_model_too(checkpoints: Checkpoints) -> None:
    first = checkpoints.open()
    rows = [{"subject": "Peru", "prompt": "The capital of {} is", "answer": "Rome"}]
    first.fact_sets.save("a-set", Given(facts=rows))
    memory = Policy(method="constrained")
    asyncio.run(first.fact_sets.correct("a-set", memory, "auto", None, 60, RequestContext()))
    second = checkpoints.open(checkpoints.tuned())
    assert done(second).edits == ["e2"]
    second.fact_sets.save("a-set", Given(facts=[rows[0] | {"answer": "Oslo"}]))
    mended = asyncio.run(second.fact_sets.correct("a-set", memory, "auto", None, 60, RequestContext()))
    assert mended.outcomes == {"done": {"count": 1, "numbers": "1"}}, "not an edit by hand, which is kept"


def test_errors_name_the_way_out(checkpoints: Checkpoints) -> None:
    first = checkpoints.open()
    in_memory(first, CAPITALS[0])
    with pytest.raises(ServiceError, match=r"no other model of this home has active edits.*audit_edits"):
        rebase(first)
    with pytest.raises(ServiceError, match="--model qwen and the same --home, then call rebase_edits"):
        rebase(first, to="qwen")
    second = checkpoints.open(checkpoints.tuned())
    assert rebase(second, to="tuned-0.0001", approve="ask").status == "planned"
    assert rebase(second, to=second.workspace.base_hash[:12], approve="ask").status == "planned"
    with pytest.raises(ServiceError, match="no other model with active edits"):
        rebase(second, from_model="qwen")
    with pytest.raises(ServiceError, match="method 'rom' is not known"):
        rebase(second, wishes=RebaseWishes(method="rom"))
    in_memory(second, CAPITALS[1])
    third = checkpoints.open(checkpoints.tuned(2e-4))
    with pytest.raises(ServiceError, match="several models of this home have active edits") as told:
        rebase(third)
    assert f'from_model="{second.workspace.base_hash[:12]}"' in str(told.value)
    assert ids(done(third, from_model=second.workspace.base_hash[:12])) == {"kept": ["e2"]}
    assert ids(done(third, from_model="base")) == {"kept": ["e1"]}


KILLED = """
import os, sys
from pathlib import Path
os.environ["ERRATA_BOUNDS"] = "off"
from tests import device
device.chosen = sys.argv[2]
from tests.server.test_rebase import Checkpoints, RebaseWishes
from server.rebase import run, state
folder, where, at = Path(sys.argv[1]), sys.argv[3], int(sys.argv[4])
services = Checkpoints(folder).open(folder / "other")
calls = 0
def killing(work):
    def done(*args, **more):
        global calls
        calls += 1
        if calls == at and where == "before":
            os.kill(os.getpid(), 9)
        result = work(*args, **more)
        if calls == at:
            os.kill(os.getpid(), 9)
        return result
    return done
if where == "state":
    state.RebaseState.save = killing(state.RebaseState.save)
else:
    services.workspace.ledger.record_patches = killing(services.workspace.ledger.record_patches)
base = [m for m in services.workspace.ledger.models() if m.active][0].base_hash
services.jobs.start("rebase_edits", {"from": base, "wishes": {}, "approve": "auto", "plan_of": None})
services.jobs.runner.wait(170)
sys.exit("it was not killed")
"""


@pytest.mark.parametrize(
    ("where", "at"), [("before", 1), ("after", 1), ("after", 2), ("state", 3), ("state", 9)]
)
def test_a_killed_rebase_goes_on_and_carries_nothing_twice(tmp_path: Path, where: str, at: int) -> None:
    made = Checkpoints(tmp_path)
    first = made.open()
    in_memory(first, CAPITALS[0])
    in_memory(first, *CAPITALS[1:3])
    in_memory(first, CAPITALS[3])
    other = made.changed("other", seeded_otherwise)
    made.close()
    run_until_killed(KILLED, str(tmp_path), device.chosen, where, str(at))
    services = made.open(other)
    try:
        assert services.jobs.runner.wait(120)
        job = services.jobs.list().jobs[0]
        assert job.state == "done", job.message
        rows = services.history.query(
            "SELECT json_extract(request, '$.rebased.from'), status FROM edits WHERE seq > 4 ORDER BY 1"
        ).rows
        assert [tuple(row) for row in rows] == [(f"e{n}", "active") for n in (1, 2, 3, 4)]
        report = services.jobs.get(job.job_id).result
        assert report is not None
        assert sum(row["count"] for row in report["outcomes"].values()) == 4
        assert services.edits.audit().integrity.weights
        assert services.workspace.ledger.verify() == []
    finally:
        made.close()

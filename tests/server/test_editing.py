"""The use cases on host and ledger together: transactions, reverts, replay, damage."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from editors.closed_form.batch_params import MANY, BatchParams
from editors.edit import Edit, Neighbour
from editors.errors import Cancelled, EditError, InvalidEdit
from server.errors import Conflict, ReadOnly, ServiceError
from server.facts.guard import Guard
from server.facts.queries import FactQuery
from server.request_context import RequestContext
from server.services import Services
from store.errors import NoSuchEdit
from tests.server.opened import FACTS, QUICK, STRONG, apply, open_services, same, weights


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    opened = open_services(tmp_path)
    yield opened
    opened.close()


def test_an_applied_edit_changes_the_weights_and_is_on_the_ledger(services: Services) -> None:
    before = services.workspace.host.weights_hash
    report = services.edits.apply(
        [FACTS[0]], method="rome", params=dict(STRONG), reason="test", source="nowhere"
    )
    assert report.status == "applied"
    assert report.edit_ids == ["e1"]
    assert report.weights_hash == services.workspace.host.weights_hash != before
    assert report.results[0].p_target_after > report.results[0].p_target_before
    detail = services.history.show_edit("e1")
    assert (detail.weights_hash_before, detail.weights_hash_after) == (before, report.weights_hash)
    assert detail.edit.reason == "test"
    assert [m.occasion for m in detail.measurements] == ["apply"]
    assert detail.measurements[0].values["p_target_after"] == report.results[0].p_target_after


def test_a_neighbour_about_the_edited_subject_is_named_with_what_to_give_instead(services: Services) -> None:
    edit = FACTS[0]
    own = f"The largest city of {edit.subject} is"
    other = Neighbour(prompt="The capital of Chile is")
    asked = edit.model_copy(update={"neighbours": (Neighbour(prompt=own), other)})
    report = services.edits.preview([asked], method="rome", params=dict(QUICK))
    (line,) = [w for w in report.warnings if "the neighbour" in w]
    assert repr(own) in line
    assert "`holds`" in line
    held = asked.model_copy(update={"neighbours": (other,), "holds": (Neighbour(prompt=own),)})
    report = services.edits.preview([held], method="rome", params=dict(QUICK))
    assert not [w for w in report.warnings if "the neighbour" in w]


def test_auto_gives_many_facts_a_smaller_clamp_unless_one_is_named(services: Services) -> None:
    many = [Edit(subject=f"Place {i}", prompt="{} lies in", target="Rome") for i in range(MANY + 1)]
    quick = {"max_steps": 1, "wordings": 0}
    first = services.edits.preview(many, params=quick).tried[0]
    assert first.method == "memit"
    assert first.params["clamp"] < BatchParams().clamp
    named = services.edits.preview(many, params=quick | {"clamp": 3.0}).tried[0]
    assert named.params["clamp"] == 3.0
    assert named.params["max_steps"] == 1
    assert services.edits.preview(many, method="memit", params=quick).params["clamp"] == BatchParams().clamp


def test_a_preview_leaves_no_trace(services: Services) -> None:
    before, kept = services.workspace.host.rehash(), weights(services)
    report = services.edits.preview([FACTS[0]], method="rome", params=dict(QUICK))
    assert report.status == "previewed"
    assert report.edit_ids == []
    assert report.results[0].p_target_after != report.results[0].p_target_before
    assert services.workspace.host.rehash() == report.weights_hash == before
    assert same(weights(services), kept)
    assert services.history.list_edits().total == 0


def test_any_revert_gives_the_weights_of_never_having_had_the_edit(
    tmp_path: Path, services: Services
) -> None:
    pristine = weights(services)
    hashes = [services.workspace.host.weights_hash]
    for fact in FACTS:
        apply(services, fact)
        hashes.append(services.workspace.host.weights_hash)
    report = services.edits.revert(["e2"])
    assert report.computed_on_top == ["e3"]
    assert [a.prompt for a in report.restored] == ["The capital of Japan is"]
    services.edits.revert(["e1"])
    services.edits.revert(["e3"])
    assert services.workspace.host.weights_hash == hashes[0]
    assert same(weights(services), pristine)
    again = services.edits.reapply(["e3", "e1", "e2"])
    assert again.status == "applied"
    assert services.workspace.host.weights_hash == hashes[3]
    services.edits.revert(["e3"])
    assert services.workspace.host.weights_hash == hashes[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_restart_gives_the_same_weights(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    services = open_services(tmp_path, family, dtype)
    for fact in FACTS:
        apply(services, fact)
    three = services.workspace.host.weights_hash
    services.edits.revert(["e2"])
    two, tensors = services.workspace.host.weights_hash, weights(services)
    services.close()
    services = open_services(tmp_path, family, dtype)
    assert services.workspace.host.rehash() == two != three
    assert same(weights(services), tensors)
    assert services.edits.reapply(["e2"]).weights_hash == three
    services.close()


def test_reverting_twice_changes_nothing_and_is_no_error(services: Services) -> None:
    apply(services, FACTS[0])
    services.edits.revert(["e1"])
    before = services.workspace.host.weights_hash
    report = services.edits.revert(["e1"])
    assert (report.reverted, report.unchanged) == ([], ["e1"])
    assert services.workspace.host.weights_hash == before


def test_reapplying_an_active_edit_changes_nothing(services: Services) -> None:
    apply(services, FACTS[0])
    before = services.workspace.host.weights_hash
    report = services.edits.reapply(["e1"])
    assert report.status == "unchanged"
    assert services.workspace.host.weights_hash == before


def test_a_failed_guard_changes_nothing_and_is_recorded_as_rejected(services: Services) -> None:
    before = services.workspace.host.weights_hash
    report = services.edits.apply([FACTS[0]], method="rome", params=dict(QUICK), guard=Guard(max_drift=0.0))
    assert report.status == "rejected"
    assert report.edit_ids == []
    assert report.failed_guard[0].startswith("max_drift 0: measured")
    assert report.weights_hash == services.workspace.host.rehash() == before
    assert [e.status for e in services.history.list_edits().edits] == ["rejected"]


def test_a_bound_that_cannot_be_measured_fails_by_name(services: Services) -> None:
    report = services.edits.apply(
        [FACTS[1]], method="rome", params=dict(QUICK), guard=Guard(min_generality=0.1)
    )
    assert report.status == "rejected"
    assert "paraphrases" in report.failed_guard[0]


def test_a_contradiction_is_refused_and_names_the_way_out(services: Services) -> None:
    apply(services, FACTS[0])
    before = services.workspace.host.weights_hash
    other = Edit(subject="france", prompt="The  capital of {} is", target="Berlin")
    with pytest.raises(Conflict, match=r"e1 is active.*replace=true"):
        apply(services, other)
    assert services.workspace.host.weights_hash == before


def test_replacing_retires_the_older_edit_in_the_same_transaction(services: Services) -> None:
    apply(services, FACTS[0])
    apply(services, FACTS[1])
    ids = apply(services, FACTS[0].model_copy(update={"target": "Berlin"}), replace=True)
    assert ids == ["e3"]
    assert {e.edit_id: e.status for e in services.history.list_edits().edits} == {
        "e1": "replaced",
        "e2": "active",
        "e3": "active",
    }
    assert [a.rows for a in services.workspace.host.stack] == [(0,), (0,)]
    assert services.history.show_edit("e1").replaced_by == "e3"
    with pytest.raises(Conflict, match="e3 is active"):
        services.edits.reapply(["e1"])


@pytest.mark.parametrize(("method", "params"), [("grace", {}), ("rome", STRONG)])
def test_before_is_what_the_original_model_said_however_often_a_fact_is_replaced(
    services: Services, method: str, params: dict[str, object]
) -> None:
    fact, strong = FACTS[0], {"method": method, "params": dict(params), "guard": Guard(off=("all",))}
    first = services.edits.apply([fact], **strong).results[0]
    asked_first = [p.before for p in first.details if p.kind == "paraphrase"]
    assert first.after != first.before
    assert (first.p_target_after > 0.5) == (method == "grace")
    berlin, rome = fact.model_copy(update={"target": "Berlin"}), fact
    previewed = services.edits.preview([berlin], **strong)
    kept = services.edits.apply(preview_id=previewed.preview_id, replace=True, guard=strong["guard"])
    reports = [previewed, kept]
    reports.append(services.edits.apply([rome, FACTS[1]], **strong, replace=True))  # as e1 had it
    reports.append(services.edits.reapply(["e3"]))  # is active: measured again, nothing is changed
    services.edits.revert(["e3", "e4"])
    reports.append(services.edits.reapply(["e2"]))
    for report in reports:
        outcome = report.results[0]
        assert outcome.before == first.before
        assert outcome.p_target_before < 0.5
        assert not [w for w in report.warnings if "knew the target" in w]
        assert [p.before for p in outcome.details if p.kind == "paraphrase"] == asked_first
    told = [[w for w in report.warnings if "`before`" in w] for report in reports[:3]]
    said = "; `before` is what the original model said"
    assert told == [[f"would replace e1{said}"], [f"e1 was replaced{said}"], [f"e2 was replaced{said}"]]
    audited = services.edits.audit(["e2"]).edits[0]
    assert audited.before == first.before
    rows = services.history.query("SELECT edit_id, said_before FROM facts WHERE subject = 'France'").rows
    assert rows == [[edit_id, first.before] for edit_id in ("e1", "e2", "e3")]
    sql = "SELECT DISTINCT json_extract(measured, '$.before') FROM measurements WHERE edit_id <> 'e4'"
    assert services.history.query(sql).rows == [[first.before]]


def test_the_same_fact_twice_in_one_call_is_refused(services: Services) -> None:
    with pytest.raises(Conflict, match=r"'Rome' and 'Berlin'"):
        apply(services, FACTS[0], FACTS[0].model_copy(update={"target": "Berlin"}))
    with pytest.raises(Conflict, match="twice"):
        apply(services, FACTS[0], FACTS[0])


def test_one_fact_of_a_call_can_be_reverted_alone(tmp_path: Path, services: Services) -> None:
    ids = apply(services, *FACTS)
    whole = services.workspace.host.weights_hash
    services.edits.revert([ids[1]])
    part = services.workspace.host.weights_hash
    assert part != whole
    services.close()
    again = open_services(tmp_path)
    assert again.workspace.host.rehash() == part
    assert again.edits.reapply([ids[1]]).weights_hash == whole
    again.edits.revert(ids)
    assert again.workspace.host.weights_hash == again.workspace.host.base_hash
    again.close()


def test_unknown_ids_are_named_and_nothing_is_reverted(services: Services) -> None:
    apply(services, FACTS[0])
    before = services.workspace.host.weights_hash
    with pytest.raises(NoSuchEdit, match="e99"):
        services.edits.revert(["e1", "e99"])
    assert services.workspace.host.weights_hash == before
    with pytest.raises(ServiceError, match="edit_ids is empty"):
        services.edits.revert([])


def test_an_edit_of_another_model_is_refused(tmp_path: Path) -> None:
    services = open_services(tmp_path, "llama")
    apply(services, FACTS[0])
    services.close()
    other = open_services(tmp_path, "gpt2")
    assert other.workspace.host.stack == ()
    with pytest.raises(ServiceError, match="e1 belongs to another model"):
        other.edits.revert(["e1"])
    other.close()


def test_cancelling_keeps_nothing(services: Services) -> None:
    before = services.workspace.host.weights_hash
    ctx = RequestContext()
    object.__setattr__(ctx, "progress", lambda done, total, message: done > 0.1 and ctx.cancelled.set())
    with pytest.raises(Cancelled):
        services.edits.apply([FACTS[0]], method="rome", params=dict(QUICK), ctx=ctx)
    assert services.workspace.host.rehash() == before
    assert services.history.list_edits().total == 0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"layer": 99}, "layer 99 does not exist"),
        ({"steps": 3}, "params.steps is not a parameter of rome; it has"),
        ({"clamp": -1}, "params.clamp"),
        ({"mode": "both"}, "params.mode"),
        ({"sample": "corpusabc"}, "compute_statistics"),
    ],
)
def test_wrong_parameters_are_named(services: Services, params: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidEdit, match=message):
        services.edits.apply([FACTS[0]], method="rome", params=params)


def test_an_unknown_method_lists_those_there_are(services: Services) -> None:
    with pytest.raises(ServiceError, match=r"'magic' is not known.*rome"):
        services.edits.apply([FACTS[0]], method="magic")


def test_the_audit_sees_weights_that_were_tampered_with_and_repairs_them(services: Services) -> None:
    apply(services, FACTS[0])
    good = services.workspace.host.weights_hash
    name = services.workspace.host.changed_tensors()[0]
    services.workspace.host.lm.weight(name)[0, 0] += 1
    audit = services.edits.audit()
    assert not audit.integrity.weights
    assert "repair=true" in audit.next
    audit = services.edits.audit(repair=True)
    assert audit.integrity.weights
    assert audit.repaired
    assert audit.weights_hash == good


def test_the_audit_measures_against_the_pristine_model(services: Services) -> None:
    before = services.facts.ask("The capital of France is", 4).completion
    apply(services, FACTS[0])
    audit = services.edits.audit()
    assert [e.edit_id for e in audit.edits] == ["e1"]
    assert audit.edits[0].before.split()[:1] == before.split()[:1]
    assert audit.edits[0].fluency is None, "nobody asked for it"
    assert audit.drift.kl > 0
    assert [m.occasion for m in services.history.show_edit("e1").measurements] == ["apply", "audit"]
    assert services.edits.audit(fluency=True).edits[0].fluency is not None


def test_only_active_edits_are_audited(services: Services) -> None:
    apply(services, FACTS[0])
    services.edits.revert(["e1"])
    with pytest.raises(ServiceError, match="e1 is reverted"):
        services.edits.audit(["e1"])
    assert services.edits.audit().edits == []


def test_the_base_model_answers_beside_the_live_one(services: Services) -> None:
    base = services.facts.ask("The capital of France is", 6, compare_to_base=True)
    assert base.completion == base.base_completion
    services.edits.apply([FACTS[0]], method="rome", params=dict(STRONG))
    live = services.facts.ask("The capital of France is", 6, compare_to_base=True)
    assert live.base_completion == base.completion != live.completion


def test_facts_are_checked_with_probabilities(services: Services) -> None:
    said = services.facts.ask("The capital of France is", 3).completion.split()[0]
    checks = services.facts.check(
        [
            FactQuery("The capital of {} is", said, "France", ["Rome"]),
            FactQuery("The capital of Japan is", ["x", "y"]),
        ]
    ).facts
    assert checks[0].verdict == "agrees"
    assert checks[0].expected.rank == 0
    assert checks[0].alternatives[0].text == "Rome"
    assert checks[1].verdict != "agrees"
    with pytest.raises(InvalidEdit, match="no subject"):
        services.facts.check([FactQuery("The capital of {} is", "Paris")])


def test_a_damaged_patch_file_is_named_and_the_server_starts_read_only(tmp_path: Path) -> None:
    services = open_services(tmp_path)
    apply(services, FACTS[0])
    apply(services, FACTS[1])
    blob = services.history.show_edit("e1").patch["blob"]
    services.close()
    path = next((tmp_path / "blobs").rglob(f"{blob}.safetensors"))
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-4] + b"oops")
    services = open_services(tmp_path)
    status = services.status()
    assert status.read_only
    assert any(blob in d for d in status.damage)
    assert any("e1" in d for d in status.damage)
    assert len(services.workspace.host.stack) == 1
    with pytest.raises(ReadOnly, match="damaged"):
        services.edits.revert(["e2"])
    assert services.facts.ask("The capital of Japan is", 2).tokens == 2
    services.close()


def test_a_row_changed_by_hand_is_named_and_the_server_starts_read_only(tmp_path: Path) -> None:
    services = open_services(tmp_path)
    apply(services, FACTS[0])
    services.close()
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        db.execute("UPDATE edits SET target = 'Berlin' WHERE id = 'e1'")
    services = open_services(tmp_path)
    assert services.status().read_only
    assert any("e1" in d for d in services.status().damage)
    services.close()


def test_a_read_only_server_previews_but_keeps_nothing(tmp_path: Path) -> None:
    open_services(tmp_path).close()
    services = open_services(tmp_path, read_only=True)
    assert services.edits.preview([FACTS[0]], method="rome", params=dict(QUICK)).status == "previewed"
    with pytest.raises(ReadOnly, match="read-only"):
        apply(services, FACTS[0])
    services.close()


def test_a_method_that_cannot_work_on_the_family_says_what_would(tmp_path: Path) -> None:
    services = open_services(tmp_path, "t5")
    with pytest.raises(InvalidEdit, match="encoder-decoder"):
        apply(services, FACTS[0])
    rome = services.edits.method("rome")
    assert not rome.ready
    services.close()


def test_second_moments_are_made_once_and_kept(tmp_path: Path, services: Services) -> None:
    said: list[str] = []
    ctx = RequestContext(progress=lambda done, total, message: said.append(message))
    services.edits.apply([FACTS[0]], method="rome", params={"max_steps": 2}, ctx=ctx)
    assert any("once per model" in message for message in said)
    said.clear()
    services.edits.apply([FACTS[1]], method="rome", params={"max_steps": 2}, ctx=ctx)
    assert not any("once per model" in message for message in said)
    assert services.status().statistics["second_moments"]


def test_two_edits_never_act_in_the_same_neurons_and_both_ways_out_work(services: Services) -> None:
    params = {"max_steps": 1, "forms": False}
    first = services.edits.apply([FACTS[0]], method="t_patcher", params=params)
    services.edits.revert(first.edit_ids)
    second = services.edits.apply([FACTS[1]], method="t_patcher", params=params)
    before = services.workspace.host.weights_hash
    with pytest.raises(
        EditError, match=r"the same neurons .* Revert the one that is active .* make this edit anew"
    ):
        services.edits.reapply(first.edit_ids)
    assert services.workspace.host.weights_hash == before
    assert [e.id for e in services.workspace.active_edits] == second.edit_ids
    anew = services.edits.apply([FACTS[0]], method="t_patcher", params=params)
    services.edits.revert([*anew.edit_ids, *second.edit_ids])
    services.edits.reapply(first.edit_ids)
    assert services.workspace.host.weights_hash == first.weights_hash

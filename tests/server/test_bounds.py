"""What stands without a guard, what auto tries, what is left out, and what a report tells."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editors import METHODS
from editors.canaries import Canaries
from editors.edit import Edit, Neighbour
from editors.errors import InvalidEdit
from editors.memory import fact_memory
from editors.memory.constrained_speaker import in_front
from editors.memory.fact_memory import FactRoute
from editors.model.lm import Claim, Generation, Prompt
from server.errors import ServiceError
from server.facts import auto_method, watching
from server.facts.auto_method import taking, ways
from server.facts.guard import PERPLEXITY_RATIO, UNGUARDED, Guard
from server.facts.neighbours import EACH, with_neighbours
from server.facts.trials import MOST_TRIALS
from server.request_context import RequestContext
from server.services import Services
from tests.families import make
from tests.server.opened import FACTS, QUICK, STRONG, open_services

LONG_STACK = auto_method.LONG
LONG = "that customers may return any unused item within thirty days of delivery for a full refund"


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    opened = open_services(tmp_path, bounds="standing")
    yield opened
    opened.close()


def own_answer(services: Services, edit: Edit) -> str:
    """What the model says already: an edit to it holds by any method."""
    return services.facts.ask(edit.text, 6).completion.split()[0]


def test_an_edit_that_does_not_take_is_not_kept_without_a_guard(services: Services) -> None:
    before = services.workspace.host.weights_hash
    report = services.edits.apply([FACTS[0]], method="rome", params=dict(QUICK))
    assert report.status == "rejected"
    assert report.failed_guard[0].startswith("min_reliability 1: measured 0.000")
    assert services.workspace.host.rehash() == report.weights_hash == before
    named = re.search(r"guard=(\{.*?\})", report.next)
    assert named is not None
    assert '"reliability"' in named[1]
    off = Guard.model_validate_json(named[1])
    assert services.edits.preview([FACTS[0]], method="rome", params=dict(QUICK), guard=off).failed_guard == []
    assert [e.status for e in services.history.list_edits().edits] == ["rejected"]


def test_a_standing_bound_is_switched_off_by_name(services: Services) -> None:
    guard = Guard(off=("reliability", "perplexity", "subject_locality", "active_edits"))
    assert (
        services.edits.apply([FACTS[0]], method="rome", params=dict(QUICK), guard=guard).status == "applied"
    )
    kept = services.edits.apply([FACTS[1]], method="rome", params=dict(QUICK), guard=Guard(off=("all",)))
    assert kept.status == "applied"


@given(
    st.sets(st.sampled_from(["reliability", "perplexity", "subject_locality", "active_edits", "all"])),
    st.integers(1, 1000),
)
def test_what_is_not_switched_off_stands_and_a_given_bound_stays(off: set[str], edits: int) -> None:
    guard = Guard.model_validate({"off": sorted(off)}).standing(edits)
    stands = {
        "reliability": guard.min_reliability,
        "perplexity": guard.max_perplexity_ratio,
        "subject_locality": guard.min_subject_locality,
        "active_edits": guard.max_lost_edits,
    }
    assert {name for name, bound in stands.items() if bound is None} == (set(stands) if "all" in off else off)
    ratio = guard.max_perplexity_ratio
    assert ratio is None or ratio >= PERPLEXITY_RATIO
    assert Guard(min_reliability=0.3, off=("reliability",)).standing(edits).min_reliability == 0.3


def test_with_partial_the_edits_that_hold_are_kept_and_the_others_named(services: Services) -> None:
    holds = FACTS[1].model_copy(update={"target": own_answer(services, FACTS[1])})
    call = {"method": "ft", "params": {"max_steps": 1, "lr": 1e-9}, "guard": Guard(off=("perplexity",))}
    refused = services.edits.apply([FACTS[0], holds], **call)  # type: ignore[arg-type]
    assert refused.status == "rejected"
    assert "France -> Rome" in refused.failed_guard[0]
    assert "partial=true" in refused.next
    report = services.edits.apply([FACTS[0], holds], partial=True, **call)  # type: ignore[arg-type]
    assert report.status == "applied", report.failed_guard
    assert [r.subject for r in report.results] == ["Japan"]
    assert len(report.left_out) == 1
    assert report.left_out[0].startswith("The capital of France is -> Rome: the model says")
    assert [e.subject for e in services.history.list_edits("active").edits] == ["Japan"]


def test_auto_tries_other_ways_and_leaves_the_best_on_the_model(tmp_path: Path, services: Services) -> None:
    guard = Guard(min_locality=1.0, min_chat=1.0, min_chat_reworded=1.0)  # more than a random model can give
    told: list[str] = []
    ctx = RequestContext(progress=lambda done, total, message: told.append(message))
    report = services.edits.preview([FACTS[0]], params={"max_steps": 4}, guard=guard, ctx=ctx)
    assert 1 < len(report.tried) <= MOST_TRIALS
    for attempt in report.tried[1:]:
        assert any(f"not good enough yet, trying {attempt.method}: " in message for message in told)
    assert report.failed_guard
    best = [attempt for attempt in report.tried if attempt.kept]
    assert [attempt.method for attempt in best] == [report.method]
    assert len(best[0].failed) == min(len(a.failed) for a in report.tried if a.reliability is not None)
    assert services.workspace.host.weights_hash == services.workspace.host.base_hash


def test_what_auto_keeps_is_what_a_restart_replays(tmp_path: Path) -> None:
    services = open_services(tmp_path)
    report = services.edits.apply([FACTS[0]], params={"max_steps": 4}, goal="export")
    assert report.status == "applied"
    detail = services.history.show_edit(report.edit_ids[0])
    assert detail.weights_hash_before == services.workspace.host.base_hash
    assert detail.weights_hash_after == report.weights_hash == services.workspace.host.rehash()
    services.close()
    again = open_services(tmp_path)
    assert again.workspace.host.rehash() == report.weights_hash
    assert not again.status().damage
    again.close()


def test_auto_takes_a_method_that_has_the_parameters_that_were_given(services: Services) -> None:
    found = ways(services.workspace.lm, FACTS[:1], [])
    assert len({way.begun for way in found}) == len(found)
    assert {way.method for way in taking(found, {"max_steps": 3})} <= {"rome", "memit", "alphaedit", "emmet"}
    assert taking(found, {"no_such": 1}) == found


def test_for_export_only_weights_are_written(services: Services) -> None:
    lm = services.workspace.lm
    assert all(METHODS[way.method].exportable for way in ways(lm, FACTS, [], "export"))
    with pytest.raises(
        InvalidEdit, match=r"'in_context' changes no weights that can be exported.*method='auto'"
    ):
        services.edits.apply([FACTS[0]], method="in_context", goal="export")


def test_for_export_only_what_is_in_the_weights_counts_as_active(tmp_path: Path) -> None:
    services = open_services(tmp_path, bounds="off")
    memories = [Edit(subject=f"Town {i}", prompt="{} lies in", target="Rome") for i in range(LONG_STACK)]
    services.edits.apply(memories, method="in_context")
    asked = {"goal": "export", "params": {"max_steps": 1}}
    assert services.edits.preview([FACTS[0]], **asked).tried[0].method == "t_patcher"
    for edit in (FACTS[1], *memories[: LONG_STACK - 1]):
        services.edits.apply([edit], method="rome", params=dict(QUICK), replace=True)
    assert services.edits.preview([FACTS[0]], **asked).tried[0].method == "alphaedit"
    services.close()


def test_a_hold_that_the_model_does_not_say_is_named(services: Services) -> None:
    said = own_answer(services, Edit(subject="France", prompt="A train from {} goes to", target="x"))
    holds = [
        {"prompt": "A train from {} goes to", "answer": said},
        {"prompt": "The river of {} is", "answer": "the Vltava"},
    ]
    edit = FACTS[0].model_copy(update={"holds": Edit(**FACTS[0].model_dump() | {"holds": holds}).holds})
    report = services.edits.preview([edit], "in_context", guard=Guard(off=("all",)))
    named = [warning for warning in report.warnings if warning.startswith("not held")]
    assert len(named) == 1
    assert "'The river of France is' -> 'the Vltava'" in named[0]
    kept = services.edits.apply(preview_id=report.preview_id)
    assert [w for w in kept.warnings if w.startswith("not held")] == named
    services.edits.revert(kept.edit_ids)
    back = services.edits.reapply(kept.edit_ids)
    assert [w for w in back.warnings if w.startswith("not held")] == named


def test_a_form_that_was_not_asked_before_shows_no_empty_answer(services: Services) -> None:
    report = services.edits.preview([FACTS[0]], "in_context", guard=Guard(off=("all",)))
    shown = report.model_dump(mode="json")["results"][0]["details"]
    assert all(probe.get("before") != "" for probe in shown if probe["kind"] == "form")


def test_a_long_answer_is_refused_at_once_by_a_method_that_cannot_write_it(services: Services) -> None:
    policy = Edit(subject="WidgetCo", prompt="{}'s refund policy is", target=LONG)
    with pytest.raises(InvalidEdit, match=r"edits\[0\]\.target has 16 words, and rome writes.*method='auto'"):
        services.edits.apply([policy], method="rome")
    chosen = ways(services.workspace.lm, [policy], [])
    assert all(METHODS[way.method].long_answers for way in chosen)


def test_no_way_for_a_model_says_so() -> None:
    policy = Edit(subject="WidgetCo", prompt="{}'s refund policy is", target=LONG)
    found = ways(make("t5"), FACTS[:1], [])
    assert all(METHODS[way.method].supports(make("t5")) is None for way in found)
    if not any(m.long_answers and m.exportable for m in METHODS.values()):
        with pytest.raises(ServiceError, match="sentence"):
            ways(make("llama"), [policy], [], "export")


def test_an_active_edit_that_is_lost_is_named(tmp_path: Path) -> None:
    services = open_services(tmp_path)
    first = FACTS[1].model_copy(update={"target": own_answer(services, FACTS[1])})
    assert services.edits.apply([first], method="ft", params={"max_steps": 1, "lr": 1e-9}).reliability == 1
    other = Edit(subject="Japan", prompt="The language of {} is", target="Berlin")
    report = services.edits.apply([other], method="rome", params=dict(STRONG))
    lost = [c for c in report.changed if c.kind == "edit"]
    assert [c.edit_id for c in lost] == ["e1"]
    assert any("e1" in warning for warning in report.warnings)
    assert report.changed_count >= len(report.changed) > 0
    services.edits.revert(["e2"])
    refused = services.edits.apply([other], method="rome", params=dict(STRONG), guard=Guard(max_lost_edits=0))
    assert refused.failed_guard == ["max_lost_edits 0: e1 would not hold any more"]
    assert services.edits.audit().failing == []
    services.close()


def test_what_active_edits_say_after_one_change_is_not_asked_again_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[str]] = []
    really = watching.ask
    monkeypatch.setattr(
        watching, "ask", lambda lm, prompts, n: (asked.append(prompts), really(lm, prompts, n))[1]
    )
    services = open_services(tmp_path)
    places = ("Peru", "Chad", "Mali")
    for place in places:
        edit = Edit(subject=place, prompt="The capital of {} is", target="Rome")
        services.edits.apply([edit], method="constrained", guard=UNGUARDED)
    first, second, _ = (f"The capital of {place} is" for place in places)
    assert [list(prompts) for prompts in asked if prompts] == [[first], [first], [second], [second, first]]
    services.close()


def test_one_of_many_active_edits_may_slip_and_none_of_a_few() -> None:
    assert [Guard().standing(1, watched).max_lost_edits for watched in (0, 1, 9, 10, 24)] == [0, 0, 0, 1, 2]


def test_a_bound_on_changed_facts_counts_them(services: Services) -> None:
    guard = Guard(off=("all",), max_changed=0)
    report = services.edits.apply([FACTS[0]], method="rome", params=dict(STRONG), guard=guard)
    assert (report.status == "rejected") is (report.changed_count > 0)


def test_a_report_begins_with_counts_and_the_ledger_keeps_every_probe(tmp_path: Path) -> None:
    services = open_services(tmp_path)
    first = FACTS[1].model_copy(update={"target": own_answer(services, FACTS[1])})
    report = services.edits.apply([first], method="ft", params={"max_steps": 1, "lr": 1e-9})
    assert report.summary.startswith("1 of 1 edits are said")
    assert report.perplexity_ratio is not None
    (kept,) = services.history.show_edit("e1").measurements
    details = kept.values["details"]
    assert len([d for d in details if d["kind"] == "neighbour"]) == EACH
    assert len(details) >= len(report.results[0].details)
    assert kept.values["forms"] == report.results[0].forms
    audit = services.edits.audit()
    assert audit.summary.startswith("1 of 1 edits are said")
    services.close()


def test_edits_without_neighbours_are_given_some_about_other_subjects() -> None:
    capital = Edit(subject="Austria", prompt="The capital of {} is", target="Graz")
    named = capital.model_copy(update={"neighbours": ({"prompt": "x"},)})
    (given,) = with_neighbours([capital], ["Chile"])
    assert len(given.neighbours) == EACH
    assert all(n.prompt.startswith("The capital of ") for n in given.neighbours)
    assert not any(name in n.prompt for n in given.neighbours for name in ("Austria", "Chile"))
    assert with_neighbours([named])[0] is named
    odd = Edit(subject="zorbium", prompt="The colour of {} is", target="blue")
    assert with_neighbours([odd])[0].neighbours


def test_after_a_memory_only_what_it_claims_is_asked_again(tmp_path: Path) -> None:
    services = open_services(tmp_path, bounds="off")
    lm, asked = services.workspace.lm, list[list[str]]()
    generate = lm.local.generate

    def noted(prompts: Sequence[Prompt], *args: Any, **more: Any) -> list[Generation]:
        asked.append([lm.user_text(p) for p in prompts])
        return generate(prompts, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.local, "generate", noted)
        report = services.edits.apply([FACTS[0]], method="constrained")
    neighbours = [p.prompt for p in report.results[0].details if p.kind == "neighbour"]
    assert neighbours
    for prompt in neighbours:
        assert sum(prompt in batch for batch in asked) == 1
    assert sum(FACTS[0].text in text for batch in asked for text in batch) > 1
    services.close()


def test_the_model_is_compared_with_the_pristine_one_once_in_each_state(services: Services) -> None:
    canaries = services.workspace.drift()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Canaries, "drift", lambda *_: pytest.fail("measured twice"))
        assert services.workspace.drift() is canaries
        memory = services.edits.apply([FACTS[0]], method="in_context", guard=Guard(off=("all",)))
    assert memory.drift.kl == canaries.kl
    written = services.edits.apply([FACTS[1]], method="rome", params=dict(QUICK), guard=Guard(off=("all",)))
    assert written.drift.kl != canaries.kl
    services.edits.revert([written.edit_ids[0]])
    assert services.workspace.drift().kl == canaries.kl


def test_for_export_t_patcher_comes_first_and_then_rome_with_other_forms_learned(services: Services) -> None:
    lm = services.workspace.lm
    first, second, third, *_ = ways(lm, FACTS[:1], [], "export")
    assert [way.begun for way in (first, second, third)] == [
        ("t_patcher", False),
        ("rome", True),
        ("rome", False),
    ]
    assert not any(way.params.get("forms") for way in ways(lm, FACTS[:1], []))
    report = services.edits.preview([FACTS[0]], params=dict(QUICK), goal="export")
    assert [(each.method, bool(each.params.get("forms"))) for each in report.tried][:2] == [
        ("rome", True),  # t_patcher has not all of these parameters
        ("rome", False),
    ]


def test_an_edit_that_breaks_what_the_call_wants_kept_is_not_kept(services: Services) -> None:
    prompt = "What do people say of Croatia?"
    now = services.facts.ask(prompt, 24, chat=True).completion
    edit = FACTS[0].model_copy(update={"holds": (Neighbour(prompt=prompt, answer=now.split()[0]),)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FactRoute, "claim", lambda route, prompts: [_claimed(route, p) for p in prompts])
        patch.setattr(fact_memory, "_words_of", lambda names: None)  # asked about every prompt
        report = services.edits.apply([edit], method="constrained")
        assert report.status == "rejected"
        assert any(bound.startswith("holds: 1 that the call gave") for bound in report.failed_guard)
        assert 'guard={"off": ["holds"]}' in report.next
        preview = services.edits.preview([edit], method="constrained")
        judged = services.edits.apply(preview_id=preview.preview_id, guard=Guard(min_reliability=0.5))
        assert judged.status == "rejected"
        kept = services.edits.apply([edit], method="constrained", guard=Guard(off=("holds",)))
    assert kept.status == "applied"
    assert [each.prompt for each in kept.changed if each.kind == "hold"] == [prompt]


def _claimed(route: FactRoute, prompt: Prompt) -> Claim:
    """A memory that claims every prompt."""
    return Claim(in_front(route.lm, prompt, route.patch.facts), "all", 1.0)

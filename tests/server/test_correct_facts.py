"""A fact set is checked and put right as jobs: counts, plans, batches, damage, and no step twice after a kill."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from editors import METHODS
from editors.edit import Edit
from editors.errors import EditError
from server.errors import ServiceError
from server.facts.guard import UNGUARDED
from server.factsets.requests import Approve, Given, Policy
from server.factsets.results import Correction, SetCheck
from server.factsets.saving import facts_of
from server.request_context import RequestContext
from server.services import Services
from store.errors import NoSuchJob
from tests import device
from tests.server.killed import run_until_killed
from tests.server.opened import open_services

PLACES = ("Peru", "Chad", "Mali", "Oman", "Cuba", "Iran")
ANSWERS = ("Rome", "Paris", "Oslo", "Bern", "Rome", "Paris")
MEMORY = Policy(method="constrained", batch=2)


def row(place: str, answer: str, prompt: str = "The capital of {} is", **more: str) -> dict[str, str]:
    return {"subject": place, "prompt": prompt, "answer": answer, **more}


ROWS = [row(place, answer) for place, answer in zip(PLACES, ANSWERS, strict=True)]


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    services = open_services(tmp_path / "home")
    yield services
    services.close()


def save(services: Services, rows: list[dict[str, str]]) -> None:
    services.fact_sets.save("a-set", Given(facts=rows))


def check(services: Services, limit: int = 20) -> SetCheck:
    return asyncio.run(services.fact_sets.check("a-set", limit, 120, RequestContext()))


def correct(
    services: Services, policy: Policy = MEMORY, approve: Approve = "auto", plan: str | None = None
) -> Correction:
    done = asyncio.run(services.fact_sets.correct("a-set", policy, approve, plan, 120, RequestContext("me")))
    assert done.status in ("planned", "corrected"), done.summary
    return done


def by_hand(services: Services, place: str, target: str, prompt: str = "The capital of {} is") -> str:
    edit = Edit(subject=place, prompt=prompt, target=target)
    return services.edits.apply([edit], method="constrained", reason="by hand").edit_ids[0]


def numbers(report: Correction) -> dict[str, str]:
    return {name: str(each["numbers"]) for name, each in report.outcomes.items()}


def test_a_set_is_put_right_and_the_report_is_short(services: Services) -> None:
    save(services, ROWS)
    report = correct(services)
    assert numbers(report) == {"done": "1-6"}
    assert report.edits == ["e1-e6"]
    assert report.summary == "6 facts: 6 corrected."
    assert report.perplexity_ratio == 1.0  # a memory leaves the weights as they are
    again = check(services)
    assert again.counts == {"facts": 6, "agrees": 6, "differs": 0, "unsure": 0, "changed": 0}
    rows = services.fact_sets.show("a-set", kind="done").facts
    assert [(r["n"], r["edit"]) for r in rows] == [(n, f"e{n}") for n in range(1, 7)]
    edit = services.history.show_edit("e3").edit
    assert (edit.client, edit.reason) == ("me", "fact set a-set, j1")
    assert numbers(correct(services)) == {"right": "1-6"}
    assert services.history.list_edits().total == 6


def test_a_check_names_what_changed_since_the_one_before(services: Services) -> None:
    save(services, ROWS)
    correct(services)
    assert check(services).facts == []
    services.edits.revert(["e2"])
    found = check(services)
    assert found.counts["changed"] == 1
    (changed,) = found.facts
    assert (changed["n"], changed["was"]) == (2, "agrees")
    assert changed["verdict"] != "agrees"
    assert set(found.meanings) == {"agrees", "differs", "unsure"}
    assert check(services).counts["changed"] == 0  # it is as it was at the check before
    assert [r["n"] for r in services.fact_sets.show("a-set", kind=changed["verdict"]).facts] == [2]


def test_what_was_asked_at_the_same_state_is_not_asked_again(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(services, ROWS)
    first = check(services)

    def never(*_: Any) -> Any:
        raise AssertionError("the model was asked")

    monkeypatch.setattr("server.factsets.checking.check_now", never)
    assert check(services).counts == {**first.counts, "changed": 0}


def test_long_lists_come_in_parts(services: Services) -> None:
    save(services, ROWS)
    found = check(services, limit=2)
    assert len(found.facts) == 2
    assert "4 more" in found.next
    first = services.fact_sets.show("a-set", limit=4)
    second = services.fact_sets.show("a-set", limit=4, cursor=first.next_cursor)
    assert [r["n"] for page in (first, second) for r in page.facts] == [1, 2, 3, 4, 5, 6]
    assert second.next_cursor is None


def test_a_plan_changes_nothing_until_it_is_carried_out(services: Services) -> None:
    save(services, ROWS)
    before = services.workspace.state_hash
    plan = correct(services, approve="ask")
    assert (plan.status, numbers(plan)) == ("planned", {"planned": "1-6"})
    assert services.workspace.state_hash == before
    assert services.history.list_edits().total == 0
    assert f'plan="{plan.job_id}"' in plan.next
    done = correct(services, plan=plan.job_id)
    assert numbers(done) == {"done": "1-6"}
    with pytest.raises(ServiceError, match=f"was carried out by {done.job_id}"):
        correct(services, plan=plan.job_id)


def test_a_plan_with_contradictions_says_that_mending_them_makes_it_invalid(services: Services) -> None:
    save(services, [*ROWS, row("Peru", "Lima")])
    plan = correct(services, approve="ask")
    assert "this plan, for version 1, invalid" in plan.next
    save(services, ROWS)
    with pytest.raises(ServiceError, match="make a new"):
        correct(services, plan=plan.job_id)
    again = correct(services, approve="ask")
    assert "invalid" not in again.next, "nothing is to be mended"
    assert correct(services, plan=again.job_id).status == "corrected"


def test_a_set_is_put_right_in_the_weights_where_it_is_to_be_exported(services: Services) -> None:
    save(services, ROWS[:2])
    policy = Policy(goal="export", params={"max_steps": 2}, guard=UNGUARDED)
    done = correct(services, policy)
    edits = services.history.list_edits().edits
    assert sum(each["count"] for each in done.outcomes.values()) == len(edits) == 2
    assert all(METHODS[edit.method].exportable for edit in edits)
    with pytest.raises(EditError, match="goal is 'export'"):
        correct(services, Policy(goal="export", method="constrained"))


def test_a_plan_for_another_version_is_refused(services: Services) -> None:
    save(services, ROWS)
    plan = correct(services, approve="ask")
    save(services, [*ROWS[:5], row("Iran", "Rome")])
    with pytest.raises(ServiceError, match="for version 1 of 'a-set', which is at 2"):
        correct(services, plan=plan.job_id)
    with pytest.raises(NoSuchJob, match="'j9'; list_jobs"):
        correct(services, plan="j9")
    other = services.jobs.start("check_facts", {"set": "a-set"}).job_id
    with pytest.raises(ServiceError, match="is no plan for set 'a-set'"):
        correct(services, plan=other)


def test_contradictions_of_the_list_are_named_and_not_corrected(services: Services) -> None:
    save(services, [*ROWS[:2], row("Peru", "Lima", "The capital city of {} is")])
    report = correct(services)
    assert numbers(report) == {"done": "2", "skipped": "1, 3"}
    assert "contradicted by #3 (Lima)" in report.skipped[0]


def test_the_newest_of_two_contradicting_facts_is_taken_when_that_is_asked_for(services: Services) -> None:
    save(services, [row("Peru", "Rome", as_of="2020-01-01"), row("Peru", "Oslo", as_of="2024-05-01")])
    report = correct(services, Policy(method="constrained", conflicts="newest"))
    assert numbers(report) == {"done": "2", "skipped": "1"}
    assert "older than #2 (Oslo)" in report.skipped[0]


def test_an_edit_made_by_hand_is_kept_and_named_unless_the_policy_replaces_it(services: Services) -> None:
    mine = by_hand(services, "Peru", "Oslo")
    save(services, ROWS[:2])
    report = correct(services)
    assert numbers(report) == {"done": "2", "skipped": "1"}
    assert mine in report.skipped[0]
    replaced = correct(services, Policy(method="constrained", hand_edits="replace"))
    assert numbers(replaced) == {"done": "1", "right": "2"}
    assert services.history.show_edit(mine).edit.status == "replaced"


def test_an_edit_by_hand_in_other_words_is_taken_back_when_the_policy_replaces_it(services: Services) -> None:
    mine = by_hand(services, "Peru", "Oslo", "The capital city of {} is")
    save(services, [row("Peru", "Rome")])
    if numbers(kept := correct(services)) == {"skipped": "1"}:
        assert mine in kept.skipped[0]
    report = correct(services, Policy(method="constrained", hand_edits="replace"))
    assert numbers(report) == {"done": "1"}
    assert services.history.show_edit(mine).edit.status == "reverted"


def test_an_edit_by_hand_that_agrees_counts_as_right(services: Services) -> None:
    mine = by_hand(services, "Peru", "Rome")
    save(services, ROWS[:2])
    report = correct(services)
    assert numbers(report) == {"done": "2", "right": "1"}
    (right,) = services.fact_sets.show("a-set", kind="right").facts
    assert mine in right["why"]


def test_a_changed_answer_replaces_the_edit_of_the_set(services: Services) -> None:
    save(services, ROWS[:2])
    correct(services)
    save(services, [ROWS[0], row("Chad", "Oslo")])
    report = correct(services)
    assert numbers(report) == {"done": "2", "right": "1"}
    assert services.history.show_edit("e2").edit.status == "replaced"


def test_what_breaks_a_bound_is_named_and_the_rest_is_kept(services: Services) -> None:
    save(services, ROWS[:2])
    report = correct(services, Policy(method="rome", guard={"max_drift": 0}))  # type: ignore[arg-type]
    assert numbers(report) == {"failed": "1-2"}
    assert "max_drift" in report.failed[0]
    assert services.workspace.active_edits == []


@pytest.mark.parametrize(
    ("policy", "error"), [({"method": "rom"}, "rom"), ({"method": "rome", "params": {"stepz": 3}}, "stepz")]
)
def test_a_method_that_cannot_be_used_is_refused_at_once(
    services: Services, policy: dict[str, Any], error: str
) -> None:
    save(services, ROWS)
    with pytest.raises(Exception, match=error):
        correct(services, Policy.model_validate(policy))
    assert services.jobs.list().jobs == []


def test_two_jobs_that_do_the_same_are_one(services: Services) -> None:
    save(services, ROWS)
    services.jobs.runner.submit("check_facts", {"set": "a-set"}, None)
    with services.workspace.turn():  # so that none of them ends
        one = services.jobs.start("check_facts", {"set": "a-set"})
        two = services.jobs.start("check_facts", {"set": "a-set"})
    assert one.job_id == two.job_id == "j1"
    assert services.jobs.runner.wait(60)


@pytest.fixture
def damaging(services: Services) -> Services:
    """A set whose fact #1 is what the model says by itself; correcting #2 by brute force breaks it."""
    for place in (*PLACES, "Togo", "Laos", "Kenya", "Norway", "Japan", "Italy"):
        said = services.facts.ask(f"The capital of {place} is", 8).completion
        word = re.match(r"\W*([A-Za-z]{3,})", said)
        if word is not None:
            save(services, [row(place, word[1]), row("Zaire", "Rome")])
            if checked(services)[1].verdict == "agrees":
                return services
    raise AssertionError("the tiny model says no word at all")


def checked(services: Services) -> dict[int, Any]:
    check(services)
    return services.workspace.ledger.fact_states("a-set", services.workspace.writable_model_id)


BRUTE = {"lr": 0.05, "max_steps": 40, "keep_weight": 0.0}


@pytest.mark.parametrize("on_damage", ["revert", "stop"])
def test_a_fact_that_a_correction_breaks_is_named_or_the_culprit_is_taken_back(
    damaging: Services, on_damage: Any
) -> None:
    policy = Policy(method="ft", params=BRUTE, on_damage=on_damage)
    report = correct(damaging, policy)
    if on_damage == "stop":
        assert numbers(report)["lost"] == "1"
        assert "was right, and is not" in report.lost[0]
        return
    assert numbers(report) == {"right": "1", "failed": "2"}
    assert "it made #1 wrong" in report.failed[0]
    assert checked(damaging)[1].verdict == "agrees"


def test_a_gentle_second_try_holds_what_the_first_one_broke(damaging: Services) -> None:
    report = correct(damaging, Policy(method="ft", params=BRUTE, on_damage="retry"))
    assert numbers(report)["right"] == "1"
    assert checked(damaging)[1].verdict == "agrees"


def test_the_questions_of_a_data_set_give_rates_by_its_kinds(services: Services) -> None:
    record = {
        "subject": "Peru",
        "prompt": "The capital of Peru is",
        "target_new": "Rome",
        "rephrase": "Peru's capital is",
        "portability": {
            "Reasoning": [{"prompt": "The mayor of the capital of Peru is", "ground_truth": "Gualtieri"}]
        },
        "locality": {"Relation_Specificity": [{"prompt": "The colour of Chad is", "ground_truth": "blue"}]},
    }
    services.fact_sets.save("a-set", Given(facts=[record]))
    report = correct(services)
    assert report.data_set["Relation_Specificity"] == {"rate": 1.0, "of": 1}
    assert report.data_set["rephrase"]["of"] == report.data_set["Reasoning"]["of"] == 1
    assert report.data_set["edit_success"] == {"rate": 1.0, "of": 1}
    assert report.data_set["Reasoning"]["before"] == 0.0
    assert report.data_set["fluency"]["of"] == 1


def hops(case: int, *edits: tuple[str, str], question: str) -> dict[str, Any]:
    """A case of MQuAKE."""
    rewrites = [
        {
            "subject": subject,
            "prompt": "The capital of {} is",
            "target_new": {"str": answer},
            "question": f"{subject}?",
        }
        for subject, answer in edits
    ]
    return {
        "case_id": case,
        "requested_rewrite": rewrites,
        "questions": [question],
        "new_answer": "nothing at all",
    }


def test_a_case_counts_only_where_all_of_its_facts_are_said(services: Services) -> None:
    both, one = ("Peru", "Rome"), ("Chad", "Paris")
    records = [
        hops(1, both, one, question="Who rules the first?"),
        hops(2, both, question="Who rules the second?"),
        hops(3, one, question="Who rules the third?"),
    ]
    services.fact_sets.save("a-set", Given(facts=records))
    facts = facts_of(services.workspace.ledger, "a-set")
    assert [fact.cases for fact in facts.values()] == [("1", "2"), ("1", "3")]
    by_hand(services, "Chad", "Oslo")  # kept, so that its fact is skipped
    found = correct(services).data_set
    assert found["edit_success"] == {"rate": 1.0, "of": 1}
    assert found["instance_wise"] == {"rate": 0.333, "of": 3}
    assert found["multi_hop"] == {"rate": 0.0, "before": 0.0, "of": 3}


def test_a_fact_that_failed_counts_as_not_said(services: Services) -> None:
    record = hops(1, ("Peru", "Rome"), question="Who rules?")
    services.fact_sets.save("a-set", Given(facts=[record]))
    found = correct(services, Policy(method="rome", guard={"max_drift": 0})).data_set  # type: ignore[arg-type]
    assert found["edit_success"] == found["instance_wise"] == {"rate": 0.0, "of": 1}
    assert found["multi_hop"]["of"] == 1
    assert "fluency" not in found


KILLED = """
import os, sys, threading
from pathlib import Path
os.environ["ERRATA_BOUNDS"] = "off"
from tests import device
device.chosen = sys.argv[2]
from server.factsets.requests import Given, Policy
from tests.server.opened import open_services
from tests.server.test_correct_facts import ROWS, MEMORY
services = open_services(Path(sys.argv[1]))
services.fact_sets.save("a-set", Given(facts=ROWS))
ledger, at, calls = services.workspace.ledger, int(sys.argv[3]), 0
put = ledger.put_fact_states
def killing(name, model, rows):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), 9)
    put(name, model, rows)
ledger.put_fact_states = killing
services.jobs.start("correct_facts", {"set": "a-set", "policy": MEMORY.model_dump(mode="json"), "approve": "auto",
                                      "plan_of": None})
services.jobs.runner.wait(170)
sys.exit("it was not killed")
"""


@pytest.mark.parametrize(
    "at", [1, 2, 4, 5, 8]
)  # while checking, planning, between an edit and its note, at the end
def test_a_killed_correction_goes_on_and_does_nothing_twice(tmp_path: Path, at: int) -> None:
    run_until_killed(KILLED, str(tmp_path / "home"), device.chosen, str(at))
    services = open_services(tmp_path / "home")
    try:
        assert services.jobs.runner.wait(120)
        job = services.jobs.get("j1")
        assert job.state == "done", job.message
        assert job.result is not None
        assert job.result["outcomes"] == {"done": {"count": 6, "numbers": "1-6"}}
        edits = services.history.list_edits(limit=50).edits
        assert sorted(edit.subject for edit in edits) == sorted(PLACES)
        assert {edit.status for edit in edits} == {"active"}
        assert services.workspace.ledger.verify() == []
    finally:
        services.close()

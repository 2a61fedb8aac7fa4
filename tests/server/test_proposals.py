"""Corrections wait, and are applied exactly as they were measured, or measured again first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.errors import Conflict, ServiceError
from server.facts.guard import Guard
from server.proposals.results import ProposalReport
from server.request_context import RequestContext
from server.services import Services
from store import NoSuchProposal
from tests.server.opened import FACTS, QUICK, STRONG, apply, open_services, same, weights


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    opened = open_services(tmp_path, bounds="off")
    yield opened
    opened.close()


def propose(services: Services, *edits: object, **more: object) -> ProposalReport:
    given = {"method": "rome", "params": dict(STRONG), "reason": "a law"} | more
    ctx = RequestContext(client="agent", identity="ann")
    return services.proposals.propose(list(edits or FACTS[:2]), ctx=ctx, **given)  # type: ignore[arg-type]


def test_a_proposal_changes_nothing_and_waits_with_what_was_measured(services: Services) -> None:
    before = weights(services)
    told = propose(services, source="https://example.org")
    assert (told.proposal_id, told.state) == ("p1", "waiting")
    assert told.report is not None
    assert [r.target for r in told.report.results] == ["Rome", "Paris"]
    assert same(weights(services), before)
    [row] = services.proposals.list("waiting").proposals
    assert (row.facts[0], row.identity, row.reason) == ("The capital of France is -> Rome", "ann", "a law")
    assert services.workspace.ledger.verify() == []


def test_approved_in_the_same_state_it_is_applied_bit_for_bit_also_after_a_restart(tmp_path: Path) -> None:
    services = open_services(tmp_path / "one", bounds="off")
    report = propose(services).report
    services.close()
    services = open_services(tmp_path / "one", bounds="off")
    told = services.proposals.decide(
        "p1", "approve", "good", ctx=RequestContext(client="board", identity="bob")
    )
    assert (told.state, told.edit_ids) == ("approved", ["e1", "e2"])
    assert "exactly as it was measured" in told.message
    detail = services.history.show_edit("e1")
    assert report is not None
    assert detail.measurements[0].values["after"] == report.results[0].after
    assert detail.events[0].identity == "bob"
    other = open_services(tmp_path / "two", bounds="off")
    other.edits.apply(list(FACTS[:2]), method="rome", params=dict(STRONG))
    assert same(weights(services), weights(other))
    assert services.edits.audit().integrity.problems == []
    services.close()
    other.close()


def test_in_another_state_it_is_measured_again_first(services: Services) -> None:
    propose(services, FACTS[0])
    apply(services, FACTS[2])
    told = services.proposals.decide("p1", "approve")
    assert told.state == "approved"
    assert "measured again first" in told.message
    [edit_id] = told.edit_ids
    assert services.workspace.ledger.get_proposal("p1").edit_ids == (edit_id,)
    assert services.edits.audit().integrity.problems == []


def test_what_breaks_its_bounds_when_measured_again_goes_on_waiting(services: Services) -> None:
    bound = propose(services, FACTS[0]).report.drift.kl + 1e-6  # type: ignore[union-attr]
    services.proposals.decide("p1", "decline")
    propose(services, FACTS[0], guard=Guard(max_drift=bound))
    services.edits.apply([FACTS[2]], method="rome", params=dict(STRONG))
    before = weights(services)
    told = services.proposals.decide("p2", "approve")
    assert (told.state, told.edit_ids) == ("waiting", [])
    assert "max_drift" in told.message
    assert same(weights(services), before)
    assert [p.proposal_id for p in services.proposals.list("waiting").proposals] == ["p2"]


def test_what_breaks_its_bounds_at_once_is_not_proposed(services: Services) -> None:
    told = propose(services, FACTS[0], params=dict(QUICK), guard=Guard(max_drift=0.0))
    assert (told.proposal_id, told.state) == ("", "rejected")
    assert services.proposals.list().proposals == []


def test_replacing_an_active_edit_is_part_of_the_proposal(services: Services) -> None:
    apply(services, FACTS[0])
    propose(services, FACTS[0].model_copy(update={"target": "Lyon"}), replace=True)
    told = services.proposals.decide("p1", "approve")
    assert "exactly as it was measured" in told.message
    assert [(e.edit_id, e.status) for e in services.history.list_edits().edits] == [
        ("e2", "active"),
        ("e1", "replaced"),
    ]


def test_a_decision_is_made_once_and_changes_need_a_word(services: Services) -> None:
    propose(services, FACTS[0])
    with pytest.raises(ServiceError, match="note is empty"):
        services.proposals.decide("p1", "changes")
    with pytest.raises(ServiceError, match="'maybe' does not exist"):
        services.proposals.decide("p1", "maybe")
    assert services.proposals.decide("p1", "changes", "give a source").note == "give a source"
    for decision in ("approve", "decline"):
        with pytest.raises(Conflict, match="sent back for changes already"):
            services.proposals.decide("p1", decision)
    with pytest.raises(NoSuchProposal, match="'p7'"):
        services.proposals.decide("p7", "approve")
    assert services.history.list_edits().total == 0


def test_who_proposed_a_correction_takes_it_back_but_does_not_approve_it(services: Services) -> None:
    ann, bob = RequestContext(client="board", identity="ann"), RequestContext(client="agent", identity="bob")
    before = weights(services)
    propose(services, FACTS[0])
    with pytest.raises(Conflict, match=r"p1 was proposed by 'ann'.*--approve-own"):
        services.proposals.decide("p1", "approve", ctx=ann)
    assert same(weights(services), before)
    taken_back = services.proposals.decide("p1", "decline", ctx=ann)
    assert taken_back.message == "p1 is declined, by ann, who proposed it."
    propose(services, FACTS[0])
    told = services.proposals.decide("p2", "approve", ctx=bob)
    assert "p2 is approved as e1, by bob." in told.message
    rows = services.proposals.list().proposals
    assert [row.decided_by for row in rows] == ["bob", "ann, who proposed it"]
    sql = "SELECT json_extract(payload, '$.by_proposer') FROM events WHERE kind = 'decided' ORDER BY seq"
    assert services.history.query(sql).rows == [[1], [0]]
    assert services.workspace.ledger.verify() == []


@pytest.mark.parametrize(("client", "own"), [("agent", True), ("board", False), (None, False)])
def test_where_no_identity_is_checked_the_decision_says_whether_the_same_client_made_it(
    services: Services, client: str | None, own: bool
) -> None:
    services.proposals.propose([FACTS[0]], "rome", dict(STRONG), ctx=RequestContext(client="agent"))
    message = services.proposals.decide("p1", "approve", ctx=RequestContext(client=client)).message
    assert ("the same client that proposed it" in message) == own
    assert "no identity was checked" in message
    sql = "SELECT json_extract(payload, '$.by_proposer') FROM events WHERE kind = 'decided'"
    assert services.history.query(sql).rows == [[int(own)]]


def test_one_identity_may_do_both_only_where_the_server_is_started_so(tmp_path: Path) -> None:
    services = open_services(tmp_path, bounds="off", approve_own=True)
    propose(services, FACTS[0])
    told = services.proposals.decide("p1", "approve", ctx=RequestContext(identity="ann"))
    assert "p1 is approved as e1, by ann, who proposed it." in told.message
    services.close()
